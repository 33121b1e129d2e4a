"""VAR students: the authors' numbers, what a row may see, and a student that knows its teacher by heart."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from arvision import get_sampler
from arvision.contracts import ScaleModel, StudentModel
from arvision.decoding.flow import FlowMap
from arvision.decoding.student import nearest_code
from arvision.errors import CheckpointError, InputError
from arvision.models import VAR, VARStudent, VARStudentTransformer, VARTokenizer

TOLERANCE = 1e-5  # float32 rounding in another order of operations
PLAN = {"timesteps": (0, 2), "split": 2}
ENDS = (0, 1, 5, 14, 30)
SEEDS = [(3, k) for k in range(3)]


@pytest.fixture
def teacher(goldens):
    return VAR.from_official(goldens / "var" / "var_d2.pth", goldens / "var" / "var_d2_vae.pth")


@pytest.fixture
def student(teacher):
    model = VARStudent.from_teacher(teacher, timesteps=(0, 3))
    model.transformer.eval()
    return model


def close(ours: torch.Tensor, official: torch.Tensor) -> bool:
    assert ours.shape == official.shape
    return float((ours - official).abs().max() / official.abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", ["var_dd_d2", "var_dd_d2_shared_aln"])
def test_the_authors_numbers(goldens, name):
    vae = goldens / "var" / "var_d2_vae.pth"
    model = VARStudent.from_official(goldens / "dd" / f"{name}.pth", vae, **PLAN)
    sizes = json.loads((goldens / "dd" / f"{name}.json").read_text())
    io = load_file(goldens / "dd" / f"{name}.io.safetensors")
    config = model.transformer.config
    assert list(config["patch_nums"]) == sizes["patch_nums"]
    assert config["shared_aln"] == sizes["shared_aln"]
    given, begin = io["noise"], ENDS[model.split]
    for known in model.timesteps:
        given = torch.cat([given[:, : ENDS[known]], io["noise"][:, ENDS[known] :]], dim=1)
        assert close(given, io[f"input_{known}"])
        logits, vectors = model.predict(io["class_ids"].tolist(), given, known)
        assert close(logits, io[f"logits_{known}"])
        assert close(vectors, io[f"vectors_{known}"])
        codes = model.codebook[logits.argmax(-1)]
        fresh = torch.cat([codes[:, :begin], vectors[:, begin:]], dim=1)
        given = torch.cat([given[:, : ENDS[known]], fresh[:, ENDS[known] :]], dim=1)
        assert close(given, io[f"sequence_{known}"])
    assert close(model.decode(given) / 2 + 0.5, io["image"])


@pytest.mark.parametrize(
    ("depth", "teacher_count", "millions"),
    [(16, 310_283_520, 327), (20, 600_917_136, 635), (24, 1_033_399_360, 1090)],
)
def test_official_sizes(depth, teacher_count, millions):
    """The teacher's number and what the layout adds to it, near what the authors say (rounded)."""
    width = 64 * depth
    with torch.device("meta"):
        network = VARStudentTransformer(hidden_size=width, num_layers=depth, num_heads=depth)
    assert tuple(network.pos_1LC.shape) == (1, 681, width)
    assert network.lvl_embed.num_embeddings == 11
    count = sum(p.numel() for p in network.parameters())
    places, told, vectors = (
        2 * width,
        (depth + 1) * (width + 1) * width + 2 * width,
        34 * width + 32,
    )
    assert count == teacher_count + places + told + vectors
    assert count == pytest.approx(millions * 1e6, rel=0.005)


def test_published_plans_go_by_depth():
    sizes = {"patch_nums": (1, 2, 3, 4, 5, 6), "hidden_size": 8, "num_heads": 2, "num_classes": 2}
    sizes |= {"codebook_size": 4, "z_channels": 2}
    for depth, plan in {16: ((0, 5), 5), 20: ((0, 4), 4), 24: ((0, 4), 4), 2: ((0,), None)}.items():
        state = VARStudentTransformer(**sizes, num_layers=depth, timesteps=(0,)).state_dict()
        wrapped = {"trainer": {"ema_parameters": state, "var_wo_ddp": {}}}
        found = VARStudentTransformer.from_official(wrapped, patch_nums=sizes["patch_nums"]).config
        assert (tuple(found["timesteps"]), found["split"]) == plan


