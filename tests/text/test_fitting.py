"""Drafts fitted on a frozen target: they learn, resume, load, and never change the text.

What is learnt is measured on prompts that no fit has seen, against the same module untrained, on a
target whose answers do not loop. Margins are half of the gains that were measured, or less.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from text_models import greedy_reference, random_prompts, tiny_llama, walk, walking_llama

import arvision
from arvision import CheckpointError, InputError
from arvision.testing import law_p_value
from arvision.text.drafters import HeadDrafter, PseudoDrafter
from arvision.text.drafters.heads import KINDS, load_heads, make_heads
from arvision.text.drafters.papers.pseudo import load_pseudo, make_pseudo, pseudo_layout
from arvision.text.fitting.data import (
    Answers,
    answer,
    frequent_tokens,
    head_examples,
    hidden_states,
)
from arvision.text.fitting.heads import HeadObjective, HeadTraining, train_heads
from arvision.text.fitting.pretrain import fresh_copy, own_texts, text_blocks
from arvision.text.fitting.pseudo import PseudoObjective, PseudoTraining, train_pseudo
from arvision.text.fitting.recipes import fit_draft
from arvision.text.fitting.small_model import (
    SmallModelObjective,
    SmallTraining,
    small_copy,
    train_small_model,
)
from arvision.training.loop import Chance, FitConfig

FIT = FitConfig(steps=120, batch_size=64, learning_rate=1e-2, warmup=5, log_every=10)


@pytest.fixture(scope="module")
def network():
    return walking_llama()


@pytest.fixture(scope="module")
def prompts():
    return random_prompts([6] * 24, seed=9)


@pytest.fixture(scope="module")
def answers(network, prompts):
    return answer(network, prompts, num_tokens=40, batch_size=8, progress=False)


@pytest.fixture(scope="module")
def unseen():
    return random_prompts([6] * 6, seed=10)


@pytest.fixture(scope="module")
def unseen_answers(network, unseen):
    return answer(network, unseen, num_tokens=40, batch_size=6, progress=False)


@pytest.fixture
def tokens_per_pass(network, unseen, unseen_answers):
    """Measures a drafter on greedy text of 30 tokens, which must be the target's own."""

    def measure(drafter, **options) -> float:
        out = arvision.generate(network, unseen, drafter=drafter, max_new_tokens=30, **options)
        assert out.tokens == [text[6:36] for text in unseen_answers.texts]
        return out.stats.tokens_per_pass

    return measure


def test_the_targets_answers_do_not_loop(unseen_answers):
    for text in unseen_answers.texts:
        # 39 steps, of which few are wrong and may jump back once.
        assert len(set(itertools.pairwise(text[6:]))) > 25


def test_answers_are_the_targets_own(network, prompts, answers):
    assert answers.texts[3] == prompts[3] + greedy_reference(network, prompts[3], 40)
    assert answers.starts == [6] * 24


def test_examples_hold_the_states_and_tokens_of_their_places(network, answers):
    examples = head_examples(network, answers, 2, progress=False)
    per_text = 40 - 2
    assert len(examples.places) == 24 * per_text
    states = hidden_states(network, answers.texts[1])
    # The first place of the second text: its prompt's last token; and the first text's last place.
    found = examples.rows(torch.tensor([per_text, per_text - 1]))
    assert found["tokens"].tolist() == [answers.texts[1][6:9], answers.texts[0][-3:]]
    torch.testing.assert_close(found["hidden"][0].float(), states[5:8], rtol=0, atol=2e-2)


@pytest.mark.parametrize("num_heads", [1, 4])
def test_every_hidden_state_is_stored_once(network, answers, num_heads):
    """Two bytes a number, however many heads look at it; nothing of the prompts."""
    examples = head_examples(network, answers, num_heads, progress=False)
    stored = sum(part.untyped_storage().nbytes() for part in (examples.hidden, examples.tokens))
    assert stored == 24 * 40 * (32 * 2 + 8)


def test_frequent_tokens(answers):
    common = frequent_tokens(answers, 5)
    assert len(common) == 5
    assert common.tolist() == sorted(common.tolist())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_heads_learn_resume_and_keep_the_text(
    kind, network, prompts, answers, unseen_answers, tokens_per_pass, tmp_path
):
    training = HeadTraining(kind=kind, num_heads=2, num_vocabulary=60, fit=FIT)
    train_heads(network, answers, tmp_path / "a", training, progress=False)
    fresh = make_heads(kind, 32, 2)
    heads, vocabulary = load_heads(tmp_path / "a")
    assert type(heads) is type(fresh)
    assert len(vocabulary) == 60
    examples = head_examples(network, unseen_answers, 2, progress=False)
    weights = network.model.embed_tokens.weight, network.lm_head.weight
    agreement = [
        HeadObjective(one, examples, *weights, training).agreement(torch.arange(6 * 38))[0]
        for one in (fresh, heads)
    ]
    assert agreement[1] > agreement[0] + 0.15
    for shape, margin in (("tree", 0.3), ("unit", 0.1)):
        passes = [
            tokens_per_pass(HeadDrafter(one, shape=shape, threshold=0.05))
            for one in (fresh, tmp_path / "a")
        ]
        assert passes[1] > passes[0] + margin
    plain = {"max_new_tokens": 30, "temperature": 0.9, "seed": 4}
    drawn = arvision.generate(network, prompts[:2], drafter=HeadDrafter(tmp_path / "a"), **plain)
    assert drawn.tokens == arvision.generate(network, prompts[:2], **plain).tokens


