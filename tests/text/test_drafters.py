"""Drafters: what each proposes, and that the target's law or text stays what it was."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from forms import by_draws, covered
from text_models import greedy_reference, random_prompts, tiny_llama

import arvision
from arvision import InputError
from arvision.decoding.logits import Shaping
from arvision.decoding.loop import FixedWindow, decode_tokens
from arvision.decoding.noise import Noise
from arvision.decoding.run import Run
from arvision.decoding.tree import TokenTree, best_tree, join_rows, topology, without_padding
from arvision.testing import DroppingTableModel, law_p_value
from arvision.text.drafters import (
    DraftTree,
    InputCopy,
    LayerSkip,
    NestedExit,
    PromptLookup,
    Superposed,
    TrigramDrafter,
)
from arvision.text.drafters.base import Trie, union
from arvision.text.drafters.draft_tree import EXPANSIONS
from arvision.text.drafters.papers import trigram
from arvision.text.drafters.papers.layer_skip import expected_improvement
from arvision.text.drafters.papers.trigram import Trigrams
from arvision.text.rules import choose_rule

ALPHA = 1e-4
DRAWN = 20_000
"""Texts in which the mutant of drawn trees is found."""


def proposed(drafter, prompt, num, new=()):
    """Tokens and parents that a drafter proposes after a prompt and some final tokens."""
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    tokens[0, : len(new)] = torch.tensor(new)
    drafter.start(Noise([0]), 64, 64)
    drafter.attach(None, [prompt])
    tree = drafter.propose(tokens, torch.tensor([len(new)]), num, 1)
    parents = tree.parents
    return tree.tokens[0].tolist(), None if parents is None else parents.tolist()


def test_lookup_copies_what_followed_the_longest_match():
    drafter = PromptLookup(max_branches=1)
    assert proposed(drafter, [1, 2, 3, 4, 9, 2, 5, 1, 2], 3, [3]) == ([4, 9, 2], None)
    # A text that repeats itself goes on doing so.
    assert proposed(drafter, [7, 8, 7], 5, [8]) == ([7, 8, 7, 8, 7], None)
    assert proposed(drafter, [1, 2], 3, [3]) == ([], None)


def test_lookup_branches_where_matches_differ():
    drafter = PromptLookup(max_ngram=2)
    tokens, parents = proposed(drafter, [1, 2, 3, 4, 1, 2, 5, 6, 1], 8, [2])
    assert parents is not None
    assert [t for t, p in zip(tokens, parents, strict=True) if p < 0] == [5, 3]
    assert tokens[:5] == [5, 6, 1, 2, 5]
    assert len(tokens) == 8


def test_input_copy_follows_the_input_past_a_correction():
    drafter = InputCopy()
    prompt = list(range(20, 40))
    assert proposed(drafter, prompt, 4, [20, 21, 22])[0] == [23, 24, 25, 26]
    # A token that is not in the input leaves the pointer; agreement moves it on.
    assert proposed(drafter, prompt, 3, [20, 21, 50, 24, 25])[0] == [26, 27, 28]


def test_a_union_keeps_both_trees_and_merges_their_common_paths():
    first = TokenTree(torch.tensor([[1, 2], [4, -1]]))
    second = TokenTree(torch.tensor([[1, 3, 5], [4, 6, -1]]), parents=torch.tensor([-1, 0, -1]))
    tree = union(first, second, 10)

    def paths(row):
        tokens, parents = tree.tokens[row].tolist(), tree.parents
        assert parents is not None
        shape = topology(tuple(parents[row].tolist()), torch.device("cpu"))
        return {
            tuple(tokens[a] for a in shape.ancestors[node].nonzero()[:, 0].tolist())
            for node in range(len(tokens))
            if tokens[node] >= 0
        }

    assert paths(0) == {(1,), (1, 2), (1, 3), (5,)}
    assert paths(1) == {(4,), (4, 6)}
    assert union(first, second, 3).tokens.shape[1] == 3


def test_rows_keep_their_own_trees_and_padding_leaves():
    cpu = torch.device("cpu")
    tree = join_rows([([1, 2, 5], [-1, -1, 0]), ([3, 4], [-1, 0])], cpu)
    assert tree.parents is not None
    assert tree.parents.tolist() == [[-1, -1, 0], [-1, 0, 1]]
    assert tree.tokens.tolist() == [[1, 2, 5], [3, 4, -1]]
    chains = join_rows([([1, 2], [-1, 0]), ([], []), ([3], [-1])], cpu)
    assert (chains.parents, chains.tokens.tolist()) == (None, [[1, 2], [-1, -1], [3, -1]])
    alike = join_rows([([1, 2], [-1, -1]), ([3, 4], [-1, -1])], cpu)
    assert alike.parents is not None
    assert alike.parents.tolist() == [-1, -1]
    left = without_padding(np.array([[1, -1, 2]]), np.array([-1, -1, 0]), cpu)
    assert left.tokens.tolist() == [[1, 2]]
    assert left.parents is not None
    assert left.parents.tolist() == [-1, 0]
    with pytest.raises(InputError, match="candidate 0 has parent 1"):
        TokenTree(torch.tensor([[1, 2]]), parents=torch.tensor([1, -1]))


def test_the_best_tree_holds_the_largest_products():
    acceptance = (0.6, 0.3, 0.05)
    parents = best_tree(acceptance, 6, 3).tolist()
    value: dict[int, float] = {-1: 1.0}
    counts: dict[int, int] = {}
    for node, parent in enumerate(parents):
        value[node] = value[parent] * acceptance[counts.get(parent, 0)]
        counts[parent] = counts.get(parent, 0) + 1
    every = sorted(
        (a * b * c for a in acceptance for b in (1.0, *acceptance) for c in (1.0,)), reverse=True
    )
    assert sum(value.values()) - 1.0 >= sum(every[:4])
    assert sorted(value.values(), reverse=True)[1:] == pytest.approx(
        [0.6, 0.36, 0.3, 0.216, 0.18, 0.18]
    )


def test_the_best_tree_follows_the_rates_of_its_levels():
    # Products: .5 (first guess), .45 below it, .3 (second guess), .27 below that, .025.
    parents = best_tree(((0.5, 0.3), (0.9, 0.05)), 5, 4).tolist()
    assert parents == [-1, 0, -1, 2, 0]
    assert best_tree(((0.5, 0.3), (0.9, 0.05)), 3, 1).tolist() == [-1, -1]


def test_a_trie_takes_no_more_than_its_room():
    trie = Trie(3)
    trie.add([1, 2])
    trie.add([1, 3, 4])
    assert trie.tree == ([1, 2, 3], [-1, 0, 0])


@by_draws
@pytest.mark.parametrize(
    ("expansion", "branching", "rule"),
    [
        ("independent", (2, 2), "multi_round"),
        ("independent", (3, 1), "k_sequential"),
        ("distinct", (2, 2), "without_replacement"),
        ("beam", (2, 2, 2), "without_replacement"),
        ("dyspec", (1,), "gumbel"),
        ("dyspec_drawn", (1,), "without_replacement"),
    ],
)
def test_draft_trees_keep_the_law(expansion, branching, rule, num):
    # Some grow row by row; a drawn tree has a mutant of its own below.
    num = {"dyspec": num // 30, "dyspec_drawn": DRAWN}.get(expansion, num)
    assert tree_p_value(expansion, branching, rule, num) > ALPHA


def tree_p_value(expansion, branching, rule, num):
    """How likely the tokens of `num` texts are under the enumerated law."""
    target = DroppingTableModel(seed=3)
    draft = DroppingTableModel(seed=4, sharpness=1.0)
    drafter = DraftTree(draft, expansion, num_draft=5, branching=branching)
    chosen = choose_rule(rule, drafter.draws, 1.0)
    out = decode_tokens(
        target,
        [[0]] * num,
        Run(num, target.num_tokens, [(3, row) for row in range(num)]),
        drafter=drafter,
        rule=chosen.rule,
        shape=Shaping(),
        policy=FixedWindow(drafter.num_draft + 1),
    )
    assert out.stats.tokens_per_pass > 1.4
    return law_p_value(target.number(out.tokens), target.joint(Shaping()))


def test_a_drawn_tree_that_is_cut_by_its_own_tokens_fails_the_test_of_the_law(monkeypatch):
    """The published dynamic tree is exact because a place is chosen before its token is drawn."""
    grow = DraftTree._drawn

    def cut(*arguments):
        _, values, tokens = grow(*arguments)
        return values, values, tokens

    monkeypatch.setattr(DraftTree, "_drawn", cut)
    assert tree_p_value("dyspec_drawn", (1,), "without_replacement", DRAWN) < ALPHA


@pytest.mark.parametrize("expansion", sorted(EXPANSIONS))
def test_a_draft_that_is_the_target_is_always_right(expansion):
    network = tiny_llama()
    prompts = random_prompts([9, 6])
    expected = [greedy_reference(network, ids, 30) for ids in prompts]
    for temperature in (0.0, 0.9):
        options: dict[str, Any] = {"max_new_tokens": 30, "temperature": temperature}
        plain = arvision.generate(network, prompts, **options)
        out = arvision.generate(
            network,
            prompts,
            drafter="draft_model",
            drafter_options={"draft": network, "expansion": expansion, "num_draft": 6},
            **options,
        )
        if temperature == 0:
            assert plain.tokens == expected
        if temperature == 0 or out.stats.rule == "gumbel":
            assert out.tokens == plain.tokens
        least = {"independent": 2.0, "distinct": 2.0, "beam": 2.0, "dyspec": 2.0}
        least["dyspec_drawn"] = 2.0
        assert out.stats.tokens_per_pass > least.get(expansion, 2.5)


def test_a_draft_of_another_vocabulary_is_refused():
    with pytest.raises(InputError, match="a vocabulary of 32 tokens: expected 64"):
        arvision.generate(
            tiny_llama(),
            random_prompts([3]),
            drafter="draft_model",
            drafter_options={"draft": tiny_llama(vocab_size=32)},
        )
    with pytest.raises(InputError, match="unknown expansion"):
        DraftTree(DroppingTableModel(), "bush")


def test_layer_skip_tries_sets_of_layers_and_leaves_the_cache_as_it_was():
    network = tiny_llama(num_hidden_layers=6)
    prompts = random_prompts([9, 6])
    expected = [greedy_reference(network, ids, 60) for ids in prompts]
    drafter = LayerSkip(skip=0.5, confidence=0.0, context=8, trials=5, bayes_every=2)
    out = arvision.generate(network, prompts, drafter=drafter, max_new_tokens=60)
    assert out.tokens == expected
    assert len(drafter._found) == 5
    assert len({bits for bits, _ in drafter._found}) > 1
    for bits, _ in drafter._found:
        attention, mlp = bits[:6], bits[6:]
        assert sum(bits) == 6
        assert all(part[0] and part[5] for part in (attention, mlp))
    assert any(bits[:6] != bits[6:] for bits, _ in drafter._found)
    layers = LayerSkip(skip=0.5, confidence=0.0, context=8, trials=5, whole=True)
    assert arvision.generate(network, prompts, drafter=layers, max_new_tokens=60).tokens == expected
    assert all(bits[:6] == bits[6:] and sum(bits) == 6 for bits, _ in layers._found)
    whole = LayerSkip(layers=range(6), confidence=0.0)
    out = arvision.generate(network, prompts, drafter=whole, max_new_tokens=60)
    assert out.tokens == expected
    assert out.stats.tokens_per_pass > 4.5


def test_expected_improvement_prefers_what_is_near_the_best_or_unknown():
    tried = np.array([[1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 1, 1]], dtype=float)
    gains = expected_improvement(
        tried, np.array([0.9, 0.1]), np.vstack([tried, 1 - tried[:1]]), 0.9
    )
    near = expected_improvement(
        tried, np.array([0.9, 0.1]), np.array([[1, 1, 0, 0, 1, 0, 1, 0.0]]), 0.9
    )
    assert near[0] > gains[1]


def test_superposed_paths_are_the_beam_where_one_path_is_fed():
    """One path with the whole target is greedy decoding; several are worth no less per pass."""
    network, ids = tiny_llama(), random_prompts([8, 5])
    one = arvision.generate(
        network,
        ids,
        drafter=Superposed(num_paths=1, depth=4, skip=0.0, alpha=0.0),
        max_new_tokens=41,
    )
    assert one.stats.tokens_per_pass == pytest.approx(5, abs=0.01)
    passes = [
        arvision.generate(
            network,
            ids,
            drafter=Superposed(num_paths=k, depth=4, alpha=0.4),
            max_new_tokens=41,
        ).stats.forward_passes
        for k in (1, 4)
    ]
    assert passes[1] <= passes[0]
    with pytest.raises(InputError, match="alpha 2"):
        Superposed(alpha=2)


def test_nested_exits_stop_at_the_first_sure_one():
    network = tiny_llama()
    ids = random_prompts([9])
    for confidence in (0.0, 0.9):
        drafter = NestedExit(exits=(0.5, 1.0), confidence=confidence)
        out = arvision.generate(network, ids, drafter=drafter, max_new_tokens=40)
        assert out.tokens == [greedy_reference(network, ids[0], 40)]
    sure = arvision.generate(
        network, ids, drafter=NestedExit(exits=(1.0,), confidence=0.0), max_new_tokens=41
    )
    assert sure.stats.tokens_per_pass == 5.0
    with pytest.raises(InputError, match="ascending"):
        NestedExit(exits=(0.8, 0.2))


def test_trigrams_learn_from_the_corpus_and_the_text():
    text = [1, 2, 3, 4, 5] * 3
    drafter = TrigramDrafter(corpus=[text])
    tokens, _ = proposed(drafter, [9, 1], 4, [2])
    assert tokens == [3, 4, 5, 1]
    tokens, parents = proposed(TrigramDrafter(), [1, 2, 3, 1, 2, 4, 1], 4, [2])
    assert parents is not None
    assert {t for t, p in zip(tokens, parents, strict=True) if p < 0} == {3, 4}


def test_the_trigram_law_moves_towards_what_the_target_says():
    """Counts of a corpus are not moved by three new tokens; an adaptive law is."""
    for rate, expected in ((0.0, [3, 4]), (0.3, [4, 3])):
        trigrams = Trigrams(rate)
        for _ in range(100):
            trigrams.add([1, 2, 3])
        for _ in range(3):
            trigrams.add([1, 2, 4])
        law = trigrams.law(1, 2, 2)
        assert [token for token, _ in law] == expected
        assert sum(share for _, share in law) == pytest.approx(1.0)
        assert law[0][1] == pytest.approx(100 / 103 if rate == 0 else 1 - 0.7**3)


def test_the_search_for_drafts_explores_as_its_score_says():
    text = [1, 2, 3, 1, 2, 3, 1, 2, 4, 1]
    tokens, parents = proposed(TrigramDrafter(exploration=0.0, rate=0.0), text, 6, [2])
    assert parents is None  # the likeliest way only: a chain
    assert tokens[:2] == [3, 1]
    tokens, parents = proposed(TrigramDrafter(rate=0.0), text, 12, [2])
    assert parents is not None
    assert {t for t, p in zip(tokens, parents, strict=True) if p < 0} == {3, 4}
    node = trigram._Node([(3, 0.6), (4, 0.3), (5, 0.1)])
    node.visits, node.gains = [4, 1, 0], [1.0, 0.4, 0.0]
    weight = (1.25 + math.log((5 + 19653) / 19652)) * math.sqrt(5)
    scores = [0.25 + weight * 0.6 / 5, 0.4 + weight * 0.3 / 2, weight * 0.1]
    assert node.choose(1.0) == scores.index(max(scores)) == 1
    assert node.choose(0.0) == 1
    with pytest.raises(InputError, match="rate 1"):
        TrigramDrafter(rate=1)


def test_a_jacobi_window_comes_back_with_its_guesses():
    network = tiny_llama()
    ids = random_prompts([9])
    out = arvision.generate(network, ids, drafter="jacobi", max_new_tokens=60)
    assert out.tokens == [greedy_reference(network, ids[0], 60)]
    assert out.stats.tokens_per_pass > 1.0


@pytest.mark.parametrize(
    ("size", "expansion"), covered([56, 64, 80], ["dyspec", "independent", "beam"])
)
def test_a_draft_of_a_padded_vocabulary_drafts_what_both_know(size, expansion):
    network, draft = tiny_llama(), tiny_llama(seed=0, vocab_size=size)
    prompts = [[token % 50 for token in ids] for ids in random_prompts([9, 6])]
    options: dict[str, Any] = {
        "drafter": "draft_model",
        "drafter_options": {"draft": draft, "expansion": expansion},
        "max_new_tokens": 20,
    }
    expected = [greedy_reference(network, ids, 20) for ids in prompts]
    assert arvision.generate(network, prompts, **options).tokens == expected
    drawn = arvision.generate(network, prompts, temperature=1.0, **options)
    assert max(max(row) for row in drawn.tokens) < 64
    assert drawn.stats.lossless
