"""How marked answers for a judge are made, and what a judge that learnt from them is worth."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from elsewhere import ELSEWHERE, Elsewhere
from text_models import text_folder
from typer.testing import CliRunner

from arvision import InputError
from arvision.cli import app
from arvision.decoding.noise import Noise
from arvision.decoding.verify import Round
from arvision.text import load_text_model
from arvision.text.fitting.judge import MarkedAnswer, calibrated, judged_tokens, train_judge
from arvision.text.fitting.marking import KnownAnswer, asked, derailed, exchanged
from arvision.text.rules.lossy import JudgeHead, judge
from arvision.training.loop import FitConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("model"))


def test_known_answers_are_exchanged_within_their_topic():
    known = [
        KnownAnswer("Capital of A?", "It is X.", "X", "towns"),
        KnownAnswer("Capital of B?", "It is Y.", "Y", "towns"),
        KnownAnswer("Colour of C?", "It is red.", "red", "colours"),
        KnownAnswer("Colour of D?", "It is blue.", "blue", "colours"),
    ]
    marked = exchanged(known, 2)
    assert marked[:2] == [
        MarkedAnswer("Capital of A?", "It is X."),
        MarkedAnswer("Capital of A?", "It is Y.", "Y"),
    ]
    assert len(marked) == 8
    with pytest.raises(InputError, match="topic 'towns': expected two keys"):
        exchanged(known[:1])
    with pytest.raises(InputError, match=r"key 'Z': expected a part of 'It is X\.'"):
        KnownAnswer("?", "It is X.", "Z")


def test_derailed_answers_begin_right_and_are_wrong_from_some_word_on():
    right = [MarkedAnswer("Capital of A?", "The capital is X."), MarkedAnswer("And B?", "It is Y.")]
    made = derailed([*right, MarkedAnswer("And C?", "No idea", "idea")], 3)
    assert len(made) == 6
    assert made == derailed(right, 3)
    for number, marked in enumerate(made):
        answer = {record.prompt: record.answer for record in right}[marked.prompt]
        assert marked.wrong is not None
        kept = marked.answer.removesuffix(marked.wrong)
        assert kept
        assert answer.startswith(kept)
        assert marked.answer.index(marked.wrong) == len(kept)
        tail = marked.wrong.split()
        if number % 2:
            assert set(tail) == {tail[0]}
            assert tail[0] != kept.split()[-1]
    with pytest.raises(InputError, match="expected right ones of two words"):
        derailed([MarkedAnswer("?", "Yes")])
    with pytest.raises(InputError, match="num 0: expected broken answers"):
        derailed(right, 0)


def test_people_are_asked_until_they_name_a_part_of_the_answer(folder):
    said = iter(["none of it", "", "-", None])
    seen = []

    def ask(prompt, answer):
        seen.append((prompt, answer))
        return next(said)

    options = {"max_new_tokens": 4, "num_answers": 1}
    marked = list(asked(str(folder), ["ABC", "BCD", "CDE", "DEF"], ask, **options))
    assert [prompt for prompt, _ in seen] == ["ABC", "ABC", "BCD", "CDE"]
    assert marked == [MarkedAnswer("ABC", seen[0][1])]


def test_the_commands_make_what_a_judge_learns_from(folder, tmp_path):
    facts = [
        {"prompt": f"{letter}?", "answer": f"{letter}{letter}={number}", "key": f"{number}"}
        for number, letter in enumerate("ABCDEFGH")
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    out = tmp_path / "marked.jsonl"
    files = ["--prompts", str(tmp_path / "facts.jsonl"), "--out", str(out)]
    result = CliRunner().invoke(app, ["mark-answers", *files, "--exchange", "2"])
    assert result.exit_code == 0, result.output
    assert len(out.read_text().splitlines()) == 24
    more = CliRunner().invoke(app, ["mark-answers", *files, "--exchange", "2", "--derail", "1"])
    assert more.exit_code == 0, more.output
    assert 24 < len(out.read_text().splitlines()) <= 32
    command = ["train-draft", "--model", str(folder), "--prompts", str(out), "--kind", "judge"]
    options = ["--steps", "5", "--out", str(tmp_path / "judge"), "--quiet"]
    assert CliRunner().invoke(app, [*command, *options]).exit_code == 0
    by_hand = tmp_path / "by_hand.jsonl"
    (tmp_path / "q.txt").write_text("ABC\nBCD\n")
    ask = ["mark-answers", "--prompts", str(tmp_path / "q.txt"), "--model", str(folder)]
    ask += ["--out", str(by_hand), "--max-new-tokens", "4"]
    for number in (1, 2):
        result = CliRunner().invoke(app, ask, input="\n")
        assert result.exit_code == 0, result.output
        assert len(by_hand.read_text().splitlines()) == number  # the second call asks the next
    with pytest.raises(InputError, match="either --model NAME or --exchange NUMBER"):
        CliRunner().invoke(app, ["mark-answers", *files], catch_exceptions=False)
    with pytest.raises(InputError, match="--derail without --exchange"):
        CliRunner().invoke(app, [*ask, "--derail", "1"], catch_exceptions=False)
    wrong = ["mark-answers", *files, "--exchange", "1", "--temperature", "1"]
    with pytest.raises(InputError, match="--temperature"):
        CliRunner().invoke(app, wrong, catch_exceptions=False)


def test_the_threshold_refuses_as_many_wrong_tokens_as_asked():
    scores = torch.tensor([3.0, 1.0, 2.0, -1.0, 4.0])
    fine = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0])
    one = float(torch.tensor(1.0, dtype=torch.float64).sigmoid())
    assert calibrated(scores, fine, 2 / 3) == pytest.approx(one, abs=1e-6)
    assert calibrated(scores, fine, 1 / 3) == 0.5
    assert calibrated(scores, torch.ones(5), 0.9) == 0.5


def test_a_trained_judge_is_better_than_an_untrained_one(folder, tmp_path):
    """Balanced accuracy on tokens of answers that the fit never saw; Z and [ are wrong."""
    generator = torch.Generator().manual_seed(0)
    answers = []
    for number in range(120):
        fine = "".join(chr(48 + int(k)) for k in torch.randint(32, (8,), generator=generator))
        wrong = "".join(chr(90 + int(k)) for k in torch.randint(2, (2,), generator=generator))
        marked = number % 2 == 1
        answers.append(MarkedAnswer("Abc", fine + wrong * marked, wrong if marked else None))
    network, tokenizer = load_text_model(str(folder))
    config = FitConfig(steps=150, batch_size=128, learning_rate=5e-3, warmup=5)
    figures = train_judge(
        network, tokenizer, answers[:100], tmp_path, config=config, progress=False
    )
    unseen = judged_tokens(network, tokenizer, answers[100:], progress=False)
    head = JudgeHead.load(tmp_path)
    assert head.threshold == pytest.approx(figures["threshold"])

    def accuracy(one):
        with torch.no_grad():
            called = one(unseen.hidden).sigmoid() > one.threshold
        shares = [(called[unseen.fine == kind] == bool(kind)).float().mean() for kind in (0, 1)]
        return float(sum(shares)) / 2

    torch.manual_seed(1)
    assert accuracy(head) > accuracy(JudgeHead(32)) + 0.2
    assert accuracy(head) > 0.75


@pytest.fixture
def chain():
    """Two drafts that the target would not choose; sigmoid(3) = 0.95, sigmoid(2) = 0.88."""
    laws = torch.tensor([[[0.1, 0.1, 0.8]] * 3]).log()
    hidden = torch.tensor([[[0.0], [3.0], [2.0]]])
    drafts, places = torch.tensor([[0, 1]]), torch.tensor([[0, 1, 2]])
    return Round(drafts, None, laws, places, Noise([0]), 1, hidden=hidden)


@pytest.fixture
def head():
    head = JudgeHead(1)
    head.threshold = 0.9
    with torch.no_grad():
        head.score.weight.fill_(1.0)
        head.score.bias.zero_()
    return head


def test_the_heads_own_threshold_counts_unless_another_is_given(chain, head):
    assert int(judge(head, is_greedy=True)(chain).counts[0]) == 2
    assert int(judge(head, 0.5, is_greedy=True)(chain).counts[0]) == 3
    with pytest.raises(InputError, match="threshold 1"):
        judge(head, 1.0)


def test_a_judge_goes_where_the_model_is(chain, head):
    """Laws and hidden states elsewhere (see tests/elsewhere.py), and a head on the CPU."""
    with Elsewhere():
        there = {
            name: getattr(chain, name).to(ELSEWHERE)
            for name in ("drafts", "target", "positions", "hidden")
        }
        verdict = judge(head, is_greedy=True)(replace(chain, **there))
        assert verdict.counts.device == head.score.weight.device == ELSEWHERE
        assert verdict.counts.tolist() == [2]