def test_a_row_sees_itself_and_coarser_scales_only(student):
    torch.nn.init.normal_(student.transformer.layerwise_n_d_embed[0].weight)
    vectors = torch.randn(2, 30, 8)
    logits, out = student.predict([0, 1], vectors, 0)
    changed = vectors.clone()
    changed[:, 7] += 1  # the third token of scale 2, which ends at 14
    for before, after in zip((logits, out), student.predict([0, 1], changed, 0), strict=True):
        moved = (before != after).any(-1)
        assert moved[:, 7].all()
        assert moved[:, 14:].all()
        assert not moved[:, :7].any()
        assert not moved[:, 8:14].any()


def test_codes_are_told_from_noise_from_the_next_scale_on(student):
    vectors = torch.randn(1, 30, 8)
    unknown, known = (student.predict([0], vectors, k)[0] for k in (0, 2))
    assert (unknown != known).any(-1).all()  # every row looks at the first one
    assert torch.equal(student.predict([0], vectors, 2)[0], known)


def test_a_student_starts_with_its_teachers_weights(teacher, student):
    ours, theirs = student.transformer.state_dict(), teacher.transformer.state_dict()
    for key, value in theirs.items():
        found = ours[key]
        if key == "pos_1LC":
            found = found[:, 1:]
        elif key == "lvl_embed.weight":
            found = found[1:]
        assert torch.equal(found, value), key
    assert torch.equal(ours["pos_1LC"][:, 0], theirs["pos_1LC"][:, 0])
    assert not ours["layerwise_n_d_embed.0.weight"].any()
    assert ours["n_d_embed.weight"].any()


class Perfect(VARStudent):
    """Answers with what its teacher makes of the noise; `is_wrong` spoils all tokens from there on."""

    def __init__(self, student, teacher, guidance, shape, is_wrong=30):
        super().__init__(student.transformer, student.tokenizer)
        self.teacher, self.guidance, self.shape, self.is_wrong = teacher, guidance, shape, is_wrong

    def predict(self, conditions, vectors, known):
        flow_map, state = FlowMap(self.codebook), self.teacher.start(conditions, self.guidance)
        tokens = nearest_code(vectors, self.codebook)
        for scale, (begin, end) in enumerate(pairwise(ENDS)):
            logits = state.next()
            if scale >= known:
                tokens[:, begin:end] = flow_map(self.shape(logits), vectors[:, begin:end])
            state.feed(tokens[:, begin:end])
        tokens = tokens.clone()
        tokens[:, self.is_wrong :] = 0
        return F.one_hot(tokens, self.vocab_size).float(), self.codebook[tokens]


def perfect(teacher, student, options, **more):
    shape = get_sampler("ar", **options).shaping()
    return Perfect(student, teacher, 2.0, shape, **more)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_with_a_perfect_student_every_number_of_steps_is_the_teacher(teacher, student, steps):
    options = {"top_p": 0.9, "temperature": 0.7}
    run = {"seeds": SEEDS, "guidance_scale": 2.0}
    expected = get_sampler("ar", noise="flow", **options)(teacher, [0, 1, 2], **run).tokens
    sampler = get_sampler("dd", steps=steps, **options).bind(teacher=teacher)
    out = sampler(perfect(teacher, student, options), [0, 1, 2], **run)
    assert torch.equal(out.tokens, expected)
    assert out.stats.forward_passes == steps
    wrong = perfect(teacher, student, options, is_wrong=1)
    spoilt = sampler(wrong, [0, 1, 2], **run).tokens
    if steps == 4:  # the teacher draws all three scales in front of the student's
        assert torch.equal(spoilt[:, :14], expected[:, :14])
    else:
        assert not torch.equal(spoilt[:, :14], expected[:, :14])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_real_student_draws_images_one_by_one_as_in_a_batch(teacher, student, steps):
    assert isinstance(student, StudentModel)
    assert not isinstance(student, ScaleModel)
    sampler = get_sampler("dd", steps=steps).bind(teacher=teacher)
    out = sampler(student, [0, 1, 2], seeds=SEEDS, guidance_scale=2.0)
    alone = sampler(student, [2], seeds=SEEDS[2:], guidance_scale=2.0)
    assert torch.equal(out.tokens[2:], alone.tokens)
    assert student.decode(out.tokens).shape == (3, 3, 64, 64)
    assert out.stats.teacher_passes == max(0, steps - 2)