def test_an_interrupted_fit_ends_where_an_uninterrupted_one_does(network, answers, tmp_path):
    from arvision.training import loop

    training = HeadTraining(kind="medusa", num_heads=1, num_vocabulary=48, fit=FIT)
    whole = train_heads(network, answers, tmp_path / "whole", training, progress=False)
    fit = loop.fit

    def stops(objective, config, folder, **options):
        return fit(objective, config, folder, progress=options["progress"], stop_after=15)

    import arvision.text.fitting.heads as module

    module.fit = stops
    try:
        train_heads(network, answers, tmp_path / "part", training, progress=False)
    finally:
        module.fit = fit
    again = train_heads(network, answers, tmp_path / "part", training, progress=False)
    assert again["agreement"] == whole["agreement"]
    for a, b in zip(
        load_heads(tmp_path / "whole")[0].parameters(),
        load_heads(tmp_path / "part")[0].parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_online_updates_make_heads_better(network, prompts, tokens_per_pass):
    torch.manual_seed(0)
    heads = make_heads("hydra", 32, 2)
    drafter = HeadDrafter(copy.deepcopy(heads), online=1e-2, every=8)
    first = tokens_per_pass(HeadDrafter(heads))
    for _ in range(10):
        arvision.generate(network, prompts[:12], drafter=drafter, max_new_tokens=30)
    assert drafter.num_updates > 10
    assert tokens_per_pass(drafter) > first + 0.05


def test_pseudo_tokens_stand_behind_every_place():
    parents, owners, numbers = pseudo_layout(1, 2)
    assert parents == [-1, -1, 1, 0, 3]
    assert owners == [0, 1, 0, 0, 1, 1]
    assert numbers == [-1, -1, 0, 1, 0, 1]


@pytest.mark.parametrize("kind", ["ppd", "hidden_transfer"])
def test_pseudo_tokens_learn_and_keep_the_text(
    kind, network, prompts, answers, unseen_answers, tokens_per_pass, tmp_path
):
    fit = FitConfig(steps=60, batch_size=4, learning_rate=3e-2, warmup=3, log_every=1)
    training = PseudoTraining(kind=kind, num_guesses=2, num_places=8, length=40, fit=fit)
    before = [parameter.clone() for parameter in network.parameters()]
    figures = train_pseudo(network, answers, tmp_path / "p", training, progress=False)
    assert all(map(torch.equal, before, network.parameters()))
    log = (tmp_path / "p" / "fit" / "log.jsonl").read_text().splitlines()
    assert figures["loss"] < float(log[0].split('"loss": ')[1].split(",")[0])
    trained = load_pseudo(tmp_path / "p")
    fresh = make_pseudo(kind, 32, 2, trained.layer)
    # Two vectors of 32 numbers (ppd) cannot turn many guesses, but bring their laws nearer.
    losses = []
    for one in (fresh, trained):
        objective = PseudoObjective(one, network, unseen_answers, training)
        loss = objective(torch.arange(6), torch.Generator().manual_seed(0))["loss"]
        losses.append(loss.item())
    drafter = PseudoDrafter(trained)
    passes = [tokens_per_pass(one) for one in (PseudoDrafter(fresh), drafter)]
    assert losses[1] < losses[0] - (0.6 if kind == "ppd" else 3.0)
    assert passes[1] > passes[0] + (-0.1 if kind == "ppd" else 0.2)
    with pytest.raises(InputError, match=r"rule 'multi_round' with PseudoDrafter"):
        arvision.generate(
            network, prompts[:1], drafter=drafter, rule="multi_round", temperature=1.0
        )


def saved_draft(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(("on_policy", "divergence"), [(0.0, "forward_kl"), (0.5, "reverse_kl")])
def test_a_small_model_drafts_for_its_target(
    network, answers, tokens_per_pass, tmp_path, on_policy, divergence
):
    fit = FitConfig(steps=40, batch_size=4, learning_rate=1e-2, warmup=2)
    training = SmallTraining(share=0.5, fit=fit, on_policy=on_policy, divergence=divergence)
    figures = train_small_model(
        network, None, answers, tmp_path / "small", training, progress=False
    )
    assert figures["layers"] == 2
    passes = [
        tokens_per_pass("draft_model", drafter_options={"draft": one})
        for one in (small_copy(network, 0.5).eval(), saved_draft(tmp_path / "small"))
    ]
    assert passes[1] > passes[0] + 1.0


def test_on_policy_texts_have_the_prompts_and_the_drafts_own_law():
    """Two tokens behind a prompt of one, against the draft's law, which is not the target's."""
    target, draft = (
        tiny_llama(seed=seed, vocab_size=4, num_hidden_layers=2, sharpness=1.0) for seed in (0, 1)
    )
    num = 3000
    answers = Answers([[1, 0, 0]] * num, [1] * num)
    objective = SmallModelObjective(draft, target, answers, SmallTraining())
    texts = objective.inputs(torch.arange(num), torch.Generator())["texts"]
    chance = Chance(torch.Generator().manual_seed(3), torch.device("cpu"))
    own = torch.cat(objective.own(texts, [1] * num, chance))
    assert own.shape == (num, 3)
    assert bool((own[:, 0] == 1).all())
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    ids = torch.cat([torch.ones(16, 1, dtype=torch.int64), pairs], dim=1)

    def joint(network):
        with torch.no_grad():
            logp = network(ids).logits[:, :-1].log_softmax(-1)
        return logp.gather(2, pairs[..., None])[..., 0].sum(1).exp()

    found = own[:, 1] * 4 + own[:, 2]
    assert law_p_value(found, joint(draft)) > 1e-4
    assert law_p_value(found, joint(target)) < 1e-6


def test_pretraining_on_texts_helps_a_fresh_draft(network, answers, tokens_per_pass, tmp_path):
    """The same alignment, with and without pre-training on walks that no answer shows."""
    fit = FitConfig(steps=30, batch_size=4, learning_rate=5e-3, warmup=2)
    before = FitConfig(steps=200, batch_size=32, learning_rate=1e-2, warmup=5)
    training = SmallTraining(
        share=0.5, width=1.0, start="fresh", fit=fit, pretrain_fit=before, length=40
    )
    starts = torch.randint(64, (400, 2), generator=torch.Generator().manual_seed(5))
    blocks = walk(starts, 18)
    passes = []
    for name, own in (("plain", None), ("pretrained", blocks)):
        out = tmp_path / name
        train_small_model(network, None, answers, out, training, blocks=own, progress=False)
        drafter = {"draft": saved_draft(out)}
        passes.append(tokens_per_pass("draft_model", drafter_options=drafter))
    assert passes[1] > passes[0] + 0.5


def test_a_fresh_copy_is_narrower_and_runs():
    draft = fresh_copy(tiny_llama(), 0.5, 0.5)
    assert draft.config.hidden_size == 16
    assert draft.config.num_hidden_layers == 2
    assert draft(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)


def test_the_divergence_is_the_one_whose_pilot_suits_the_task(network, answers, tmp_path):
    fit = FitConfig(steps=40, batch_size=4, learning_rate=1e-2, warmup=2)
    for temperature, by in ((0.0, "agreement"), (0.7, "acceptance")):
        training = SmallTraining(share=0.5, fit=fit, divergence="auto", temperature=temperature)
        figures = train_small_model(network, None, answers, tmp_path / by, training, progress=False)
        pilots = figures["pilots"]
        assert len(pilots) == 4
        assert figures["divergence"] == max(pilots, key=lambda name: pilots[name][by])
        assert figures[by] > pilots[figures["divergence"]][by]


def test_own_texts_become_blocks(tmp_path):
    class Letters:
        eos_token_id = 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(letter) for letter in text]}

    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("def")
    texts = own_texts(tmp_path)
    assert text_blocks(texts, Letters(), 3).tolist() == [[97, 98, 99], [0, 100, 101]]
    with pytest.raises(InputError, match="texts of 8 tokens: expected at least 128"):
        text_blocks(texts, Letters())
    with pytest.raises(InputError, match="expected a file of text or a folder with some"):
        own_texts(tmp_path / "none")


