"""Feature drafting (EAGLE-3): the unroll it learns on is what it does when it drafts; it learns; the text stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from text_models import greedy_reference, random_prompts, tiny_llama, walking_llama
from transformers import LlamaConfig

import arvision
from arvision import CheckpointError, InputError
from arvision.decoding.logits import Shaping
from arvision.decoding.tree import topology_of
from arvision.text import HFCausalLM
from arvision.text.drafters import Eagle3, PromptLookup, combine
from arvision.text.drafters.draft_tree import EXPANSIONS
from arvision.text.drafters.eagle3 import Eagle3Head, load_eagle3, save_eagle3
from arvision.text.drafters.features import FeatureState
from arvision.text.drafters.heads import make_heads
from arvision.text.fitting.data import Answers, answer, read_texts
from arvision.text.fitting.eagle3 import (
    Eagle3Objective,
    Eagle3Training,
    make_eagle3,
    train_eagle3,
    unrolled_mask,
)
from arvision.text.fitting.heads import HeadObjective, HeadTraining
from arvision.text.generation import drafter_of
from arvision.training.loop import FitConfig


def random_head(vocab=64, drafted=20, width=32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"draft_vocab_size": drafted, "intermediate_size": 48}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=vocab, hidden_size=width, **heads, **sizes)
        head = Eagle3Head(config)
        head.lm_head.weight.data.mul_(20)
        torch.as_tensor(head.d2t).copy_(torch.arange(drafted) * (vocab // drafted - 1))
    return head.eval().double()


@pytest.mark.parametrize("expansion", sorted(EXPANSIONS))
def test_any_head_keeps_the_text_of_every_row(expansion):
    network, head = tiny_llama(), random_head()
    prompts = random_prompts([9, 6, 12])
    drafter = Eagle3(head, expansion=expansion)
    out = arvision.generate(network, prompts, drafter=drafter, max_new_tokens=30)
    assert out.tokens == [greedy_reference(network, ids, 30) for ids in prompts]
    assert set(head.vocabulary.tolist()) == set(range(0, 60, 3))


def test_a_tree_is_worth_what_its_paths_are_worth_alone():
    """Laws of a tree's nodes against chains, and both against a batch of other rows."""
    network, head = tiny_llama(), random_head(drafted=64)
    prompts = random_prompts([7, 4])
    model = HFCausalLM(network, 20)
    model.watched = head.watches(model)
    state, _ = model.start(prompts)
    given = (head, network.get_input_embeddings())

    def begun(rows):
        assert state.features is not None
        features = state.features[rows]
        feature_state = FeatureState(
            *given, [prompts[row] for row in rows], features, Shaping(), 40
        )
        feature_state.follow(first[rows], torch.ones(len(rows), dtype=torch.int64))
        return feature_state

    first = torch.tensor([[5, 0], [9, 0]])
    tree = torch.tensor([[5, 1, 2, 3], [9, 1, 2, 3]])
    both = begun([0, 1])
    both.extend(tree[:, :3], topology_of(torch.tensor([-1, 0, 0])))
    laws = both.extend(tree, topology_of(torch.tensor([-1, 0, 0, 2])))
    for row in range(2):
        alone = begun([row])
        alone.extend(tree[row : row + 1, [0, 2]])
        chain = alone.extend(tree[row : row + 1, [0, 2, 3]])
        torch.testing.assert_close(laws[row, [0, 2, 3]], chain[0], rtol=0, atol=1e-6)
        # Asked about all at once, levels are found one after another.
        at_once = begun([row]).extend(tree[row : row + 1, [0, 2, 3]])
        torch.testing.assert_close(at_once, chain, rtol=0, atol=1e-6)