def test_vectors_are_painted_with_gradients(teacher, student):
    vectors = teacher.codebook[torch.randint(64, (2, 30))].requires_grad_()
    pixels = student.decode_vectors(vectors)
    assert torch.equal(pixels.clamp(-1, 1), student.decode(vectors))
    pixels.sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().sum((0, 2)).all()
    assert VARStudent.from_teacher(teacher).timesteps == (0, 2)


def test_what_does_not_fit(teacher, student):
    network = student.transformer
    other = VARTokenizer(patch_nums=(1, 2, 3, 4), ch=32, z_channels=8, codebook_size=64)
    VARStudent(network, teacher.tokenizer)
    with pytest.raises(InputError, match="another codebook than the one that the student"):
        VARStudent(network, other)
    small = VARTokenizer(patch_nums=(1, 2, 4), ch=32, z_channels=8, codebook_size=64)
    with pytest.raises(
        InputError, match=r"scales \[1, 2, 4\]: expected \[1, 2, 3, 4\], those of the"
    ):
        VARStudent(network, small)
    few = VARTokenizer(patch_nums=(1, 2, 3, 4), ch=32, z_channels=8, codebook_size=32)
    with pytest.raises(InputError, match="codebook_size 32: expected 64, that of the student's"):
        VARStudent(network, few)
    with pytest.raises(InputError, match="a student needs its image tokenizer"):
        VARStudent(network, None)
    for steps in ((), (1, 2), (0, 4), (0, 2, 2)):
        message = f"timesteps {list(steps)}: expected 0 first, growing, below 4 scales"
        with pytest.raises(InputError, match=re.escape(message)):
            VARStudentTransformer.from_teacher(teacher.transformer, timesteps=steps)
    with pytest.raises(InputError, match=r"split 5: expected a number of scales in 0\.\.4"):
        VARStudentTransformer.from_teacher(teacher.transformer, timesteps=(0,), split=5)
    with pytest.raises(InputError, match="no conditions"):
        student.predict([], torch.randn(0, 30, 8), 0)


def test_official_files_that_do_not_fit(goldens):
    content = torch.load(goldens / "dd" / "var_dd_d2.pth", weights_only=True)
    state = content["trainer"]["ema_parameters"]

    def refuses(tensors, message, **sizes):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            VARStudentTransformer.from_official(tensors, **sizes)

    refuses(
        state, "its tensors say patch_nums (1, 2, 3, 4), not (1, 2, 3, 5)", patch_nums=(1, 2, 3, 5)
    )
    bare = {k: v for k, v in state.items() if k != "lvl_1L"}
    refuses(bare, "30 tokens in 4 scales are no official model's: pass patch_nums")
    key = "final_layer_conti.linear.weight"
    refuses({k: v for k, v in state.items() if k != key}, f"key {key!r} is missing")
    refuses({k: v for k, v in state.items() if k != "pos_1LC"}, "key 'pos_1LC' is missing")
    plain = torch.load(goldens / "var" / "var_d2.pth", weights_only=True)
    refuses(plain, "key 'n_d_embed.weight' is missing")


def test_save_and_load(student, tmp_path):
    student.transformer.save_pretrained(tmp_path)
    loaded = VARStudentTransformer.from_pretrained(tmp_path)
    assert tuple(loaded.config["timesteps"]) == (0, 3)
    vectors = torch.randn(1, 30, 8)
    again = VARStudent(loaded, student.tokenizer).predict([2], vectors, 3)
    own, found = student.transformer.state_dict(), loaded.state_dict()
    assert own.keys() == found.keys()
    assert all(torch.equal(own[name], found[name]) for name in own)
    # The same weights at another address may take another path through a product: close, not equal.
    torch.testing.assert_close(again[0], student.predict([2], vectors, 3)[0], rtol=1e-5, atol=1e-5)
