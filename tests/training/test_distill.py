"""`arvision distill` in miniature: pairs, training, resuming, publishing, bad shards."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import arvision
from arvision.cli import app
from arvision.errors import CheckpointError, InputError
from arvision.models import LlamaGenStudent
from arvision.pipeline import ARPipeline
from arvision.testing import tiny_llamagen
from arvision.training.distill import DistillSettings, distill
from arvision.training.llamagen_text import build_text_encoder, build_text_tokenizer
from arvision.training.loop import FitConfig
from arvision.training.publish import run_recipe

FIT = FitConfig(
    steps=80, batch_size=32, learning_rate=5e-3, log_every=5, warmup=5, average_decay=0.9
)
SETTINGS = DistillSettings(
    num_pairs=960, num_held_out=24, shard_size=400, num_card=10, sheet_every=30, fit=FIT
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a tiny random teacher."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    pipe = ARPipeline.from_model(tiny_llamagen(sharpness=3.0), guidance_scale=1.5)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def done(teacher, tmp_path_factory):
    """A finished run and its figures."""
    out = tmp_path_factory.mktemp("run")
    return out, distill(teacher, out, SETTINGS, progress=False)


def test_a_student_is_made_and_draws(done, teacher):
    out, figures = done
    log = [json.loads(line) for line in (out / "dd1" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert figures["agreement"]["0"] > 1.5 * figures["chance"]
    assert len(figures["agreement_by_position"]) == 16
    assert (out / "samples.png").stat().st_size > 1000
    student = out / "tiny-dd"
    first = arvision.sample(str(student), 1, seed=3, progress=False)
    assert (first.stats.forward_passes, first.stats.lossless) == (1, False)
    taught = arvision.sample(str(teacher), 1, "ar", noise="flow", seed=3, progress=False)
    mixed = arvision.sample(
        str(student), 1, "dd", steps=6, teacher=str(teacher), seed=3, progress=False
    )
    # The teacher draws these; a folder of one does not travel with the student.
    assert torch.equal(mixed.tokens[:, :5], taught.tokens[:, :5])
    with pytest.raises(InputError, match=r"steps 9: this student was trained for 1, 2, .* up to 6"):
        arvision.sample(str(student), 1, steps=9, progress=False)
    with pytest.raises(InputError, match="sampler 'sjd' drives token models"):
        arvision.sample(str(student), 1, "sjd", progress=False)


def test_a_stopped_run_goes_on_where_it_stopped(done, teacher, tmp_path):
    out, figures = done
    shutil.copytree(out, tmp_path / "again")
    for part in ("dd1", "tiny-dd"):
        shutil.rmtree(tmp_path / "again" / part)
    shards = sorted((tmp_path / "again" / "pairs").iterdir())
    kept = load_file(shards[1])["tokens"]
    shards[1].unlink()
    repeated = distill(teacher, tmp_path / "again", SETTINGS, progress=False)
    assert torch.equal(load_file(shards[1])["tokens"], kept)
    assert repeated["agreement"] == figures["agreement"]
    weights = [
        load_file(next((folder / "tiny-dd" / "transformer").glob("*.safetensors")))
        for folder in (out, tmp_path / "again")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_bad_shards(done, teacher, tmp_path):
    out, _ = done
    shutil.copytree(out, tmp_path / "run")
    shard = sorted((tmp_path / "run" / "pairs").iterdir())[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"pairs-0000000-400.*cannot be read .*complete"):
        distill(teacher, tmp_path / "run", SETTINGS, progress=False)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"pairs-0000000-400.*is damaged .*; delete it"):
        distill(teacher, tmp_path / "run", SETTINGS, progress=False)
    shard.write_bytes(whole)
    other = ARPipeline.from_model(tiny_llamagen(seed=1), guidance_scale=1.5)
    other.save_pretrained(tmp_path / "tiny")
    with pytest.raises(CheckpointError, match="a pair shard with teacher"):
        distill(tmp_path / "tiny", tmp_path / "run", SETTINGS, progress=False)
    mild = ARPipeline.from_model(tiny_llamagen(sharpness=3.0), guidance_scale=1.0)
    mild.save_pretrained(tmp_path / "mild" / "tiny")
    with pytest.raises(CheckpointError, match="a pair shard with settings"):
        distill(tmp_path / "mild" / "tiny", tmp_path / "run", SETTINGS, progress=False)
    assert shard.read_bytes() == whole


def test_bad_input(teacher, tmp_path):
    with pytest.raises(InputError, match="method 'dd3'"):
        distill(teacher, tmp_path, method="dd3")
    with pytest.raises(InputError, match="cannot be distilled: expected a teacher of Llama"):
        distill("mar-fashion", tmp_path)
    with pytest.raises(InputError, match="num_pairs 0: expected at least 1"):
        DistillSettings(num_pairs=0)
    with pytest.raises(InputError, match=r"timesteps .*: expected integers"):
        DistillSettings(timesteps="0 20")  # pyright: ignore[reportArgumentType]


def test_the_command_with_a_loss_on_pictures(teacher, tmp_path):
    args = ["--teacher", str(teacher), "--out", str(tmp_path), "--num-pairs", "40", "--steps", "4"]
    args += ["--num-held-out", "20", "--batch-size", "8", "--timesteps", "0,3", "--quiet", "--json"]
    args += ["--picture-weight", "0.5", "--card-samples", "4"]
    result = CliRunner().invoke(app, ["distill", *args])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout.splitlines()[-1])["agreement"]) == {"0", "3"}
    log = json.loads((tmp_path / "dd1" / "log.jsonl").read_text().splitlines()[-1])
    assert log["picture"] > 0


CAPTIONS = [
    f"a {tone} {garment}" for tone in ("dark", "light") for garment in ("boot", "bag", "tee")
]


@pytest.fixture(scope="module")
def text_teacher(tmp_path_factory):
    """A folder with a tiny random teacher that takes captions."""
    folder = tmp_path_factory.mktemp("teacher") / "words"
    model = tiny_llamagen(sharpness=3.0, num_classes=None, caption_dim=16, caption_length=6)
    words = build_text_tokenizer()
    encoder = build_text_encoder(len(words), 16, 0)
    ARPipeline.from_model(
        model, guidance_scale=1.5, text_tokenizer=words, text_encoder=encoder
    ).save_pretrained(folder)
    return folder


def test_a_student_of_captions(text_teacher, done, tmp_path):
    settings = dataclasses.replace(SETTINGS, prompts=CAPTIONS, init=str(done[0] / "tiny-dd"))
    figures = distill(text_teacher, tmp_path, settings, progress=False)
    assert figures["agreement"]["0"] > 1.25 * figures["chance"]
    student = arvision.load(tmp_path / "words-dd")
    drawn = student([CAPTIONS[0], "a wide bag"], seed=3, progress=False)
    assert (drawn.stats.forward_passes, drawn.stats.lossless) == (1, False)
    alone = student("a wide bag", seed=[(3, 1)], progress=False)
    assert torch.equal(alone.tokens[0], drawn.tokens[1])
    other = student("a dark tee", seed=[(3, 1)], progress=False)
    assert not torch.equal(alone.tokens, other.tokens)
    taught = arvision.sample(
        str(text_teacher), "a dark tee", "ar", noise="flow", seed=3, progress=False
    )
    options = {"steps": 6, "teacher": str(text_teacher), "seed": 3, "progress": False}
    mixed = arvision.sample(student, "a dark tee", "dd", **options)
    assert torch.equal(mixed.tokens[:, :5], taught.tokens[:, :5])
    changed = dataclasses.replace(settings, prompts=CAPTIONS[:-1])
    with pytest.raises(CheckpointError, match="a pair shard with captions"):
        distill(text_teacher, tmp_path, changed, progress=False)
    with pytest.raises(InputError, match="3: expected a caption"):
        student(3, progress=False)


@pytest.mark.slow
def test_the_recipe_of_captions(tmp_path, monkeypatch):
    """`arvision train --recipe llamagen-fashion-t2i-dd` in miniature, on invented garments."""
    images = torch.randint(256, (16, 32, 32), dtype=torch.uint8)
    content = (images, torch.arange(16) % 10)
    monkeypatch.setattr("arvision.training.captions.load_fashion", lambda split: content)
    monkeypatch.setattr("arvision.training.publish.fashion_folder", lambda: None)
    made = run_recipe(
        "llamagen-fashion-t2i-dd", tmp_path, steps=2, num_images=6, card_samples=2, progress=False
    )
    folder = tmp_path / "llamagen-fashion-t2i-dd"
    assert set(made["garment"]) == set(made["brightness"]) == {"1", "2"}
    assert made["captions"] == 16
    assert (folder / "transformer").is_dir()
    weights = sum(p.stat().st_size for p in (folder / "transformer").iterdir())
    assert weights < 6_000_000
    assert "--prompts FILE" in (folder / "README.md").read_text()
    out = arvision.sample(str(folder), "a dark boot", steps=2, seed=0, progress=False)
    assert out.stats.forward_passes == 2


def test_the_padding_of_captions_and_the_other_words_do_not_matter(text_teacher):
    """Behind padding the network computes what it computes without."""
    teacher = arvision.load(text_teacher).model
    student = LlamaGenStudent.from_teacher(teacher, (0,), intermediate_size=24)
    features, valid = student.describe(["a dark boot"])
    vectors, known = (
        torch.randn(1, 16, student.codebook.shape[1]),
        torch.zeros(1, dtype=torch.int64),
    )
    noisy = torch.where(valid[..., None], features, torch.randn_like(features))
    found = [student.transformer(rows, vectors, known, valid) for rows in (features, noisy)]
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)
    wide = LlamaGenStudent.from_teacher(teacher, (0,))
    ratio = student.transformer.num_parameters() / wide.transformer.num_parameters()
    assert ratio < 0.95


def test_bad_captions(teacher, text_teacher, tmp_path):
    with pytest.raises(InputError, match="the teacher takes captions: expected prompts"):
        distill(text_teacher, tmp_path / "a")
    with pytest.raises(InputError, match="prompts: the teacher is class-conditional"):
        distill(teacher, tmp_path / "b", DistillSettings(prompts=["a boot"]))
    chosen = DistillSettings(prompts=["a boot"], intermediate_size=9999)
    with pytest.raises(InputError, match="intermediate_size 9999: the teacher has"):
        distill(text_teacher, tmp_path / "c", chosen)
    with pytest.raises(InputError, match="intermediate_size 8: students of a VARTransformer"):
        distill("var-fashion", tmp_path / "d", DistillSettings(intermediate_size=8))
