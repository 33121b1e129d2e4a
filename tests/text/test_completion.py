"""Superposed decoding: k continuations from one pass per token, kept apart by n-grams."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from text_models import greedy_reference, random_prompts, text_folder, tiny_llama
from typer.testing import CliRunner

import arvision
from arvision import InputError
from arvision.cli import app
from arvision.text.drafters.papers.superposed import Draft, longer
from arvision.text.ngrams import NGrams, mixed

PROMPT = random_prompts([9])[0]


@pytest.fixture(scope="module")
def network():
    return tiny_llama()


def test_n_grams_count_what_follows_what():
    grams = NGrams([[1, 2, 3, 1, 2, 4], [2, 3]], weights=(0.25, 0.75))
    # After 2: 3 twice, 4 once; after (1, 2): 3 and 4 once each.
    found = grams.probabilities([9, 1, 2], [3, 4, 5])
    assert found.tolist() == pytest.approx([0.25 * 2 / 3 + 0.75 / 2, 0.25 / 3 + 0.75 / 2, 0])
    # No n-gram reaches from one text into another, or knows (7, 2).
    assert grams.probabilities([4], [2]).tolist() == [0]
    assert grams.probabilities([7, 2], [3]).tolist() == pytest.approx([0.25 * 2 / 3])
    assert NGrams([]).probabilities([1], [2]).tolist() == [0]
    logs = mixed([math.log(0.5), math.log(0.1)], found[[0, 2]], 0.3, 1e-4)
    assert logs[0] == pytest.approx(0.7 * math.log(0.5) + 0.3 * math.log(found[0]))
    assert logs[1] == pytest.approx(0.7 * math.log(0.1) + 0.3 * math.log(1e-4))


def test_the_best_of_all_drafts_with_all_tokens_stay():
    grams = NGrams([[1, 5], [2, 6]])
    drafts = [Draft((1,), -0.1), Draft((2,), -0.2), Draft((3,), -0.3, is_finished=True)]
    best = longer(drafts, [5, 6], [-0.7, -0.8], [grams], [], num=3, alpha=0.5, delta=1e-6)
    # Each draft goes on with the token that its own text knows; the finished one is left alone.
    assert [draft.tokens for draft in best] == [(3,), (1, 5), (2, 6)]
    plain = longer(drafts, [5, 6], [-0.7, -0.75], [], [], num=3, alpha=0.5, delta=1e-6, ends=[6])
    assert [draft.tokens for draft in plain] == [(3,), (1, 5), (1, 6)]
    assert [draft.is_finished for draft in plain] == [True, False, True]


def test_k_continuations_cost_the_passes_of_one(network):
    out = arvision.complete(network, PROMPT, k=4, max_new_tokens=12)
    assert [len(row) for row in out.tokens] == [12] * 4
    assert len(set(map(tuple, out.tokens))) == 4
    assert out.scores == sorted(out.scores, reverse=True)
    assert out.stats.forward_passes == 11  # plain sampling of four takes 44, in rows or in turn
    assert out.stats.tokens == 48
    assert not out.stats.lossless
    assert out.texts is None


def test_the_first_tokens_are_the_models_likeliest(network):
    with torch.no_grad():
        law = network(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    best = law.topk(5)
    out = arvision.complete(network, PROMPT, k=5, max_new_tokens=1, ngrams=[[1, 2, 3]])
    assert [row[0] for row in out.tokens] == best.indices.tolist()
    assert out.scores == pytest.approx(best.values.tolist(), abs=1e-5)
    # One continuation is greedy decoding: its superposition is its own embedding.
    one = arvision.complete(network, PROMPT, k=1, max_new_tokens=12)
    assert one.tokens[0] == greedy_reference(network, PROMPT, 12)


def test_a_pass_reads_the_weighted_sum_of_the_last_embeddings(network):
    """The second tokens of two drafts, from the network itself."""
    embed = network.get_input_embeddings()
    with torch.no_grad():
        first = network(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1).topk(2)
        fed = embed(torch.tensor([PROMPT]))
        mixture = first.values.softmax(0) @ embed(first.indices)
        fed = torch.cat([fed, mixture[None, None]], dim=1)
        second = network(inputs_embeds=fed).logits[0, -1].log_softmax(-1).topk(2)
    sums = (first.values[:, None] + second.values).flatten()
    order = sums.argsort(descending=True)[:2].tolist()
    expected = [[int(first.indices[i // 2]), int(second.indices[i % 2])] for i in order]
    out = arvision.complete(network, PROMPT, k=2, max_new_tokens=2)
    assert out.tokens == expected
    assert out.scores == pytest.approx(sums[order].tolist(), abs=1e-5)


def test_n_grams_of_a_text_bring_its_words_into_the_continuations(network):
    """A text in which every token is followed by the next: known pairs become more frequent."""
    text = [list(range(64))] * 3

    def known(**options):
        rows = [
            row
            for ids in random_prompts([7] * 8, seed=4)
            for row in arvision.complete(network, ids, k=6, max_new_tokens=10, **options).tokens
        ]
        pairs = [b == a + 1 for row in rows for a, b in itertools.pairwise(row)]
        return sum(pairs) / len(pairs)

    assert known(ngrams=text, alpha=0.9) > known() + 0.1
    assert known(ngrams=text, alpha=0.0) == known()


def test_an_end_token_finishes_a_continuation_and_leaves_the_others(network):
    whole = arvision.complete(network, PROMPT, k=3, max_new_tokens=10)
    end = whole.tokens[0][4]
    config = network.generation_config
    config.eos_token_id = end
    try:
        out = arvision.complete(network, PROMPT, k=3, max_new_tokens=10)
    finally:
        config.eos_token_id = None
    assert any(row[-1] == end and len(row) < 10 for row in out.tokens)
    assert all(end not in row[:-1] for row in out.tokens)


def test_bad_input_is_named_before_the_first_pass(network):
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"k": 0}, "k 0"),
        ({"k": 65}, "k 65"),
        ({"alpha": 2}, "alpha 2: expected a number from 0 to 1"),
        ({"delta": 0}, "delta 0: expected a probability above 0"),
        ({"ngrams": ["text"]}, "ngrams are texts: pass tokenizer"),
        ({"ngrams": 7}, "ngrams 7: expected a file of text"),
        ({"ngrams": "none.txt"}, "ngrams none.txt"),
        ({"max_new_tokens": 10_000}, "positions"),
    ]
    for options, message in wrong:
        with pytest.raises(InputError, match=message):
            arvision.complete(network, PROMPT, **options)
    with pytest.raises(InputError, match="2 prompts: expected one, which gets 3"):
        arvision.complete(network, [PROMPT, PROMPT])


def test_the_command_prints_the_continuations(tmp_path):
    folder = text_folder(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("ABCABCABD\n")
    command = ["complete", "--model", str(folder), "--prompt", "ABCAB", "--max-new-tokens", "6"]
    known = ["--ngrams", str(tmp_path / "texts.txt"), "--k", "2"]
    result = CliRunner().invoke(app, [*command, *known, "--stats"])
    assert result.exit_code == 0, result.output
    assert "12 tokens, 5 passes" in result.output
    assert "(lossy)" in result.output
    found = json.loads(CliRunner().invoke(app, [*command, *known, "--json"]).stdout)
    assert [len(text) for text in found["texts"]] == [6, 6]
    with pytest.raises(InputError, match="--alpha"):
        CliRunner().invoke(app, [*command, "--alpha", "0.2"], catch_exceptions=False)
