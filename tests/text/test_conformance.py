"""Every rule with every way of drafting: the enumerated law, or a refusal before the first pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from forms import short_where, slow
from text_models import tiny_llama

import arvision
from arvision import InputError
from arvision.decoding import verify
from arvision.decoding.logits import Shaping
from arvision.decoding.loop import FixedWindow, decode_tokens
from arvision.decoding.run import Run
from arvision.testing import DroppingTableModel, law_p_value
from arvision.text import HFCausalLM
from arvision.text.drafters import DRAFTERS, HeadDrafter
from arvision.text.drafters.draft_tree import DRAWN, EXPANSIONS, DraftTree
from arvision.text.drafters.heads import KINDS, make_heads
from arvision.text.rules import RULES, choose_rule
from arvision.text.rules.block import block_verification

ALPHA = 1e-5
LOSSLESS = sorted(name for name, entry in RULES.items() if entry.lossless and name != "greedy")
TREES = {"wide": (3, 2, 1), "chain": (1, 1, 1)}
PYTHON = ("dyspec",)
"""Expansions that grow row by row: fewer rows, so that the product stays a matter of seconds."""


def drafted(rule, drafter, num):
    target = DroppingTableModel(seed=3)
    out = decode_tokens(
        target,
        [[0]] * num,
        Run(num, target.num_tokens, [(5, row) for row in range(num)]),
        drafter=drafter,
        rule=rule,
        shape=Shaping(),
        policy=FixedWindow(drafter.num_draft + 1),
    )
    return law_p_value(target.number(out.tokens), target.joint(Shaping()))


@pytest.mark.parametrize("num", [pytest.param(2_500, id="short"), slow(10_000, id="long")])
@pytest.mark.parametrize(
    ("expansion", "tree"),
    # Chains are for the rules that judge nothing else.
    short_where(
        lambda expansion, tree: tree == "wide" or expansion == "independent",
        product(sorted(EXPANSIONS), TREES),
    ),
)
def test_every_rule_judges_a_draft_model_exactly_or_refuses(expansion, tree, num):
    judged = []
    for name in LOSSLESS:
        draft = DroppingTableModel(seed=4, sharpness=1.0)
        drafter = DraftTree(draft, expansion, num_draft=5, branching=TREES[tree])
        try:
            chosen = choose_rule(name, drafter.draws, 1.0, branches=drafter.branches)
        except InputError:
            continue
        judged.append(name)
        assert chosen.lossless
        num = 500 if expansion in PYTHON else num
        assert drafted(chosen.rule, drafter, num) > ALPHA, name
    assert (
        {"independent", "block", "maximal"} <= set(judged)
        or drafter.branches
        or (drafter.draws == "chosen")
    )
    assert "gumbel" in judged


@pytest.mark.parametrize("rule", ["independent", "maximal", "block"])
def test_a_rule_for_chains_refuses_a_tree_before_the_first_pass(rule):
    network = tiny_llama()
    calls = []
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    options: dict[str, Any] = {
        "drafter": "draft_model",
        "drafter_options": {"draft": tiny_llama(seed=1), "expansion": "independent"},
        "temperature": 1.0,
        "max_new_tokens": 8,
    }
    with pytest.raises(InputError, match=f"rule '{rule}' cannot judge drafts that are trees"):
        arvision.generate(network, [[1, 2]], rule=rule, **options)
    assert not calls
    options["drafter_options"]["branching"] = (1, 1)
    assert arvision.generate(network, [[1, 2]], rule=rule, **options).stats.lossless
    # At temperature 0 every lossless rule is the greedy one, which judges any drafts.
    options |= {"temperature": 0.0, "drafter": "prompt_lookup", "drafter_options": None}
    assert arvision.generate(network, [[1, 2]], rule=rule, **options).stats.rule == "greedy"


@pytest.mark.parametrize(
    "rule", [verify.independent_redraw, verify.maximal_coupling, block_verification]
)
def test_a_rule_for_chains_refuses_what_it_cannot_judge_in_the_loop_too(rule):
    draft = DroppingTableModel(seed=4)
    with pytest.raises(InputError, match="judges chains and the drafts branch"):
        drafted(rule, DraftTree(draft, "independent", branching=(2, 1)), 10)
    with pytest.raises(InputError, match="the laws that drafts were drawn from"):
        drafted(rule, DraftTree(draft, "chain", num_draft=3), 10)


@pytest.fixture(scope="module")
def small():
    """A network of four tokens, and the joint law of three of them behind the prompt [0, 1]."""
    network = tiny_llama(vocab_size=4, num_hidden_layers=2, sharpness=1.0)
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
    ids = torch.cat([torch.tensor([0, 1]).expand(64, 2), texts], dim=1)
    with torch.no_grad():
        logp = network(ids).logits[:, 1:-1].log_softmax(-1)
    return network, logp.gather(2, texts[..., None])[..., 0].sum(1).exp()


NEEDS_A_MODEL = {"draft_model", "eagle3", "heads", "mtp", "parallel", "pseudo", "retrieved"}
"""Drafters with tests of their law in files of their own, or among those that are made."""


def heads(kind: str, **options: Any) -> HeadDrafter:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = make_heads(kind, 32, 2)
        for parameter in made.parameters():  # of which some are 0 at first
            parameter.data += 0.1 * torch.randn_like(parameter)
    return HeadDrafter(made.double(), **options)


MADE: dict[str, Callable[[], Any]] = {kind: partial(heads, kind) for kind in KINDS} | {
    f"{kind}, online": partial(heads, kind, online=1e-2, every=4) for kind in ("hydra", "clover")
}
"""Drafters that are made of something."""

CHOOSING = sorted(entry.name for entry in DRAFTERS if entry.name not in NEEDS_A_MODEL)


@pytest.mark.parametrize("num", [pytest.param(250, id="short"), slow(600, id="long")])
@pytest.mark.parametrize("drafter", [*CHOOSING, *MADE])
def test_every_rule_judges_every_chosen_draft_exactly_or_refuses(small, drafter, num):
    network, joint = small
    judged = []
    drafter = MADE[drafter]() if drafter in MADE else drafter
    for name in LOSSLESS:
        try:
            out = arvision.generate(
                network,
                [[0, 1]] * num,
                drafter=drafter,
                rule=name,
                temperature=1.0,
                max_new_tokens=3,
            )
        except InputError:
            continue
        judged.append(name)
        found = (torch.tensor(out.tokens) * torch.tensor([16, 4, 1])).sum(1)
        assert law_p_value(found, joint) > ALPHA, name
    assert judged
    assert not {"independent", "block", "maximal"} & set(judged)
    replay = getattr(drafter, "replay", None)
    assert replay is None or replay.num_updates > 1


@pytest.mark.parametrize("num", [pytest.param(150, id="short"), slow(400, id="long")])
@pytest.mark.parametrize("expansion", sorted(EXPANSIONS))
def test_every_rule_judges_a_draft_that_learns_meanwhile(small, expansion, num):
    network, joint = small
    draft = HFCausalLM(tiny_llama(seed=2, vocab_size=4, num_hidden_layers=1, sharpness=1.0), 3)
    for tree in ((2, 1), (1, 1)):
        drafter = DraftTree(draft, expansion, 4, 2, tree, online=1e-2, every=4)
        if expansion not in DRAWN and tree == (1, 1):
            continue  # these do not ask for it
        learner, before = drafter.learner, 0
        assert learner is not None
        for name in LOSSLESS:
            options: dict[str, Any] = {"drafter": drafter, "rule": name, "temperature": 1.0}
            try:
                out = arvision.generate(network, [[0, 1]] * num, max_new_tokens=3, **options)
            except InputError:
                continue
            found = (torch.tensor(out.tokens) * torch.tensor([16, 4, 1])).sum(1)
            assert law_p_value(found, joint) > ALPHA, name
            assert learner.replay.num_updates > before
            before = learner.replay.num_updates


@pytest.mark.parametrize("rule", ["gumbel", "independent", "block", "multi_round"])
def test_rules_judge_a_draft_on_a_shortened_context_exactly(small, rule):
    network, joint = small
    num = 600
    draft = tiny_llama(seed=1, vocab_size=4, num_hidden_layers=2, sharpness=1.0)
    out = arvision.generate(
        network,
        [[0, 1]] * num,
        drafter="retrieved",
        drafter_options={"draft": draft, "context_tokens": 2, "chunk": 1, "num_draft": 3},
        rule=rule,
        temperature=1.0,
        max_new_tokens=3,
    )
    assert out.stats.lossless
    found = (torch.tensor(out.tokens) * torch.tensor([16, 4, 1])).sum(1)
    assert law_p_value(found, joint) > ALPHA
