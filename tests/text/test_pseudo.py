"""Pseudo tokens: their trees against enumeration, their passes against plain ones, fits that learn."""

from __future__ import annotations

import itertools

import pytest
import torch
from text_models import greedy_reference, random_prompts, repeating_llama, tiny_llama, walking_llama

import arvision
from arvision import CheckpointError, InputError
from arvision.decoding.transformers_cache import TextSizes
from arvision.testing import law_p_value
from arvision.text.drafters import PseudoDrafter
from arvision.text.drafters.papers.guess_tree import (
    best_size,
    dynamic_trees,
    gain,
    guesses_of,
    steady_gain,
    with_pseudo,
)
from arvision.text.drafters.papers.pseudo import load_pseudo, make_pseudo, save_pseudo
from arvision.text.fitting.data import answer
from arvision.text.fitting.pseudo import (
    PseudoObjective,
    PseudoTraining,
    guess,
    long_enough,
    train_pseudo,
)
from arvision.training.loop import FitConfig

ALPHA = 1e-5
RATES = ((0.6, 0.2, 0.1), (0.5, 0.2, 0.05))
MADE = {
    "ppd": {"num_ensemble": 2},
    "hidden_transfer": {"layers": (1, 2)},
    "lud": {"threshold": 0.3},
}


@pytest.fixture(scope="module")
def network():
    return walking_llama()


@pytest.fixture(scope="module")
def answers(network):
    return answer(network, random_prompts([6] * 24, seed=9), num_tokens=40, progress=False)


@pytest.fixture(scope="module")
def unseen(network):
    return answer(network, random_prompts([6] * 6, seed=10), num_tokens=40, progress=False)


def passes_of(network, unseen, drafter):
    """Tokens per pass on greedy text of 30 tokens, which must be the target's own."""
    pairs = list(zip(unseen.texts, unseen.starts, strict=True))
    prompts = [text[:start] for text, start in pairs]
    out = arvision.generate(network, prompts, drafter=drafter, max_new_tokens=30)
    assert out.tokens == [text[start : start + 30] for text, start in pairs]
    return out.stats.tokens_per_pass


def test_pseudo_tokens_stand_behind_their_places_in_chains_of_their_own():
    tree = with_pseudo([-1, -1], [2, 0, 1], num_members=2, most=2)
    # Two members behind the root, two steps each; then one step of both behind candidate 1.
    assert tree.parents == (-1, -1, -1, 2, -1, 4, 1, 1)
    assert tree.owners == (0, 1, 2, 0, 0, 0, 0, 2, 2)
    assert tree.numbers == (-1, -1, -1, 0, 1, 0, 1, 0, 0)
    assert tree.members == (0, 0, 0, 0, 0, 1, 1, 0, 1)
    assert tree.speakers.tolist() == [[[3, 5], [4, 6]], [[0, 0], [0, 0]], [[7, 8], [0, 0]]]


def test_the_gain_of_a_tree_is_what_drawing_outcomes_gives():
    parents = [-1, 0, -1, 2, 0]
    guesses = guesses_of(parents)
    assert guesses == [(0, 0), (1, 0), (0, 1), (1, 0), (1, 1)]
    total = 0.0
    # Which guess is right at each of the two places, or none of those that have a rate.
    for first, second in itertools.product(range(4), repeat=2):
        chance = [
            rates[k] if k < 3 else 1 - sum(rates)
            for rates, k in zip(RATES, (first, second), strict=True)
        ]
        right = (first, second)
        place, count = -1, 1
        for level in range(2):
            below = [
                n for n, p in enumerate(parents) if p == place and guesses[n][1] == right[level]
            ]
            if not below:
                break
            place, count = below[0], count + 1
        total += chance[0] * chance[1] * count
    assert gain(parents, RATES) == pytest.approx(total)


def test_pseudo_tokens_are_where_they_are_worth_the_most():
    trees = dynamic_trees(RATES, 9, 1)
    assert [tree.size <= 9 for tree in trees] == [True] * 3
    assert len(trees[0].guesses) == 0
    assert trees[0].carried == (2,)
    last = trees[2]
    assert len(last.guesses) >= 2
    # The likeliest ends carry more than the others, and every state is left for a better one.
    assert last.carried[0] + last.carried[1] >= 3
    assert steady_gain(trees, RATES) > steady_gain(dynamic_trees(RATES, 3, 1), RATES) > 1.3
    # Two members cost twice the places, and can be no better where rates are the same.
    assert steady_gain(dynamic_trees(RATES, 9, 2), RATES) < steady_gain(trees, RATES)