def test_bad_input_has_one_clear_message(network, answers, tmp_path):
    with pytest.raises(CheckpointError, match="no heads of `arvision train-draft`"):
        load_heads(tmp_path)
    with pytest.raises(CheckpointError, match="no pseudo tokens"):
        load_pseudo(tmp_path)
    with pytest.raises(InputError, match="unknown kind of heads 'medussa': did you mean 'medusa'"):
        make_heads("medussa", 8, 2)
    with pytest.raises(InputError, match="unknown divergence"):
        HeadTraining(divergence="l2")
    with pytest.raises(InputError, match="heads of width 8: the model has 32"):
        arvision.generate(network, [[1, 2]], drafter=HeadDrafter(make_heads("medusa", 8, 2)))
    with pytest.raises(InputError, match="pseudo tokens of width 8"):
        arvision.generate(network, [[1, 2]], drafter=PseudoDrafter(make_pseudo("ppd", 8, 2, 0)))
    with pytest.raises(InputError, match="expected shorter prompts or longer answers"):
        train_pseudo(network, answers, tmp_path, PseudoTraining(length=8), progress=False)
    with pytest.raises(InputError, match="unknown start 'frech': did you mean 'fresh'"):
        SmallTraining(start="frech")
    with pytest.raises(InputError, match=r"on_policy 2, temperature 0\.0: expected a share"):
        SmallTraining(on_policy=2)
    with pytest.raises(InputError, match="on_policy with kind 'hydra': it would have no effect"):
        fit_draft("none", tmp_path / "none", tmp_path, "hydra", on_policy=0.5)
