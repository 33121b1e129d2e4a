"""Passes of fixed shapes of transformers' models, and the law of a model that can be enumerated."""

from __future__ import annotations

import warnings
from inspect import signature
from typing import Any

import image_networks as nets
import pytest
import torch
from text_models import random_prompts, tiny_llama

import arvision
from arvision import get_sampler
from arvision.counting import count_calls
from arvision.decoding.fixed_step import Steps
from arvision.decoding.logits import Shaping
from arvision.decoding.loop import FixedWindow, decode_tokens
from arvision.decoding.run import Run
from arvision.decoding.tree import topology
from arvision.models import Chameleon, Emu3, GlmImage, Janus
from arvision.testing import DroppingTableModel, law_p_value
from arvision.text.drafters.draft_tree import EXPANSIONS, DraftTree
from arvision.text.drafters.head_drafter import HeadDrafter
from arvision.text.drafters.heads import MedusaHeads
from arvision.text.drafters.recycling import TokenRecycling
from arvision.text.rules import choose_rule


def emu3():
    return Emu3(nets.tiny_emu3(), grids=[(5, 3)]), nets.emu3_prompts((4, 6))


FAMILIES: dict[str, Any] = {
    "janus": lambda: (Janus(nets.tiny_janus(side=3)), nets.janus_prompts((5, 7))),
    "emu3": emu3,
    "chameleon": lambda: (
        Chameleon(nets.tiny_chameleon(), grids=[(4, 5)]),
        nets.chameleon_prompts((3, 5)),
    ),
    "glm": lambda: (GlmImage(nets.tiny_glm(), grids=[(2, 3), (4, 5)]), nets.glm_prompts((4, 6))),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_image_models_draw_what_the_loop_draws(name):
    model, prompts = FAMILIES[name]()
    for spec in (
        "sjd:window=4",
        "sjd:window=3:coupling=maximal",
        "sjd:window=7:tree=drift",
        "sjd:window=7:tree=static:coupling=maximal",
        "draft:max_draft=3:draft_guidance_scale=1:stop_threshold=1",
        "draft:max_draft=3:draft_guidance_scale=1:stop_threshold=0.5:coupling=maximal",
    ):
        sampler = get_sampler(spec)
        if sampler.needs:
            # Of another law by its guidance, where there is any.
            sampler = sampler.bind(draft=model)
        scale = 2.0 if model.has_guidance else 1.0
        options: dict[str, Any] = {"seeds": [0, (3, 1)], "guidance_scale": scale}
        loop = sampler(model, prompts, **options)
        fixed = sampler(model, prompts, **options, steps=Steps("eager"))
        assert (loop.stats.step, fixed.stats.step) == ("loop", "eager")
        assert torch.equal(fixed.tokens, loop.tokens)
        assert fixed.stats.commit_pass == loop.stats.commit_pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_ends_where_the_loop_ends_it(temperature):
    prompts = random_prompts((5, 9, 3))
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": temperature, "seed": 4}
    plain = arvision.generate(tiny_llama(), prompts, **options)
    for ends in ((), (plain.tokens[0][4],)):
        loop = arvision.generate(tiny_llama(), prompts, stop_token_ids=ends, **options)
        fixed = arvision.generate(
            tiny_llama(), prompts, stop_token_ids=ends, compile="eager", **options
        )
        assert (loop.stats.step, fixed.stats.step) == ("loop", "eager")
        assert fixed.tokens == loop.tokens
        assert fixed.stats.passes_per_row == loop.stats.passes_per_row
    assert len(fixed.tokens[0]) <= 5


def text_drafter(name):
    """Options of `generate` for a drafter whose drafts are a function of fixed shapes."""
    if name in ("tree", "unit"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            heads = MedusaHeads(32, 2).double()
        return {"drafter": HeadDrafter(heads, shape=name, threshold=0.02)}
    if name not in EXPANSIONS:
        return {"drafter": name}
    draft = tiny_llama(sharpness=3.0)  # as the target, but for the sharpness: some drafts are wrong
    sizes = {"num_draft": 4, "max_depth": 3, "branching": (2, 1)}
    options = {"draft": draft, "expansion": name, **sizes}
    return {"drafter": "draft_model", "drafter_options": options}


DRAFTERS = ["jacobi", "token_recycling", "tree", "unit", *EXPANSIONS]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", DRAFTERS)
def test_drafted_text_is_the_loops_and_nothing_is_read(name, temperature, monkeypatch):
    prompts, reads, ready = random_prompts((5, 9, 3)), [], Steps.ready

    def watched(self, step):
        def work():
            places = [buffer.data_ptr() for buffer in step.buffers()]
            with count_calls() as calls:
                ready(self, step)()
            reads.append(calls.num_reads)
            assert [buffer.data_ptr() for buffer in step.buffers()] == places

        return work

    monkeypatch.setattr(Steps, "ready", watched)
    options: dict[str, Any] = {"max_new_tokens": 11, "temperature": temperature, "seed": 4}
    loop = arvision.generate(tiny_llama(), prompts, **text_drafter(name), **options)
    fixed = arvision.generate(
        tiny_llama(), prompts, **text_drafter(name), **options, compile="eager"
    )
    assert (loop.stats.step, fixed.stats.step) == ("loop", "eager")
    assert fixed.tokens == loop.tokens
    assert fixed.stats.passes_per_row == loop.stats.passes_per_row
    assert min(fixed.stats.windows) > 1
    assert set(reads) == {0}


def test_what_a_matrix_has_learned_in_fixed_steps_stays():
    drafter, prompts = TokenRecycling(), random_prompts((5,))
    options: dict[str, Any] = {"max_new_tokens": 30, "drafter": drafter}
    cold = arvision.generate(tiny_llama(), prompts, **options, compile="eager")
    warm = arvision.generate(tiny_llama(), prompts, **options)
    assert cold.stats.forward_passes > warm.stats.forward_passes
    assert cold.tokens == warm.tokens


@pytest.mark.slow
def test_lengths_of_drafts_may_change_between_fixed_steps():
    options: dict[str, Any] = {"max_new_tokens": 20, "num_draft": "auto"}
    prompts = random_prompts((5, 9))
    loop = arvision.generate(tiny_llama(), prompts, max_new_tokens=20)
    fixed = arvision.generate(tiny_llama(), prompts, drafter="jacobi", **options, compile="eager")
    assert fixed.stats.step == "eager"
    assert fixed.tokens == loop.tokens


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that `torch.compile` makes of the steps, which nothing compiles."""
    made, compiler = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, *, mode, **options: compiler(function, backend=backend, **options),
    )
    return made


@pytest.mark.skipif(
    "isolate_recompiles" not in signature(torch.compile).parameters,
    reason="this torch counts compiled steps as recompilations of one another",
)
def test_steps_of_transformers_are_one_graph_and_kept(graphs):
    network, prompts = tiny_llama(), random_prompts((5, 9))
    wanted = arvision.generate(network, prompts, max_new_tokens=6)
    found = [arvision.generate(network, prompts, max_new_tokens=6, compile="default") for _ in "ab"]
    assert [out.tokens for out in found] == [wanted.tokens] * 2
    # One graph for both rows until they end together, made once and kept with the network.
    assert len(graphs) == 1
    assert found[0].stats.warm_up > 0 == found[1].stats.warm_up


@pytest.mark.skipif(
    "isolate_recompiles" not in signature(torch.compile).parameters,
    reason="this torch counts compiled steps as recompilations of one another",
)
@pytest.mark.parametrize("name", ["jacobi", pytest.param("tree", marks=pytest.mark.slow)])
def test_steps_with_drafts_of_text_are_one_graph_and_kept(graphs, name):
    network, prompts = tiny_llama(), random_prompts((5, 9))
    wanted = arvision.generate(network, prompts, max_new_tokens=6)
    options = {"max_new_tokens": 6, "compile": "default"}
    drawn = [arvision.generate(network, prompts, **text_drafter(name), **options) for _ in range(2)]
    assert [out.tokens for out in drawn] == [wanted.tokens] * 2
    # For both rows and for the last one; the second call makes none.
    assert 1 <= len(graphs) <= 2
    assert drawn[1].stats.warm_up == 0


@pytest.mark.skipif(
    "isolate_recompiles" not in signature(torch.compile).parameters,
    reason="this torch counts compiled steps as recompilations of one another",
)
@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("janus", "sjd:window=4:tree=static:coupling=maximal"),
        pytest.param("janus", "sjd:window=4:tree=drift", marks=pytest.mark.slow),
        pytest.param("emu3", "sjd:window=5:tree=drift", marks=pytest.mark.slow),
    ],
)
def test_steps_of_image_models_are_one_graph(graphs, family, spec):
    model, prompts = FAMILIES[family]()
    sampler, options = get_sampler(spec), {"seeds": [0, 1], "guidance_scale": 2.0}
    drawn = sampler(model, prompts, **options, steps=Steps("default"))
    assert drawn.stats.step == "default"
    assert torch.equal(drawn.tokens, sampler(model, prompts, **options).tokens)
    assert 1 <= len(graphs) <= 3


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("prompt_lookup", "the drafts of PromptLookup are made on the host"),
        ("suffix", "the drafts of SuffixDecoding are made on the host"),
        ("jacobi+prompt_lookup", "the drafts of Combined are made on the host"),
        ("online", "heads that learn online do so on the host"),
    ],
)
def test_drafts_made_on_the_host_run_the_ordinary_loop(name, why):
    drafter = HeadDrafter(MedusaHeads(32, 2).double(), online=0.1) if name == "online" else name
    with pytest.warns(UserWarning, match=f"the ordinary loop runs: {why}"):
        out = arvision.generate(
            tiny_llama(),
            random_prompts((5,)),
            max_new_tokens=6,
            drafter=drafter,
            compile="eager",
        )
    assert out.stats.step == "loop"


class FixedTable(DroppingTableModel):
    """A table whose state keeps what it is fed where it stands, as a cache does."""

    forgets = False

    def start(self, conditions, guidance_scale=1.0):
        state: Any
        state, logits = super().start(conditions, guidance_scale)
        memory = torch.zeros(len(conditions), self.num_tokens + 64, dtype=torch.int64)
        rows = torch.arange(len(conditions))[:, None]

        def extend_fixed(tokens, lengths, tree=None):
            num, order = tokens.shape[1], torch.arange(tokens.shape[1])
            if self.forgets:
                memory.zero_()
            memory[rows, lengths[:, None] + order] = tokens
            tree = topology(tuple(range(-1, num - 1)), lengths.device) if tree is None else tree
            depths = tree.depths.expand(len(tokens), num)
            out = []
            for place in range(num):
                above = tree.ancestors[..., place, :].expand(len(tokens), num)
                slots = torch.arange(self.num_tokens).expand(len(tokens), -1).clone()
                behind = torch.where(above, lengths[:, None] + depths, self.num_tokens)
                padded = torch.nn.functional.pad(slots, (0, num + 1))
                padded.scatter_(1, behind.clamp(max=self.num_tokens), lengths[:, None] + order)
                read, end = padded[:, : self.num_tokens], lengths + depths[:, place]
                prefix = torch.zeros_like(lengths)
                for depth in range(self.num_tokens):
                    longer = prefix * self.vocab_size + memory[rows[:, 0], read[:, depth]]
                    prefix = torch.where(depth <= end, longer, prefix)
                beyond = end + 1 >= self.num_tokens
                row = self.row(prefix.masked_fill(beyond, 0), (end + 1).masked_fill(beyond, 0))
                out.append(self.table[row])
            return torch.stack(out, dim=1)

        def keep_fixed(path, counts, lengths):
            order = torch.arange(path.shape[1])
            kept = torch.where(order < counts[:, None], path, order)
            memory[rows, lengths[:, None] + order] = memory[rows, lengths[:, None] + kept]

        state.extend_fixed, state.keep_fixed = extend_fixed, keep_fixed
        drop = state.select

        def select(kept):
            nonlocal memory, rows
            memory, rows = memory[kept], torch.arange(len(kept))[:, None]
            drop(kept)

        state.select = select
        return state, logits


class Drafted:
    """The token loop with a draft model of text, as a sampler."""

    def __init__(self, expansion):
        self._expansion, self.shaping = expansion, Shaping

    def __call__(self, model, conditions, *, seeds, steps):
        draft = FixedTable(vocab_size=3, num_tokens=4, sharpness=1.0, seed=1)
        drafter = DraftTree(draft, self._expansion, branching=(2, 1), num_draft=3)
        return decode_tokens(
            model,
            conditions,
            Run(len(conditions), model.num_tokens, seeds, steps=steps),
            drafter=drafter,
            rule=choose_rule("lossless", drafter.draws, 1.0, branches=drafter.branches).rule,
            shape=Shaping(),
            policy=FixedWindow(drafter.num_draft + 1),
        )


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        "sjd:window=3",
        "sjd:window=3:coupling=maximal",
        "sjd:window=3:coupling=independent",
        "sjd:window=3:coupling=maximal:init=above",
        "sjd:window=3:init=memory",
        "sjd:window=6:tree=drift:init=memory",
        "sjd:window=6:tree=static:coupling=maximal:init=above",
        "draft:max_draft=2",
        "draft:max_draft=3:coupling=maximal:stop_threshold=0.6",
        "draft:max_draft=3:coupling=independent:stop_threshold=0.6",
        *EXPANSIONS,
    ],
)
def test_the_law_is_the_models_own(spec, forgets):
    model = FixedTable(vocab_size=3, num_tokens=4, sharpness=1.0, grid=(2, 2))
    model.forgets = forgets
    sampler: Any = Drafted(spec) if spec in EXPANSIONS else get_sampler(spec)
    if getattr(sampler, "needs", None):
        draft = FixedTable(vocab_size=3, num_tokens=4, sharpness=1.0, seed=1, grid=(2, 2))
        sampler = sampler.bind(draft=draft)
    num = 6000
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = sampler(model, [[0]] * num, seeds=[(5, k) for k in range(num)], steps=Steps("eager"))
    assert out.stats.step == "eager"
    p_value = law_p_value(model.number(out.tokens), model.joint(sampler.shaping()))
    assert p_value < 1e-6 if forgets else p_value > 1e-4