def test_the_size_follows_what_passes_cost():
    free = best_size(RATES, 1, lambda n: 1.0)
    dear = best_size(RATES, 1, lambda n: float(n) ** 0.5)
    assert free > dear
    assert best_size(RATES, 1, lambda n: float(n)) == 1


@pytest.mark.parametrize("kind", sorted(MADE))
def test_a_pass_with_pseudo_tokens_guesses_what_the_fit_saw(kind):
    """The loop's guesses are those of `guess`, which the fits learn by; each member stands alone."""
    network, ids = tiny_llama(), random_prompts([9])[0]
    torch.manual_seed(1)
    module = make_pseudo(kind, 32, 2, **MADE[kind])
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    drafter = PseudoDrafter(module, num_draft=16, threshold=0.0)
    seen: list[tuple[int, list[int]]] = []
    hear = drafter.hear

    def hearing(new, told):
        hear(new, told)
        if told and drafter._guesses is not None:
            seen.append((len(drafter.histories[0]) + len(drafter._fresh[0]), told[0]))
            guessed.append(drafter._guesses[0, :, 0].tolist())

    guessed: list[list[int]] = []
    drafter.hear = hearing
    out = arvision.generate(network, [ids], drafter=drafter, max_new_tokens=20)
    assert out.tokens == [greedy_reference(network, ids, 20)]
    text = ids + out.tokens[0]
    checked = 0
    for (length, (count,)), found in zip(seen, guessed, strict=True):
        # The last token of the text was drawn behind the accepted candidate, which carried these.
        if length >= len(text) or count < 2:
            continue
        with torch.no_grad():
            said, wanted = guess(network, module, torch.tensor([text[: length - 1]]), [length - 2])
        assert said[-1].argmax() == text[length - 1]
        assert wanted[0].argmax(-1).tolist() == found
        checked += 1
    assert checked > 3


def test_members_of_an_ensemble_see_only_their_own():
    """With one step each the mean of two members is that of two modules of one member."""
    network = tiny_llama()
    torch.manual_seed(0)
    both = make_pseudo("ppd", 32, 2, num_ensemble=2)
    both.embeddings.data.normal_()
    single = []
    for member in range(2):
        one = make_pseudo("ppd", 32, 2)
        one.embeddings.data.copy_(both.embeddings[:, member : member + 1])
        single.append(guess(network, one, torch.tensor([[3, 4, 5, 6]]), [1, 3])[1])
    found = guess(network, both, torch.tensor([[3, 4, 5, 6]]), [1, 3])[1]
    torch.testing.assert_close(found, (single[0] + single[1]) / 2)


def test_each_hidden_state_is_transferred_at_its_own_layer():
    network = tiny_llama()
    text = torch.tensor([[3, 4, 5, 6, 7]])
    found = []
    for layers in ((1, 1), (1, 3), (3, 1)):
        module = make_pseudo("hidden_transfer", 32, 2, layers=layers)
        seen = {}
        edits = module.edit(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[-1, -1, 0, 1]]))
        assert sorted(edits) == sorted(set(layers))
        hidden = torch.randn(1, 4, 32)
        for layer, change in edits.items():
            seen[layer] = (change(hidden) - hidden).abs().sum(-1)[0] > 0
        for number, layer in enumerate(layers):
            assert seen[layer][2 + number]
        found.append(guess(network, module, text, [3])[1])
    assert not torch.equal(found[0], found[1])
    # The first guess does not look at the second one.
    torch.testing.assert_close(found[0][:, 0], found[1][:, 0])
    with pytest.raises(InputError, match="expected 2, one for each guess"):
        make_pseudo("hidden_transfer", 32, 2, layers=(1,))


@pytest.mark.parametrize("kind", sorted(MADE))
def test_every_lossless_rule_keeps_the_law_or_refuses(kind):
    network = tiny_llama(vocab_size=4, num_hidden_layers=3, sharpness=1.0)
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
    ids = torch.cat([torch.tensor([0, 1]).expand(64, 2), texts], dim=1)
    with torch.no_grad():
        logp = network(ids).logits[:, 1:-1].log_softmax(-1)
    joint = logp.gather(2, texts[..., None])[..., 0].sum(1).exp()
    torch.manual_seed(0)
    module = make_pseudo(kind, 32, 2, **MADE[kind])
    options = {"temperature": 1.0, "max_new_tokens": 3}
    drafter = PseudoDrafter(module, num_draft=10, threshold=0.2)
    # Rows accept differently, so that one batch holds the trees of several states.
    out = arvision.generate(network, [[0, 1]] * 600, drafter=drafter, **options)
    plain = arvision.generate(network, [[0, 1]] * 600, **options)
    assert out.tokens == plain.tokens
    assert out.stats.forward_passes <= 2
    found = (torch.tensor(out.tokens) * torch.tensor([16, 4, 1])).sum(1)
    assert law_p_value(found, joint) > ALPHA
    with pytest.raises(InputError, match=r"rule 'multi_round' with PseudoDrafter"):
        arvision.generate(network, [[0, 1]], drafter=drafter, rule="multi_round", temperature=1.0)


