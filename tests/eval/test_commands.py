"""`arvision eval` as a user runs it, on the embedded model."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from typer.testing import CliRunner

from arvision.cli.eval import app
from arvision.errors import ArvisionError, InputError
from arvision.eval.shards import ShardFolder
from arvision.evaluation import likelihood, weights_sha256
from arvision.training import data

MODEL = ("--model", "llamagen-fashion", "--protocol", "fashion")


def run(*arguments: Any) -> str:
    """Stdout of a command that must succeed."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def run_json(command: str, *arguments: Any) -> Any:
    """What a command prints with --json, without progress bars."""
    quiet = () if command in ("coco", "export", "extractors") else ("--quiet",)
    return json.loads(run(command, *arguments, "--json", *quiet))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Two small runs: plain sampling with seed 0, maximal coupling with seed 1."""
    place = tmp_path_factory.mktemp("runs")
    run("generate", *MODEL, "--num", 24, "--out", place / "ar", "--quiet", "--batch-size", 12)
    options = ("--sampler", "sjd:coupling=maximal", "--option", "window=8")
    run("generate", *MODEL, "--num", 24, "--seed", 1, "--out", place / "sjd", "--quiet", *options)
    return {"ar": place / "ar", "sjd": place / "sjd"}


def test_generate_records_settings_and_draws_the_labels(runs: dict[str, Path], fashion):
    import arvision

    shards = ShardFolder(runs["ar"])
    options = shards.config["options"]
    assert options["dtype"] == "float32"
    assert options["guidance_scale"] == fashion.config["guidance_scale"]
    alone = arvision.sample(fashion, 3, "ar", seed=[(0, 13)], progress=False, output_type="pt")
    pixels = (torch.as_tensor(alone.images) * 255).round().to(torch.uint8)
    kept = torch.from_numpy(shards.read(13, 14)).permute(0, 3, 1, 2)
    # Batch sizes may round logits differently, which can flip a token now and then.
    assert np.array_equal(shards.read_tokens(13, 14), alone.tokens.numpy()) or (
        (kept != pixels).double().mean() < 0.5
    )


def test_generate_again_changes_nothing_and_writes_npz(runs: dict[str, Path], tmp_path: Path):
    block = runs["ar"] / "blocks" / "00000.npy"
    before = hashlib.sha256(block.read_bytes()).hexdigest()
    facts = run_json("generate", *MODEL, "--num", 24, "--out", runs["ar"], "--write", "npz")
    assert facts["images"] == 24
    assert facts["forward_passes"] == 2 * 63
    assert hashlib.sha256(block.read_bytes()).hexdigest() == before
    loaded = np.load(facts["written"])
    assert loaded["arr_0"].shape == (24, 32, 32, 3)
    assert loaded["arr_1"].tolist() == [i % 10 for i in range(24)]


def test_generate_refuses_other_settings(runs: dict[str, Path]):
    with pytest.raises(InputError, match="seed=0, asked for seed=5"):
        run("generate", *MODEL, "--num", 24, "--seed", 5, "--out", runs["ar"], "--quiet")
    with pytest.raises(InputError, match="options"):
        run(
            *("generate", *MODEL, "--num", 24, "--out", runs["ar"], "--quiet"),
            *("--option", "temperature=0.5"),
        )


def test_other_weights_do_not_go_on_with_a_run(runs: dict[str, Path], tmp_path: Path):
    import arvision

    pipe = arvision.load("llamagen-fashion", device="cpu")
    known = weights_sha256(pipe)
    assert ShardFolder(runs["ar"]).config["weights_sha256"] == known
    with torch.no_grad():
        next(iter(pipe.transformer.parameters())).view(-1)[0] += 1
    assert weights_sha256(pipe) != known


def test_a_failed_start_does_not_block_the_folder(tmp_path: Path):
    place = tmp_path / "run"
    with pytest.raises(InputError, match="unknown sampler"):
        run("generate", *MODEL, "--num", 2, "--out", place, "--quiet", "--sampler", "arr")
    run("generate", *MODEL, "--num", 2, "--out", place, "--quiet")
    assert ShardFolder(place).num == 2


def test_prompts_make_a_run(tmp_path: Path):
    captions = tmp_path / "captions.txt"
    captions.write_text("sneaker\nbag\n")
    common = ("generate", "--model", "llamagen-fashion", "--quiet", "--out", tmp_path / "run")
    prompts = ("--prompts", captions, "--per-prompt", 2)
    run(*common, "--protocol", "free", *prompts)
    assert ShardFolder(tmp_path / "run").num == 4
    with pytest.raises(InputError, match="give --prompts"):
        run(*common, "--protocol", "coco-30k")
    with pytest.raises(InputError, match="expected 2 to 4"):
        run(*common, "--protocol", "free", *prompts, "--num", 9)


def test_a_size_that_is_not_the_protocols_is_refused(tmp_path: Path):
    common = ("generate", "--model", "llamagen-fashion", "--quiet", "--num", 2)
    with pytest.raises(InputError, match="gives 32x32 with pixels plain: adm-in256/v1 has 256x256"):
        run(*common, "--protocol", "adm-in256", "--out", tmp_path / "a", "--num-classes", 10)
    assert not list((tmp_path / "a" / "blocks").iterdir())
    classes = ("--num-classes", 10, "--pixels", "to256")
    run(*common, "--protocol", "adm-in256", "--out", tmp_path / "b", *classes)
    assert ShardFolder(tmp_path / "b").read(0, 1).shape == (1, 256, 256, 3)


def test_export_does_not_overwrite(runs: dict[str, Path], tmp_path: Path):
    kept = tmp_path / "kept.npz"
    kept.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists"):
        run("export", "--samples", runs["ar"], "--layout", "npz", "--out", kept)
    assert kept.read_bytes() == b"mine"


def test_fid_of_runs_npz_and_folders_agrees(runs: dict[str, Path], tmp_path: Path):
    run("export", "--samples", runs["ar"], "--layout", "npz", "--out", tmp_path / "ar.npz")
    run("export", "--samples", runs["ar"], "--layout", "png", "--out", tmp_path / "png")
    values = []
    for samples in (runs["ar"], tmp_path / "ar.npz", tmp_path / "png"):
        found = run_json(
            *("fid", "--samples", samples, "--reference", runs["sjd"]),
            *("--extractor", "random-conv", "--metrics", "frechet,precision,recall,kid"),
        )
        assert set(found["scores"]) == {"frechet_random-conv", "precision", "recall", "kid"}
        assert found["extractor"]["is_fid"] is False
        values.append(found["scores"]["frechet_random-conv"]["value"])
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)
    assert values[0] > 0
    text = run(
        *("fid", "--samples", runs["ar"], "--reference", runs["ar"], "--quiet"),
        *("--extractor", "random-conv", "--metrics", "frechet"),
    )
    assert text.startswith("frechet_random-conv  0.0000")


def test_fid_against_the_test_images(runs: dict[str, Path]):
    found = run_json(
        *("fid", "--samples", runs["ar"], "--reference", "fashion-test"),
        *("--extractor", "fashion-classifier", "--metrics", "frechet"),
    )
    score = found["scores"]["frechet_fashion-classifier"]
    assert score["num_images"] == 24
    assert score["interval"][0] < score["value"] < score["interval"][1]


def test_report_says_everything(runs: dict[str, Path], tmp_path: Path):
    out = tmp_path / "report"
    printed = run(
        *("report", "--samples", runs["sjd"], "--reference", runs["ar"], "--quiet"),
        *("--extractor", "random-conv", "--metrics", "frechet,recall", "--out", out),
    )
    assert printed.strip() == (out / "report.md").read_text().strip()
    found = json.loads((out / "report.json").read_text())
    assert found["protocol"]["id"] == "fashion/v1"
    assert found["num"] == 24
    assert found["run"]["seed"] == 1
    assert found["run"]["options"]["coupling"] == "maximal"
    assert found["measured"]["forward_passes"] > 0
    assert found["measured"]["images_per_second"] > 0
    assert found["versions"]["torch"] == version("torch")
    assert found["comparable_to"].startswith("not to published figures")
    assert "class_consistency" in found["scores"]
    assert "not FID" in printed
    assert sorted(p.name for p in out.iterdir()) == ["report.json", "report.md"]


def test_equivalence_of_a_run_with_itself(runs: dict[str, Path]):
    found = run_json(
        "equivalence", "--a", runs["ar"], "--b", runs["ar"], "--extractor", "random-conv"
    )
    assert found["verdict"].startswith("equal")
    assert [t["name"] for t in found["tests"]] == ["same tokens"]


def test_equivalence_of_independent_runs(runs: dict[str, Path]):
    found = run_json(
        *("equivalence", "--a", runs["ar"], "--b", runs["sjd"], "--extractor", "random-conv"),
        *("--model", "llamagen-fashion", "--reference", runs["ar"]),
    )
    names = [t["name"] for t in found["tests"]]
    assert names == [
        "token law per position",
        "log-likelihood",
        "permutation MMD",
        "Frechet equivalence",
    ]
    text = run(
        *("equivalence", "--a", runs["ar"], "--b", runs["sjd"], "--extractor", "random-conv"),
        "--quiet",
    )
    assert "permutation MMD" in text


def test_likelihood_is_the_models_own(runs: dict[str, Path], fashion):
    """The sum of log-probabilities token by token, through the cache."""
    tokens = torch.from_numpy(ShardFolder(runs["ar"]).read_tokens(0, 2))
    found = likelihood("llamagen-fashion", runs["ar"])(tokens.numpy(), [0, 1])
    scale = fashion.config["guidance_scale"]
    with torch.inference_mode():
        state, logits = fashion.model.start([0, 1], guidance_scale=scale)
        total = torch.zeros(2)
        for position in range(tokens.shape[1]):
            logp = (logits / fashion.config["temperature"]).log_softmax(-1)
            total += logp.gather(1, tokens[:, position : position + 1])[:, 0]
            if position + 1 < tokens.shape[1]:
                logits = state.extend(tokens[:, position : position + 1])[:, 0]
                state.commit(torch.zeros(2, 1).long(), torch.ones(2).long())
    assert found == pytest.approx(total.numpy(), rel=1e-4)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A random CLIP network with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    end = len(tokens) - 1
    ends = {"eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    text = {**small, **ends, "vocab_size": len(tokens), "max_position_embeddings": 48}
    vision = {**small, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    ).save_pretrained(folder)
    return folder


def test_clip(runs: dict[str, Path], clip_folder: Path, tmp_path: Path):
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"prompt": f"a bag {k}"}) + "\n" for k in range(12)))
    common = ("clip", "--samples", runs["ar"], "--prompts", captions, "--weights", clip_folder)
    scores = {
        convention: run_json(*common, "--per-prompt", 2, "--convention", convention)["scores"][
            "clip"
        ]
        for convention in ("cosine", "torchmetrics", "hessel")
    }
    assert scores["cosine"]["details"]["prefix"] == "A photo depicts "
    assert scores["torchmetrics"]["value"] == pytest.approx(40 * scores["hessel"]["value"])
    assert -1 <= scores["cosine"]["value"] <= 1
    with pytest.raises(InputError, match="12 captions for 24 images"):
        run(*common, "--quiet")


def test_coco_and_layouts(runs: dict[str, Path], tmp_path: Path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(9)]
    notes = [{"id": k, "image_id": k % 9, "caption": f"caption {k}"} for k in range(18)]
    annotations = tmp_path / "captions_val2014.json"
    annotations.write_text(json.dumps({"images": images, "annotations": notes}))
    records = tmp_path / "six.jsonl"
    found = run_json("coco", "--annotations", annotations, "--out", records, "--num", 6)
    assert found["captions"] == 6
    assert len(records.read_text().splitlines()) == 6
    place = tmp_path / "geneval"
    run(
        *("export", "--samples", runs["ar"], "--layout", "geneval", "--prompts", records),
        *("--per-prompt", 4, "--out", place),
    )
    with Image.open(place / "00005" / "samples" / "0003.png") as picture:
        last = ShardFolder(runs["ar"]).read(23, 24)[0]
        assert np.array_equal(np.array(picture), last)


def test_extractors_are_listed():
    found = run_json("extractors")
    assert {"inception-adm", "dinov2-vitl14", "clip", "lite0"} <= set(found)
    assert "lite0" in run("extractors")


OK = ("--samples", "ok.npz", "--reference", "ok.npz")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "--model", "none", "--out", "x"), "unknown model 'none'"),
        (("generate", *MODEL, "--out", "x", "--protocol", "adm"), "unknown protocol 'adm'"),
        (("generate", *MODEL, "--out", "x", "--pixels", "vae"), "unknown pixel preset"),
        (("generate", *MODEL, "--out", "x", "--num", "1"), "at least 2"),
        (("generate", *MODEL, "--out", "x", "--option", "window"), "expected name=value"),
        (("generate", *MODEL, "--out", "x", "--write", "jpg"), "unknown sample format"),
        (("fid", "--samples", "none.npz", "--reference", "fashion-test", "--extractor",
          "random-conv"), "none.npz does not exist"),
        (("fid", *OK, "--extractor", "lite"), "unknown extractor"),
        (("fid", *OK), "has no weights"),
        (("fid", *OK, "--extractor", "random-conv", "--metrics", "fid2"), "unknown metric 'fid2'"),
        (("fid", *OK[:3], "fashion", "--extractor", "random-conv"), "reference fashion does not"),
        (("clip", "--samples", "x", "--prompts", "p.txt", "--weights", "none"), "x does not exist"),
        (("export", "--samples", "x", "--layout", "zip", "--out", "y"), "unknown layout 'zip'"),
        (("equivalence", "--a", "x", "--b", "y", "--extractor", "random-conv"), "run.json"),
        (("coco", "--annotations", "none.json", "--out", "y.jsonl"), "expected COCO captions"),
        (("report", "--samples", "x", "--reference", "x", "--out", "r", "--extractor",
          "random-conv"), "x does not exist"),
        (("report", *OK[:3], "y", "--out", "r"), "reference y does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    np.savez(tmp_path / "ok.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(ArvisionError) as caught:
        run(*arguments)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    left = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert left == ["ok.npz"]


@pytest.fixture
def no_fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Fashion-MNIST."""
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.delenv(data.FOLDER_VARIABLE)


