"""Drafts fitted on a frozen target: they learn, resume, load, and never change the text.

What is learnt is measured on prompts that no fit has seen, against the same module untrained, on a
target whose answers do not loop. Margins are half of the gains that were measured, or less.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from forms import slow
from text_models import greedy_reference, random_prompts, tiny_llama, walk, walking_llama

import arvision
from arvision import CheckpointError, InputError
from arvision.decoding.tree import best_tree
from arvision.testing import law_p_value
from arvision.text import HFCausalLM
from arvision.text.drafters import DraftTree, Eagle3, HeadDrafter
from arvision.text.drafters.head_drafter import RANKS
from arvision.text.drafters.heads import KINDS, PrefixHeads, load_heads, make_heads, save_heads
from arvision.text.drafters.mtp import read_mtp
from arvision.text.fitting.data import (
    Answers,
    answer,
    frequent_tokens,
    head_examples,
    hidden_states,
    read_texts,
)
from arvision.text.fitting.eagle3 import Eagle3Training, make_eagle3
from arvision.text.fitting.heads import HeadObjective, HeadTraining, train_heads
from arvision.text.fitting.medusa2 import Medusa2Training, train_medusa2
from arvision.text.fitting.mtp import train_mtp
from arvision.text.fitting.pretrain import fresh_copy, own_texts, text_blocks
from arvision.text.fitting.recipes import fit_draft
from arvision.text.fitting.small_model import (
    SmallModelObjective,
    SmallTraining,
    small_copy,
    train_small_model,
)
from arvision.text.generation import drafter_of
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


@pytest.mark.parametrize(
    "kind", [kind if kind in ("clover", "medusa") else slow(kind) for kind in sorted(KINDS)]
)
def test_heads_learn_resume_and_keep_the_text(
    kind, network, prompts, answers, unseen_answers, tokens_per_pass, tmp_path
):
    fresh = make_heads(kind, 32, 2)
    reads = isinstance(fresh, PrefixHeads)
    fit = replace(FIT, batch_size=8) if reads else FIT
    training = HeadTraining(kind=kind, num_heads=2, num_vocabulary=60, fit=fit)
    train_heads(network, answers, tmp_path / "a", training, progress=False)
    heads, vocabulary = load_heads(tmp_path / "a")
    assert type(heads) is type(fresh)
    assert len(vocabulary) == 60
    if reads:
        examples = read_texts(network, unseen_answers, 192, least=3, progress=False)
    else:
        examples = head_examples(network, unseen_answers, 2, progress=False)
    weights = network.model.embed_tokens.weight, network.lm_head.weight
    accuracies = []
    for one in (fresh, heads):
        judge = HeadObjective(one, examples, *weights, training)
        accuracies.append(judge.accuracies(torch.arange(judge.num_items)))
    assert accuracies[1][0][0] > accuracies[0][0][0] + 0.15
    assert [len(row) for row in heads.accuracies] == [10, 10]
    assert heads.accuracies[0][0] > accuracies[0][0][0] + 0.15
    for shape, margin in (("tree", 0.3), ("unit", 0.1)):
        passes = [
            tokens_per_pass(HeadDrafter(one, shape=shape, threshold=0.05))
            for one in (fresh, tmp_path / "a")
        ]
        assert passes[1] > passes[0] + margin
    plain = {"max_new_tokens": 30, "temperature": 0.9, "seed": 4}
    drawn = arvision.generate(network, prompts[:2], drafter=HeadDrafter(tmp_path / "a"), **plain)
    assert drawn.tokens == arvision.generate(network, prompts[:2], **plain).tokens


def test_medusa2_trains_heads_and_a_copy_of_the_target(
    network, answers, unseen, tokens_per_pass, tmp_path
):
    """The copy stays near; with it the heads are worth more than those of a frozen target."""
    from transformers import AutoModelForCausalLM

    heads = HeadTraining(kind="medusa", num_heads=2, num_vocabulary=60, fit=FIT)
    joint = replace(FIT, steps=60, batch_size=8, learning_rate=5e-3)
    training = Medusa2Training(heads=heads, fit=joint, weight=0.5)
    before = [parameter.clone() for parameter in network.parameters()]
    figures = train_medusa2(network, None, answers, tmp_path, training, progress=False)
    assert all(map(torch.equal, before, network.parameters()))
    assert figures["target_changed"]["same_token"] > 0.9
    assert 0 < figures["target_changed"]["divergence"] < 0.2
    first = tokens_per_pass(HeadDrafter(tmp_path / "heads"))
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone").eval()
    assert not torch.equal(changed.model.layers[1].mlp.up_proj.weight, before[1])
    out = arvision.generate(changed, unseen, drafter=HeadDrafter(tmp_path), max_new_tokens=30)
    assert out.tokens == [greedy_reference(changed, ids, 30) for ids in unseen]
    assert out.stats.tokens_per_pass > first + 0.35
    with pytest.raises(InputError, match="expected 'medusa'"):
        Medusa2Training(heads=HeadTraining(kind="hydra"))


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


def test_online_updates_make_heads_better_and_are_saved(
    network, prompts, tokens_per_pass, tmp_path
):
    torch.manual_seed(0)
    heads = make_heads("hydra", 32, 2)
    drafter = HeadDrafter(heads, online=1e-2, every=16, capacity=400)
    assert drafter.replay is not None
    before = [parameter.clone() for parameter in heads.parameters()]
    first = tokens_per_pass(HeadDrafter(heads))
    options = {"drafter": drafter, "max_new_tokens": 30}
    calls = [arvision.generate(network, prompts[:12], **options).stats for _ in range(12)]
    assert calls[-1].tokens_per_pass > calls[0].tokens_per_pass + 0.8
    # Drafts end in nearly every pass of a row, until they are mostly right.
    assert drafter.replay.num_updates > 40
    assert len(drafter.replay) == 400
    drafter.save(tmp_path)
    saved = tokens_per_pass(HeadDrafter(tmp_path))
    assert saved > first + 0.8
    assert all(map(torch.equal, before, heads.parameters()))


@pytest.mark.parametrize("kind", ["hydra", "chimera"])
def test_examples_are_the_places_where_drafts_ended_with_the_targets_laws(network, unseen, kind):
    torch.manual_seed(0)
    drafter = HeadDrafter(make_heads(kind, 32, 2), online=1e-2, every=500)
    (text,) = arvision.generate(network, unseen[:1], drafter=drafter, max_new_tokens=30).tokens
    assert drafter.replay is not None
    examples, whole = list(drafter.replay._kept), unseen[0] + text
    assert len(examples) > 10
    states = hidden_states(network, whole)
    for head, hidden, path, law in examples:
        ends = [
            place
            for place in range(7, len(whole))
            if whole[place - len(path) : place] == path.tolist() and law.argmax() == whole[place]
        ]
        assert ends
        if kind == "hydra":
            # What the head saw: the state that the root was drawn from.
            nearest = min(float((hidden - states[end - head - 2]).abs().max()) for end in ends)
            assert nearest < 1e-4


def test_online_updates_make_a_draft_model_better_and_are_saved(
    network, prompts, tokens_per_pass, tmp_path
):
    draft = HFCausalLM(small_copy(network, 0.5).eval(), 40)
    drafter = DraftTree(draft, "chain", 3, 3, online=5e-3, every=16, capacity=300)
    assert drafter.learner is not None
    first = tokens_per_pass(DraftTree(draft, "chain", 3, 3))
    for _ in range(6):
        arvision.generate(network, prompts[:12], drafter=drafter, max_new_tokens=30)
    assert drafter.learner.replay.num_updates > 15
    drafter.save(tmp_path)
    from transformers import AutoModelForCausalLM

    again = HFCausalLM(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), 40)
    saved = tokens_per_pass(DraftTree(again, "chain", 3, 3))
    assert saved > first + 0.35
    with pytest.raises(InputError, match=r"expected a rate in \(0, 1\), and float32"):
        DraftTree(HFCausalLM(small_copy(network, 0.5).bfloat16()), online=1e-3)
    with pytest.raises(InputError, match="expected a language model of transformers"):
        Eagle3(make_eagle3(network, torch.arange(60)), online=1e-3)


def test_the_tree_of_heads_follows_from_what_was_measured(tmp_path):
    """A first head that is always right and a second one that is right once in its second guess."""
    heads = make_heads("medusa", 32, 2)
    assert HeadDrafter(heads).ranks == RANKS
    heads.accuracies = ((1.0, 0.0), (0.5, 0.5))
    assert best_tree(HeadDrafter(heads).ranks, 3, 2).tolist() == [-1, 0, 0]
    assert HeadDrafter(heads, ranks=(0.9, 0.1)).ranks == (0.9, 0.1)
    save_heads(heads, torch.arange(4), tmp_path)
    assert load_heads(tmp_path)[0].accuracies == heads.accuracies
    heads.accuracies = ()
    save_heads(heads, torch.arange(4), tmp_path, accuracies=[[2.0]])
    with pytest.raises(CheckpointError, match=r"heads.json: accuracies.* 2.0: expected"):
        load_heads(tmp_path)
    # Of all trees of 4 candidates none has more expected tokens.
    by_level = ((0.6, 0.25, 0.1), (0.45, 0.3, 0.05))
    parents = best_tree(by_level, 4, 2).tolist()
    assert tree_value(parents, by_level) == pytest.approx(
        max(
            tree_value([-1, *rest], by_level)
            for rest in itertools.product((-1, 0, 1, 2), repeat=3)
            if all(above <= place for place, above in enumerate(rest))
        )
    )


def tree_value(parents, by_level):
    """Expected accepted drafts of a tree, if ranks are right with these probabilities; 0 if it has
    a candidate that the ranks do not speak of."""
    values, depths, seen = {-1: 1.0}, {-1: -1}, dict.fromkeys(range(-1, 9), 0)
    for node, parent in enumerate(parents):
        depths[node] = depths[parent] + 1
        if depths[node] >= len(by_level) or seen[parent] >= len(by_level[0]):
            return 0.0
        values[node] = values[parent] * by_level[depths[node]][seen[parent]]
        seen[parent] += 1
    return sum(values.values()) - 1


def saved_draft(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("on_policy", "divergence"), [(0.0, "forward_kl"), slow(0.5, "reverse_kl")]
)
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


@pytest.mark.parametrize(("temperature", "by"), [slow(0.0, "agreement"), (0.7, "acceptance")])
def test_the_divergence_is_the_one_whose_pilot_suits_the_task(
    network, answers, tmp_path, temperature, by
):
    fit = FitConfig(steps=40, batch_size=4, learning_rate=1e-2, warmup=2)
    training = SmallTraining(share=0.5, fit=fit, divergence="auto", temperature=temperature)
    figures = train_small_model(network, None, answers, tmp_path, training, progress=False)
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


def test_a_fitted_mtp_layer_drafts_from_the_published_layout(
    network, answers, tokens_per_pass, tmp_path
):
    before = [parameter.clone() for parameter in network.parameters()]
    passes, figures = [], {}
    for name, steps, rate in (("untrained", 1, 1e-9), ("trained", 60, 5e-3)):
        fit = FitConfig(steps=steps, batch_size=4, learning_rate=rate, warmup=1)
        training = Eagle3Training(num_steps=2, fit=fit)
        figures = train_mtp(network, answers, tmp_path / name, training, progress=False)
        passes.append(tokens_per_pass("mtp", drafter_options={"folder": tmp_path / name}))
    assert all(map(torch.equal, before, network.parameters()))
    assert len(figures["agreement"]) == 2
    assert passes[1] > passes[0] + 0.8
    assert drafter_of(tmp_path / "trained") == ("mtp", "folder")
    layout, tensors = read_mtp(tmp_path / "trained", 4)
    assert layout == "nextn"
    assert {"projection.weight", "block.self_attn.q_proj.weight"} <= tensors.keys()


def test_bad_input_has_one_clear_message(network, answers, tmp_path):
    with pytest.raises(CheckpointError, match="no heads of `arvision train-draft`"):
        load_heads(tmp_path)
    with pytest.raises(InputError, match="unknown kind of heads 'medussa': did you mean 'medusa'"):
        make_heads("medussa", 8, 2)
    with pytest.raises(InputError, match="unknown divergence"):
        HeadTraining(divergence="l2")
    with pytest.raises(InputError, match="heads of width 8: the model has 32"):
        arvision.generate(network, [[1, 2]], drafter=HeadDrafter(make_heads("medusa", 8, 2)))
    with pytest.raises(InputError, match="unknown start 'frech': did you mean 'fresh'"):
        SmallTraining(start="frech")
    with pytest.raises(InputError, match=r"on_policy 2, temperature 0\.0: expected a share"):
        SmallTraining(on_policy=2)
    with pytest.raises(InputError, match="on_policy with kind 'hydra': it would have no effect"):
        fit_draft("none", tmp_path / "none", tmp_path, "hydra", on_policy=0.5)