def test_what_is_unrolled_in_training_is_what_drafts():
    network = tiny_llama().float()
    text = random_prompts([12], seed=3)[0]
    head = make_eagle3(network, torch.arange(64)).eval()
    training = Eagle3Training(num_steps=3, num_vocabulary=64)
    objective = Eagle3Objective(head, network, Answers([text], [4]), training)
    with torch.no_grad():
        outputs = objective.unroll(objective.inputs(torch.tensor([0]), torch.Generator()))
    model = HFCausalLM(network, 20)
    model.watched = head.watches(model)
    for known in (5, 8):
        state, _ = model.start([text[:known]])
        assert state.features is not None
        drafting = FeatureState(
            head, network.get_input_embeddings(), [text[:known]], state.features, Shaping(), 40
        )
        drafting.follow(torch.tensor([text[known:]]), torch.tensor([1]))
        laws = drafting.extend(torch.tensor([text[known : known + 3]]))[0]
        for step in range(3):
            unrolled = head.logits(outputs[step][0, known - 1 + step]).log_softmax(-1)
            # Features are kept in half precision for training.
            torch.testing.assert_close(laws[step], unrolled, rtol=0, atol=2e-2)
    sees = unrolled_mask(4, 2, torch.zeros(1))[0, 0] == 0
    assert sees[3].nonzero()[:, 0].tolist() == [0, 1, 4 + 2, 8 + 3]


@pytest.mark.parametrize("kind", ["hydra++", "clover", "chimera"])
def test_what_a_prefix_layer_reads_in_training_is_what_it_reads_when_it_drafts(kind):
    """Prompts of several lengths, rounds that end at different places, rows that leave."""
    network = tiny_llama().float()
    texts = random_prompts([14, 11, 13], seed=3)
    heads: Any = make_heads(kind, 32, 2)
    for parameter in heads.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    embedding, output = network.model.embed_tokens.weight, network.lm_head.weight
    examples = read_texts(network, Answers(texts, [1] * 3), 20, progress=False)
    training = HeadTraining(kind=kind, num_heads=2, num_vocabulary=64)
    objective = HeadObjective(heads, examples, embedding, output, training)
    with torch.no_grad():
        batch = examples.rows(torch.arange(3))
        read = objective.read(batch["texts"], batch["hidden"].float())
    features = batch["hidden"].float()
    state = FeatureState(
        heads,
        network.get_input_embeddings(),
        [text[:begin] for text, begin in zip(texts, (4, 1, 6), strict=True)],
        features[:, :6],
        lambda hidden: hidden,
        40,
    )
    rows, begin = torch.arange(3), torch.tensor([4, 1, 6])
    new = torch.stack(
        [batch["texts"][row, place : place + 8] for row, place in enumerate((4, 1, 6))]
    )
    lengths = torch.ones(3, dtype=torch.int64)
    for counts in ([1, 1, 1], [1, 3, 2], [2, 1, 1], [1, 2]):
        taken = torch.tensor(counts)
        if len(counts) < len(rows):
            keep = torch.tensor([0, 2])
            state.select(keep)
            rows, begin, new, lengths = rows[keep], begin[keep], new[keep], lengths[keep]
        if lengths.max() > 1 or counts != [1, 1, 1]:
            places = (begin + lengths - 1)[:, None] + torch.arange(3)
            state.take(features[rows[:, None], places.clamp(max=13)], taken)
            lengths = lengths + taken
        context = state.follow(new, lengths)
        expected = read[rows, begin + lengths - 2]
        torch.testing.assert_close(context, expected, rtol=0, atol=1e-5)
        tail = [texts[row][:end] for row, end in zip(rows, (begin + lengths).tolist(), strict=True)]
        assert state.before.tolist() == [
            ([text[0]] * 2 + text)[-heads.reach - 1 : -1] for text in tail
        ]


@pytest.fixture(scope="module")
def small():
    """A network of four tokens, and the joint law of three of them behind the prompt [0, 1]."""
    network = tiny_llama(vocab_size=4, num_hidden_layers=3, sharpness=1.0)
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
    ids = torch.cat([torch.tensor([0, 1]).expand(64, 2), texts], dim=1)
    with torch.no_grad():
        logp = network(ids).logits[:, 1:-1].log_softmax(-1)
    return network, logp.gather(2, texts[..., None])[..., 0].sum(1).exp()