@pytest.mark.usefixtures("no_fashion")
def test_without_fashion_mnist_commands_say_how_to_get_it(runs: dict[str, Path], tmp_path: Path):
    reference, out = ("--reference", "fashion-test"), ("--out", tmp_path / "out")
    for command in (
        ("fid", "--samples", runs["ar"], *reference),
        ("report", "--samples", runs["ar"], *reference, *out),
        ("equivalence", "--a", runs["ar"], "--b", runs["sjd"], *reference),
        ("demo", *out),
    ):
        with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist"):
            run(*command)
    with pytest.raises(InputError, match=r"none\.npz does not exist"):
        run("fid", "--samples", "none.npz", *reference)
    with pytest.raises(InputError, match=r"run\.json"):
        run("equivalence", "--a", runs["ar"], "--b", tmp_path, *reference)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_fashion")
def test_a_folder_of_fashion_mnist_may_be_named(runs: dict[str, Path], monkeypatch):
    monkeypatch.setenv(data.FOLDER_VARIABLE, "none")  # the option goes before it
    place = Path(__file__).parent.parent / "data" / "fashion-mnist"
    found = run_json(
        *("fid", "--samples", runs["ar"], "--reference", "fashion-test", "--fashion-mnist", place),
        *("--extractor", "random-conv", "--metrics", "frechet"),
    )
    assert found["scores"]["frechet_random-conv"]["num_images"] == 24


COMMANDS = ("generate", "fid", "clip", "report", "equivalence", "coco", "export", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_in_examples(command: str):
    text = run(command, "--help")
    assert f"arvision eval {command} --" in text
