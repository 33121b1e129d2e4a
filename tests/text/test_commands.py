"""`arvision generate` and `arvision train-draft` on a folder with a tiny language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from text_models import text_folder
from typer.testing import CliRunner

import arvision
from arvision.cli import app
from arvision.text import load_text_model
from arvision.text.fitting.judge import MarkedAnswer, judged_tokens
from arvision.text.rules.lossy import JudgeHead

runner = CliRunner()
PROMPT = "AbcdeAbc"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return text_folder(tmp_path_factory.mktemp("target"))


def run(*arguments: str):
    result = runner.invoke(app, list(arguments))
    return result, result.stdout, result.stderr


def generated(folder: Path, *arguments: str) -> dict:
    result, out, err = run(
        *("generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "24"),
        *("--json", *arguments),
    )
    assert result.exit_code == 0, err
    return json.loads(out)


def test_generate_prints_the_text_and_figures(folder: Path):
    plain = generated(folder)
    result, out, err = run(
        *("generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "24"),
        *("--drafter", "token_recycling", "--stats"),
    )
    assert result.exit_code == 0
    assert out.strip() == plain["texts"][0].strip()
    assert "24 tokens" in err
    assert "tokens per pass" in err
    assert "rule greedy (lossless)" in err


def test_generate_says_what_is_wrong(folder: Path):
    for arguments, message in (
        (("--drafter", "nothing"), "unknown drafter 'nothing'"),
        (("--rule", "typical", "--rule-option", "epsilon=3"), "epsilon 3"),
        (("--dtype", "float8"), "unknown dtype 'float8'"),
        (("--num-draft", "4"), "--num-draft without --drafter"),
        (("--option", "max_ngram=2"), "--option without --drafter"),
    ):
        result, _, err = run("generate", "--model", str(folder), "--prompt", "A", *arguments)
        assert result.exit_code != 0
        assert message in err + str(result.exception)


def test_trained_heads_draft_for_their_target(folder: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("Abc\nhello\nHello\nabcabc\n")
    result, _, err = run(
        *("train-draft", "--model", str(folder), "--prompts", str(tmp_path / "prompts.txt")),
        *("--kind", "hydra", "--steps", "4", "--batch-size", "16", "--quiet"),
        *("--out", str(tmp_path / "hydra"), "--answer-tokens", "24"),
    )
    assert result.exit_code == 0, err
    with_heads = generated(folder, "--draft", str(tmp_path / "hydra"))
    assert with_heads["texts"] == generated(folder)["texts"]


def marked_file(path: Path) -> Path:
    """Answers of random letters; Z and [ are wrong."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(80):
        fine = [chr(48 + int(k)) for k in torch.randint(32, (10,), generator=generator)]
        wrong = [chr(90 + int(k)) for k in torch.randint(2, (2,), generator=generator)]
        marked = {"prompt": "Abc", "answer": "".join(fine)}
        if number % 2:
            marked = {"prompt": "Abc", "answer": "".join(fine + wrong), "wrong": "".join(wrong)}
        lines.append(json.dumps(marked))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_judge_learns_what_is_wrong(folder: Path, tmp_path: Path):
    marked = marked_file(tmp_path / "marked.jsonl")
    result, out, err = run(
        *("train-draft", "--model", str(folder), "--prompts", str(marked), "--kind", "judge"),
        *("--steps", "150", "--out", str(tmp_path / "judge"), "--json", "--quiet"),
    )
    assert result.exit_code == 0, err
    figures = json.loads(out)
    assert figures["fine_kept"] > 0.8
    assert figures["wrong_refused"] > 0.4
    assert isinstance(JudgeHead.load(tmp_path / "judge"), JudgeHead)
    judged = generated(
        folder,
        *("--drafter", "jacobi", "--rule", "judge", "--rule-option", f"head={tmp_path / 'judge'}"),
    )
    assert judged["stats"]["rule"] == "judge"
    assert not judged["stats"]["lossless"]
    # A judge lets more of the same drafts pass.
    assert (
        judged["stats"]["forward_passes"]
        <= generated(folder, "--drafter", "jacobi")["stats"]["forward_passes"]
    )


def test_tokens_behind_an_error_are_left_out(folder: Path):
    network, tokenizer = load_text_model(str(folder))
    tokens = judged_tokens(
        network, tokenizer, [MarkedAnswer("Ab", "12Z45", "Z4"), MarkedAnswer("Ab", "12")]
    )
    assert tokens.fine.tolist() == [1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "line 1: expected"),
        ('{"prompt": "a", "answer": "b", "wrong": "c"}\n', "expected a part of the answer"),
        ("\n", "expected one marked answer per line"),
        ('{"prompt": "Ab", "answer": "12"}\n' * 12, "tokens of one kind only"),
    ],
)
def test_bad_marks(folder: Path, tmp_path: Path, text: str, message: str):
    file = tmp_path / "marked.jsonl"
    file.write_text(text)
    result, _, err = run(
        *("train-draft", "--model", str(folder), "--prompts", str(file), "--kind", "judge"),
        *("--out", str(tmp_path / "judge"), "--quiet"),
    )
    assert result.exit_code != 0
    assert message in err + str(result.exception)


def test_list_of_drafters_is_complete():
    assert {"prompt_lookup", "superposed"} <= set(arvision.list_drafters())


def test_stop_strings_keep_their_characters():
    from arvision.cli.generate import unescaped

    assert unescaped("é\u2028ü\\n\\t") == "é\u2028ü\n\t"
    assert unescaped(r"C:\\new \d") == "C:\\new \\d"