@pytest.mark.parametrize(
    ("expansion", "rule"),
    [
        ("dyspec", "gumbel"),
        ("independent", "multi_round"),
        ("independent", "k_sequential"),
        ("distinct", "without_replacement"),
        ("beam", "without_replacement"),
        ("independent", "block"),
        ("independent", "independent"),
    ],
)
def test_every_rule_judges_a_feature_draft_exactly(small, expansion, rule):
    from arvision.testing import law_p_value

    network, joint = small
    is_chain = rule in ("block", "independent")
    head = random_head(vocab=4, drafted=3)
    drafter = Eagle3(head, expansion=expansion, branching=(1, 1) if is_chain else (2, 1))
    out = arvision.generate(
        network, [[0, 1]] * 600, drafter=drafter, rule=rule, temperature=1.0, max_new_tokens=3
    )
    found = (torch.tensor(out.tokens) * torch.tensor([16, 4, 1])).sum(1)
    assert law_p_value(found, joint) > 1e-5
    assert out.stats.tokens_per_pass > 1.05


def test_a_head_learns_resumes_and_keeps_the_text(tmp_path):
    network = walking_llama()
    answers = answer(
        network, random_prompts([6] * 48, seed=9), num_tokens=40, batch_size=24, progress=False
    )
    fit = FitConfig(steps=120, batch_size=16, learning_rate=1e-2, warmup=5, log_every=10)
    training = Eagle3Training(num_steps=3, num_vocabulary=60, fit=fit)
    figures = train_eagle3(network, answers, tmp_path / "a", training, progress=False)
    unseen = random_prompts([6] * 6, seed=10)
    expected = [greedy_reference(network, ids, 30) for ids in unseen]
    passes = []
    for head in (make_eagle3(network, torch.arange(60)), tmp_path / "a"):
        out = arvision.generate(network, unseen, drafter=Eagle3(head), max_new_tokens=30)
        assert out.tokens == expected
        passes.append(out.stats.tokens_per_pass)
    assert figures["agreement"][0] > 0.7
    assert passes[1] > passes[0] + 1.5
    plain = {"max_new_tokens": 30, "temperature": 0.9, "seed": 4}
    drawn = arvision.generate(network, unseen[:2], drafter=Eagle3(tmp_path / "a"), **plain)
    assert drawn.tokens == arvision.generate(network, unseen[:2], **plain).tokens


def test_the_published_layout_is_read_and_what_does_not_fit_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    network, head = tiny_llama(), random_head()
    save_eagle3(head, tmp_path / "head")
    assert drafter_of(tmp_path / "head") == ("eagle3", "head")
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    assert {key for key in tensors if not key.startswith("midlayer.")} == {
        "fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d",
    }  # fmt: skip
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    # As `speculators` names the layer, with a copy of the target's embeddings.
    renamed = {key.replace("midlayer.", "layers.0."): value for key, value in tensors.items()}
    renamed["embed_tokens.weight"] = torch.zeros(64, 32)
    save_file(renamed, tmp_path / "head" / "model.safetensors")
    loaded = load_eagle3(tmp_path / "head")
    for key, value in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    prompts = random_prompts([5])
    out = arvision.generate(
        network,
        prompts,
        drafter="eagle3",
        drafter_options={"head": tmp_path / "head"},
        max_new_tokens=8,
    )
    assert out.tokens == [greedy_reference(network, prompts[0], 8)]
    del renamed["fc.weight"]
    save_file(renamed, tmp_path / "head" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"fc\.weight"):
        load_eagle3(tmp_path / "head")
    with pytest.raises(CheckpointError, match="no EAGLE-3 head"):
        load_eagle3(tmp_path)
    with pytest.raises(InputError, match="a target of width 16: the model has 32"):
        arvision.generate(network, prompts, drafter=Eagle3(random_head(width=16)))
    with pytest.raises(InputError, match="unknown divergence"):
        Eagle3Training(divergence="l2")


def test_two_drafters_share_a_tree_and_compiled_targets_are_heard():
    network, head = tiny_llama(), random_head()
    prompts = random_prompts([9, 6])
    expected = [greedy_reference(network, ids, 30) for ids in prompts]
    both = combine(PromptLookup(), Eagle3(head))
    assert arvision.generate(network, prompts, drafter=both, max_new_tokens=30).tokens == expected
    compiled = torch.compile(network, backend="eager")
    out = arvision.generate(compiled, prompts, drafter=Eagle3(head), max_new_tokens=30)
    assert out.tokens == expected
