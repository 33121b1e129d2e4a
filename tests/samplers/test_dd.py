"""Students: with one that knows its teacher's map by heart, every number of steps is the teacher."""

import pytest
import torch

from arvision import get_sampler
from arvision.decoding.flow import FlowMap
from arvision.decoding.student import check_codebook, codebook_mark, nearest_code
from arvision.errors import CheckpointError, InputError
from arvision.models import LlamaGenStudent, LlamaGenStudentTransformer
from arvision.testing import TableModel, tiny_llamagen

NUM, VOCAB, WIDTH = 6, 5, 3
SEEDS = [(4, k) for k in range(40)]


class Teacher(TableModel):
    def __init__(self):
        super().__init__(vocab_size=VOCAB, num_tokens=NUM)
        self.codebook = torch.randn(VOCAB, WIDTH, dtype=torch.float64)


class Oracle:
    """Answers from its teacher's table; `is_wrong` spoils everything from that place on."""

    def __init__(self, teacher, timesteps=(0, 4), is_wrong=NUM, split=NUM):
        self.teacher, self.timesteps, self.is_wrong, self.split = (
            teacher,
            timesteps,
            is_wrong,
            split,
        )
        self.vocab_size, self.num_tokens = VOCAB, NUM
        self.codebook, self.unit_ends = teacher.codebook, tuple(range(1, NUM + 1))
        self.seen = []

    def predict(self, conditions, vectors, known):
        self.seen.append(known)
        flow_map, tokens = FlowMap(self.codebook), nearest_code(vectors, self.codebook)
        state, logits = self.teacher.start(conditions)
        for place in range(NUM):
            if place >= known:
                tokens[:, place] = flow_map(
                    logits.log_softmax(-1)[:, None], vectors[:, place, None]
                )[:, 0]
            if place + 1 < NUM:
                logits = state.extend(tokens[:, place, None])[:, -1]
                one = torch.ones(len(tokens), dtype=torch.int64)
                state.commit(one[:, None] - 1, one)
        spoilt = tokens.clone()
        spoilt[:, self.is_wrong :] = 0
        found = torch.nn.functional.one_hot(spoilt, VOCAB).double()
        return found, self.codebook[spoilt] + 0.001

    def decode(self, tokens):
        return self.teacher.decode(tokens)


def draw(sampler, model, **options):
    chosen = get_sampler(sampler, **options)
    if "teacher" in options:
        chosen = chosen.bind(teacher=model.teacher)
    return chosen(model, [None] * len(SEEDS), seeds=SEEDS)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_perfect_student_draws_what_its_teacher_draws(steps):
    teacher = Teacher()
    expected = draw("ar", teacher, noise="flow").tokens
    named = {"teacher": "x"} if steps > 2 else {}
    out = draw("dd", Oracle(teacher), steps=steps, **named)
    assert torch.equal(out.tokens, expected)
    assert out.stats.teacher_passes == (0 if steps < 3 else steps - 2 if steps < 5 else 4)
    assert out.stats.forward_passes == steps


def test_the_teacher_mends_what_the_student_got_wrong_and_only_that():
    teacher = Teacher()
    expected = draw("ar", teacher, noise="flow").tokens
    wrong = Oracle(teacher, is_wrong=2)
    assert not torch.equal(draw("dd", wrong).tokens, expected)
    mended = draw("dd", wrong, steps=4, teacher="x")  # the teacher draws tokens 2 and 3
    assert torch.equal(mended.tokens[:, :4], expected[:, :4])
    assert wrong.seen[-2:] == [0, 4]
    fewer = draw("dd", wrong, steps=3, teacher="x")  # only token 3, behind a wrong token 2
    assert torch.equal(fewer.tokens[:, :2], expected[:, :2])
    assert not torch.equal(fewer.tokens[:, :4], expected[:, :4])


def test_vectors_are_decoded_as_they_are_behind_the_split():
    teacher = Teacher()
    out = draw("dd", Oracle(teacher, split=4))
    codes = teacher.codebook[out.tokens]
    assert out.embeddings is not None
    assert torch.equal(out.embeddings[:, :4], codes[:, :4])
    torch.testing.assert_close(out.embeddings[:, 4:], codes[:, 4:] + 0.001)


