"""`arvision generate` and `arvision train-draft` on a folder with a tiny language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from text_models import text_folder
from typer.testing import CliRunner

import arvision
from arvision import InputError
from arvision.cli import app
from arvision.prompt_files import read_prompts
from arvision.text import load_text_model
from arvision.text.fitting.judge import MarkedAnswer, judged_tokens
from arvision.text.fitting.recipes import questions
from arvision.text.rules.lossy import JudgeHead
from arvision.text.stop import stop_strings

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
        (("--drafter", "jacobi", "--option", "max_ngram=2"), "drafter 'jacobi': "),
        (("--rule", "block"), "--rule without --drafter"),
        (("--rule", "typical"), "--rule without --drafter"),
        (("--top-k", "5"), "--top-k at --temperature 0"),
        (("--top-p", "0.5"), "--top-p at --temperature 0"),
        (("--seed", "5"), "--seed at --temperature 0"),
        (
            ("--drafter", "jacobi", "--rule", "multi_round", "--rule-option", "a=1"),
            "rule_options a: at temperature 0",
        ),
        (("--prompts", "p.txt"), "expected either --prompt TEXT (repeatable) or --prompts FILE"),
    ):
        result, _, err = run("generate", "--model", str(folder), "--prompt", "A", *arguments)
        assert result.exit_code != 0
        assert message in err + str(result.exception)


@pytest.mark.parametrize("kind", ["hydra", "chimera", "medusa2"])
def test_trained_heads_draft_for_their_target(folder: Path, tmp_path: Path, kind: str):
    (tmp_path / "prompts.txt").write_text("Abc\nhello\nHello\nabcabc\n")
    result, out, err = run(
        *("train-draft", "--model", str(folder), "--prompts", str(tmp_path / "prompts.txt")),
        *("--json", "--kind", kind, "--steps", "4", "--batch-size", "16", "--quiet"),
        *("--out", str(tmp_path / "heads"), "--answer-tokens", "24"),
    )
    assert result.exit_code == 0, err
    target = folder if kind != "medusa2" else tmp_path / "heads" / "backbone"
    assert (kind == "medusa2") == ("target_changed" in json.loads(out))
    for verified_by in {folder, target}:
        with_heads = generated(verified_by, "--draft", str(tmp_path / "heads"))
        assert with_heads["texts"] == generated(verified_by)["texts"]


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "\ufeffAbc\r\n\r\nde\u2028f\n"),
        ("p.csv", '\ufeffid,prompt\r\n1,Abc\r\n2,"de\u2028f"\r\n'),
        ("p.tsv", "prompt\tid\nAbc\t1\n\nde\u2028f\t2\n"),
        ("p.jsonl", '{"prompt": "Abc"}\n\n"de\u2028f"\n'),
        ("p.json", '[{"prompt": "Abc"}, "de\u2028f"]'),
    ],
)
def test_prompts_of_a_file(folder: Path, tmp_path: Path, name: str, content: str):
    file = tmp_path / name
    file.write_bytes(content.encode())
    assert [record["prompt"] for record in read_prompts(file)] == ["Abc", "de\u2028f"]
    arguments = ("generate", "--model", str(folder), "--max-new-tokens", "8", "--json")
    result, out, err = run(*arguments, "--prompts", str(file))
    assert result.exit_code == 0, err
    _, wanted, _ = run(*arguments, "--prompt", "Abc", "--prompt", "de\u2028f")
    assert json.loads(out)["tokens"] == json.loads(wanted)["tokens"]


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c"])
def test_only_line_feeds_end_a_line(tmp_path: Path, end: str):
    for suffix in ("txt", "csv", "jsonl"):
        file = tmp_path / f"p.{suffix}"
        line = json.dumps(f"a{end}b", ensure_ascii=False) if suffix == "jsonl" else f"a{end}b"
        if suffix == "jsonl" and ord(end) < 32:  # not in JSON as it stands
            line = json.dumps(f"a{end}b")
        head = "prompt\n" if suffix == "csv" else ""
        file.write_bytes(f"{head}{line}\r\n{line}\n".encode())
        assert [record["prompt"] for record in read_prompts(file)] == [f"a{end}b"] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "id,text\n1,a\n", "columns id, text: expected one of them to be named prompt"),
        ("p.csv", "prompt,id\na\n", "line 2: 1 cells, expected 2"),
        ("p.csv", 'prompt\n"a\n', "expected a table"),
        ("p.csv", "prompt\n", "found none"),
        ("p.csv", "prompt,id\n,1\n", "record 1: an empty prompt"),
        ("p.jsonl", '{"text": "a"}\n', "prompt"),
        ("p.txt", "\n", "found none"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: str, message: str):
    file = tmp_path / name
    file.write_text(content)
    for arguments in (
        ("generate", "--model", "none", "--prompts", str(file)),
        ("train-draft", "--model", "none", "--prompts", str(file), "--out", str(tmp_path / "o")),
    ):
        result, _, err = run(*arguments)
        assert result.exit_code != 0
        assert message in err + str(result.exception)


def test_line_ends_in_prompts_to_train_on(tmp_path: Path):
    """A line of text may hold them in escaped form; what a table or JSON holds is as it is."""
    for name, content, wanted in (
        ("p.txt", "a\\nb\n", "a\nb"),
        ("p.csv", 'prompt\n"a\nb"\n', "a\nb"),
        ("p.jsonl", '{"prompt": "a\\\\nb"}\n', "a\\nb"),
    ):
        (tmp_path / name).write_text(content)
        assert questions(tmp_path / name) == [wanted]


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("model", "--num-heads"),
        ("ppd", "--divergence"),
        ("judge", "--answer-tokens"),
        ("judge", "--divergence"),
        ("acceptance", "--num-heads"),
        ("hydra", "--draft"),
    ],
)
def test_settings_that_mean_nothing_to_a_kind_are_refused(tmp_path: Path, kind: str, option: str):
    value = "forward_kl" if option == "--divergence" else "2"
    result, _, err = run(
        *("train-draft", "--model", "none", "--prompts", "none", "--out", str(tmp_path / "o")),
        *("--kind", kind, option, value),
    )
    name = option.removeprefix("--").replace("-", "_")
    assert result.exit_code != 0
    assert f"with kind '{kind}'" in err + str(result.exception)
    assert "it would have no effect" in err + str(result.exception)
    assert name in err + str(result.exception)


def test_special_tokens_as_stop_strings(folder: Path):
    """They never stand in a text, which is decoded without them."""
    network, tokenizer = load_text_model(str(folder))
    plain = arvision.generate(network, PROMPT, tokenizer=tokenizer, max_new_tokens=24)
    place = 5
    token = plain.tokens[0][place]
    letter = tokenizer.convert_ids_to_tokens(token)
    first = plain.tokens[0].index(token)
    tokenizer.add_special_tokens({"additional_special_tokens": [letter]})
    for stop in (letter, [letter, "\n\n"]):
        out = arvision.generate(
            network, PROMPT, tokenizer=tokenizer, max_new_tokens=24, stop=stop, drafter="jacobi"
        )
        assert out.tokens[0] == plain.tokens[0][: first + 1]
        assert letter not in (out.texts or [""])[0]
    with pytest.raises(InputError, match=f"the special token '{letter}' among other text"):
        arvision.generate(network, PROMPT, tokenizer=tokenizer, stop=f"x{letter}y")
    with pytest.raises(
        InputError, match=r"stop 5: expected strings \(ids belong to stop_token_ids"
    ):
        stop_strings([5], tokenizer)  # pyright: ignore
    # One that the tokenizer calls special among others: its end token.
    tokenizer.eos_token = letter
    assert stop_strings(letter, tokenizer) == ([], [token])
    assert stop_strings("ab", None) == (["ab"], [])


def test_figures_are_told_beside_json(folder: Path):
    result, out, err = run(
        *("generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "4"),
        *("--json", "--stats"),
    )
    assert result.exit_code == 0
    assert json.loads(out)["stats"]["tokens"] == 4
    assert "4 tokens" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sample --temperature 0 --top-k 5", "--top-k at --temperature 0: it would have no effect"),
        ("sample --temperature 0.0 --top-p 0.5", "--top-p at --temperature 0"),
        ("sample --window 4 --option window=8", "--window and --option window=...: expected one"),
        ("sample --height 64", "height 64: this model takes none"),
        ("sample --steps 2", "unknown option of sampler 'sjd': 'steps'"),
        (
            "eval generate --out OUT --protocol fashion --per-prompt 4",
            "per_prompt 4 without prompts",
        ),
        (
            "eval export --samples none --layout npz --out OUT.npz --prompts p",
            "--prompts with layout",
        ),
        (
            "eval export --samples none --layout npz --out OUT.npz --per-prompt 2",
            "--per-prompt with",
        ),
        (
            "train --recipe fashion-classifier --out OUT --card-samples 5",
            "card_samples with recipe",
        ),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, arguments: str, message: str):
    """Of the commands for pictures, too."""
    words = arguments.replace("OUT", str(tmp_path / "out")).split()
    if words[0] == "sample":
        words += ["--prompt", "bag", "--quiet"]
    if words[0] in ("sample", "eval") and "export" not in words:
        words += ["--model", "llamagen-fashion"]
    result, _, err = run(*words)
    assert result.exit_code != 0
    assert message in err + str(result.exception)