@pytest.mark.parametrize("kind", ["ppd", "hidden_transfer"])
def test_pseudo_tokens_learn_and_keep_the_text(kind, network, answers, unseen, tmp_path):
    """Margins are half of the gains that were measured, or less."""
    if kind == "ppd":  # a few vectors cannot make a frozen network walk on
        network = repeating_llama()
        twice = [
            [ids * 2 for ids in random_prompts([5] * num, seed=num, vocab=32)] for num in (24, 6)
        ]
        answers, unseen = (answer(network, ids, num_tokens=36, progress=False) for ids in twice)
    fit = FitConfig(steps=50, batch_size=4, learning_rate=3e-2, warmup=3, log_every=1)
    training = PseudoTraining(
        kind=kind, num_guesses=2, num_ensemble=2, num_places=8, length=40, fit=fit
    )
    before = [parameter.clone() for parameter in network.parameters()]
    train_pseudo(network, answers, tmp_path / "p", training, progress=False)
    assert all(map(torch.equal, before, network.parameters()))
    trained = load_pseudo(tmp_path / "p")
    torch.manual_seed(0)
    fresh = training.make(TextSizes.of(network))
    losses, passes = [], []
    for one in (fresh, trained):
        objective = PseudoObjective(one, network, long_enough(unseen, 2, 40), training)
        losses.append(objective(torch.arange(6), torch.Generator().manual_seed(0))["loss"].item())
        passes.append(passes_of(network, unseen, PseudoDrafter(one, num_draft=16)))
    assert losses[1] < losses[0] - (0.1 if kind == "ppd" else 2.0)
    assert passes[1] > passes[0] + 0.3
    # Measured acceptances came with the fit, and with them another tree than the constant's.
    assert trained.ranks[0, 0] > 0.15
    trees = [PseudoDrafter(one, num_draft=16) for one in (fresh, trained)]
    shapes = []
    for drafter in trees:
        arvision.generate(network, [[1, 2]], drafter=drafter, max_new_tokens=2)
        shapes.append([tree.parents for tree in drafter.trees(16)])
    assert shapes[0] != shapes[1]


def test_the_size_is_chosen_from_a_cost_table(network, unseen):
    module = make_pseudo("ppd", 32, 2)
    for seconds, least, most in ((1.0, 20, 64), (0.0, 2, 2)):
        table = {1: 1.0, 64: 1.0 + 100.0 * (1.0 - seconds)}
        drafter = PseudoDrafter(module, cost_table=table)
        out = arvision.generate(network, [unseen.texts[0][:6]], drafter=drafter, max_new_tokens=20)
        assert least <= max(out.stats.windows) <= most


def test_bad_input_has_one_clear_message(network, answers, tmp_path):
    with pytest.raises(CheckpointError, match="no pseudo tokens"):
        load_pseudo(tmp_path)
    with pytest.raises(InputError, match="pseudo tokens of width 8"):
        arvision.generate(network, [[1, 2]], drafter=PseudoDrafter(make_pseudo("ppd", 8, 2)))
    deep = make_pseudo("hidden_transfer", 32, 1, layers=(9,))
    with pytest.raises(InputError, match="pseudo tokens of layer 9: the model has 4 layers"):
        arvision.generate(network, [[1, 2]], drafter=PseudoDrafter(deep))
    with pytest.raises(InputError, match="unknown shape 'bush'"):
        PseudoDrafter(make_pseudo("ppd", 8, 2), shape="bush")
    with pytest.raises(InputError, match="expected shorter prompts or longer answers"):
        train_pseudo(network, answers, tmp_path, PseudoTraining(length=8), progress=False)
    module = make_pseudo("lud", 8, 2, threshold=0.4)
    save_pseudo(module, tmp_path)
    assert load_pseudo(tmp_path).threshold == 0.4