def test_bad_input():
    teacher = Teacher()
    with pytest.raises(InputError, match=r"steps 3: more than 2 need the student's teacher"):
        draw("dd", Oracle(teacher), steps=3)
    with pytest.raises(InputError, match=r"steps 6: this student was trained for 1, 2, .*up to 5"):
        draw("dd", Oracle(teacher), steps=6, teacher="x")
    with pytest.raises(InputError, match=r"steps 2: this student was trained for 1$"):
        draw("dd", Oracle(teacher, timesteps=(0,)), steps=2)
    with pytest.raises(InputError, match="steps 0: expected an integer >= 1"):
        get_sampler("dd", steps=0)
    other = Oracle(teacher)
    other.teacher = Teacher()
    other.teacher.codebook = teacher.codebook + 1
    with pytest.raises(InputError, match="another codebook"):
        draw("dd", other, steps=4, teacher="x")


def student_of(teacher, **settings):
    assert teacher.tokenizer is not None
    codes = teacher.tokenizer.quantize.codes().detach()
    network = LlamaGenStudentTransformer.from_teacher(teacher.transformer, codes, **settings)
    return LlamaGenStudent(network.eval(), teacher.tokenizer)


def test_a_student_network_looks_back_only_and_tells_codes_from_noise():
    model = student_of(tiny_llamagen(), timesteps=(0, 5))
    vectors = torch.randn(2, 16, model.codebook.shape[1])
    logits, out = model.predict([0, 1], vectors, 0)
    changed = vectors.clone()
    changed[:, 9] += 1
    later, later_out = model.predict([0, 1], changed, 0)
    assert torch.equal(later[:, :9], logits[:, :9])
    assert torch.equal(later_out[:, :9], out[:, :9])
    assert (later[:, 9:] != logits[:, 9:]).any(-1).all()
    told, _ = model.predict([0, 1], vectors, 5)
    assert not torch.allclose(told, logits)


def test_a_student_knows_its_codebook():
    teacher = tiny_llamagen()
    assert teacher.tokenizer is not None
    codes = teacher.tokenizer.quantize.codes().detach()
    check_codebook(codes.half().float(), codebook_mark(codes))
    with pytest.raises(InputError, match="another codebook"):
        check_codebook(codes.flip(0), codebook_mark(codes))
    with pytest.raises(InputError, match="another codebook"):
        student_of(teacher, timesteps=(0, 5), codebook_mark=codebook_mark(codes.flip(0)))
    with pytest.raises(
        InputError, match=r"timesteps \[0, 99\]: expected 0 first, growing, below 16"
    ):
        student_of(teacher, timesteps=(0, 99))


def test_official_checkpoint_of_a_student(tmp_path):
    """The published layout: an `ema` entry, the codebook and the mask as extra keys."""
    model = student_of(tiny_llamagen(), timesteps=(0, 5), split=9)
    state = {k: v.clone() for k, v in model.transformer.state_dict().items()}
    extra = {"codebook": model.codebook, "causal_mask": torch.ones(17, 17)}
    torch.save({"ema": state | extra, "model": {}}, tmp_path / "llamagen-B.pt")
    sizes = {"num_heads": 4, "grid": (4, 4), "timesteps": (0, 5), "split": 9}
    loaded = LlamaGenStudentTransformer.from_official(tmp_path / "llamagen-B.pt", **sizes)
    assert (loaded.config["timesteps"], loaded.config["split"]) == ((0, 5), 9)
    vectors = torch.randn(1, 16, model.codebook.shape[1])
    again = LlamaGenStudent(loaded.eval(), model.tokenizer).predict([2], vectors, 5)
    assert torch.equal(again[0], model.predict([2], vectors, 5)[0])
    del state["final_layer_conti.linear.weight"]
    torch.save({"ema": state}, tmp_path / "broken.pt")
    with pytest.raises(CheckpointError, match=r"final_layer_conti\.linear\.weight"):
        LlamaGenStudentTransformer.from_official(tmp_path / "broken.pt", **sizes)
