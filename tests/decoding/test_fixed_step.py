"""Passes of fixed shapes: the loop's own tokens, one graph, nothing read back, buffers that stay."""

from __future__ import annotations

import warnings
from inspect import signature

import pytest
import torch
from forms import covered, slow
from tiny_pipelines import disturbed_copy

import arvision
from arvision import InputError, get_sampler
from arvision.counting import count_calls
from arvision.decoding.fixed_step import FixedStep, Steps
from arvision.testing import tiny_llamagen

SAMPLERS = [
    "ar",
    "sjd",
    "sjd:window=2:coupling=maximal",
    "sjd:window=16:coupling=independent",
    "sjd:window=5:coupling=maximal:init=neighbour_mix",
    "sjd:window=7:coupling=maximal:reuse=0.2",
    "sjd:window=7:init=above",
    "sjd:window=7:coupling=independent:init=above",
    "sjd:window=7:init=memory",
    "sjd:window=9:tree=drift",
    "sjd:window=9:tree=drift:init=above:min_share=0.05",
    "sjd:window=9:tree=drift:init=memory",
    "sjd:window=9:tree=static:coupling=maximal",
    "sjd:window=9:tree=static:coupling=maximal:init=above",
    "gsd",
    "lantern",
    "draft:max_draft=4:stop_threshold=1",
    "draft:max_draft=3:coupling=maximal",
    "draft:max_draft=4:coupling=independent:stop_threshold=0.55",
]
SEEDS = [0, (1, 2), 3, 4, 5]


@pytest.fixture(scope="module")
def model():
    # Guided, in float64: ties of float32 would tell the order of sums apart.
    return tiny_llamagen().to(torch.float64)


@pytest.fixture(scope="module")
def small(model):
    return disturbed_copy(model, 0.2)


def draw(model, sampler, steps=None, num=5, scale=3.0, draft=None):
    more = {} if steps is None else {"steps": steps}
    chosen = get_sampler(sampler)
    if chosen.needs:
        chosen = chosen.bind(draft=draft)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # windows cut to the tiny image
        return chosen(
            model, [k % 3 for k in range(num)], seeds=SEEDS[:num], guidance_scale=scale, **more
        )


@pytest.mark.parametrize(("sampler", "reads_every"), covered(SAMPLERS, [1, 3]))
def test_a_fixed_step_draws_what_the_loop_draws(model, small, sampler, reads_every):
    loop = draw(model, sampler, draft=small)
    fixed = draw(model, sampler, Steps("eager", reads_every), draft=small)
    assert (fixed.stats.step, loop.stats.step) == ("eager", "loop")
    assert torch.equal(fixed.tokens, loop.tokens)
    assert fixed.stats.commit_pass == loop.stats.commit_pass
    assert fixed.stats.passes_per_image == loop.stats.passes_per_image
    assert 0 <= fixed.stats.forward_passes - loop.stats.forward_passes < reads_every


@pytest.mark.parametrize("coupling", ["gumbel", "maximal", "independent"])
def test_a_draft_is_counted_and_always_drafts_to_the_end(model, small, coupling):
    name = f"draft:max_draft=4:coupling={coupling}"
    loop, fixed = (draw(model, name, steps, draft=small) for steps in (None, Steps("eager")))
    whole = draw(model, f"{name}:stop_threshold=1", draft=small)
    assert torch.equal(fixed.tokens, loop.tokens)
    # Drafts behind a place where a row would have stopped change no picture under Gumbel coupling.
    same = whole if coupling == "gumbel" else loop
    assert fixed.stats.commit_pass == same.stats.commit_pass
    for figure in ("drafted", "accepted", "acceptance_rate"):
        assert fixed.stats[figure] == same.stats[figure]
    assert 0 < fixed.stats.acceptance_rate < 1
    # All drafts of all passes but the last, and the calls for those behind the last token.
    assert 4 * fixed.stats.forward_passes <= fixed.stats.draft_passes


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_it_also_does_without_guidance_and_alone(model, scale):
    for num in (1, 3):
        loop = draw(model, "sjd:coupling=maximal", None, num, scale)
        fixed = draw(model, "sjd:coupling=maximal", Steps("eager"), num, scale)
        assert torch.equal(fixed.tokens, loop.tokens)


def test_captions_of_different_lengths():
    pipe = arvision.load("llamagen-fashion-t2i", device="cpu", dtype=torch.float64)
    prompts = ["a bag", "a dark ankle boot", "a light t-shirt with long sleeves"]
    sampler = get_sampler("sjd", window=9)
    loop = sampler(pipe.model, prompts, seeds=SEEDS[:3], guidance_scale=3.0)
    fixed = sampler(pipe.model, prompts, seeds=SEEDS[:3], guidance_scale=3.0, steps=Steps("eager"))
    assert torch.equal(fixed.tokens, loop.tokens)


@pytest.mark.skipif(
    "isolate_recompiles" not in signature(torch.compile).parameters,
    reason="this torch counts compiled steps as recompilations of one another",
)
@pytest.mark.parametrize(
    "sampler",
    [
        "ar",
        slow("sjd:window=6"),
        slow("sjd:window=6:coupling=maximal"),
        slow("sjd:window=6:init=memory"),
        "sjd:window=5:tree=static:coupling=maximal",
        slow("sjd:window=5:tree=drift"),
        "draft:max_draft=3:stop_threshold=0.6:coupling=independent",
    ],
)
def test_a_step_is_one_graph_and_is_compiled_once(model, small, sampler, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile

    def compiled(function, *, mode, **options):
        return compiler(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compiled)
    steps = Steps("default")
    fixed, loop = (draw(model, sampler, how, num=2, draft=small) for how in (steps, None))
    assert torch.equal(fixed.tokens, loop.tokens)
    # What the pass that compiled it has learned is forgotten.
    assert fixed.stats.commit_pass == loop.stats.commit_pass
    assert fixed.stats.warm_up > 0
    made = len(graphs)
    assert 1 <= made <= 3  # for two images, for the last one of them, and no more
    again = draw(model, sampler, steps, num=2, draft=small)
    assert torch.equal(again.tokens, fixed.tokens)
    assert again.stats.warm_up == 0
    assert len(graphs) == made


@pytest.mark.slow
def test_the_default_compiler_draws_the_same_tokens(model):
    fixed = draw(model, "sjd:window=6", Steps("default"), num=2)
    assert torch.equal(fixed.tokens, draw(model, "sjd:window=6", num=2).tokens)


class Watched(Steps):
    """Looks at every pass: does it read, and do its buffers stay where they are?"""

    def ready(self, step: FixedStep):
        def watch():
            before = [buffer.data_ptr() for buffer in step.buffers()]
            with count_calls() as calls:
                step()
            self.reads.append(calls.num_reads)
            assert [buffer.data_ptr() for buffer in step.buffers()] == before

        self.reads = []
        return watch


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_pass_can_be_replayed(model, small, sampler):
    steps = Watched("eager")
    draw(model, sampler, steps, num=1, draft=small)
    # A graph that is captured replays what it has seen: reads, and results in new places, get lost.
    assert set(steps.reads) == {0}


@pytest.mark.parametrize("sampler", ["ar", "sjd:window=5", "sjd:window=5:coupling=maximal"])
def test_the_loop_waits_for_its_device_once_a_pass(model, sampler):
    with count_calls() as calls:
        stats = draw(model, sampler, num=1).stats
    once = 10  # prefill, seeds, the memo of the noise, and the statistics at the end
    assert stats.forward_passes <= calls.num_reads <= stats.forward_passes + once


def test_pipelines_are_compiled_and_say_what_ran(tiny_pipeline):
    plain = tiny_pipeline(1, seed=3)
    assert plain.stats.step == "loop"
    assert tiny_pipeline.compile("eager") is tiny_pipeline
    fixed = tiny_pipeline(1, seed=3)
    assert (fixed.stats.step, fixed.stats.warm_up) == ("eager", 0)
    assert torch.equal(fixed.tokens, plain.tokens)
    # "auto" leaves a CPU as it is.
    assert tiny_pipeline.compile()(1, seed=3).stats.step == "loop"
    with pytest.raises(InputError, match="unknown mode of a step: 'fast'"):
        tiny_pipeline.compile("fast")
    with pytest.raises(InputError, match="reads_every 0: expected an integer >= 1"):
        tiny_pipeline.compile("eager", reads_every=0)


def test_a_sampler_without_fixed_shapes_draws_on_and_says_so(model):
    with pytest.warns(UserWarning, match="the ordinary loop runs"):
        out = get_sampler("zipar")(model, [0], seeds=[0], guidance_scale=1.0, steps=Steps("eager"))
    assert out.stats.step == "loop"


class Plain:
    """A token model whose states do what they must, and no more."""

    def __init__(self, model):
        self._model = model
        self.vocab_size, self.num_tokens, self.grid = model.vocab_size, model.num_tokens, model.grid

    def decode(self, tokens):
        return self._model.decode(tokens)

    def start(self, conditions, guidance_scale=1.0):
        state, logits = self._model.start(conditions, guidance_scale)
        return PlainState(state), logits


class PlainState:
    def __init__(self, state):
        self._state = state
        self.extend, self.commit = state.extend, state.commit

    @property
    def lengths(self):
        return self._state.lengths


def test_a_draft_model_without_fixed_shapes_is_named(model):
    sampler = get_sampler("draft", max_draft=3).bind(draft=Plain(model))
    with pytest.warns(UserWarning, match="runs: the draft model has no passes of fixed shapes"):
        out = sampler(model, [0], seeds=[0], guidance_scale=1.0, steps=Steps("eager"))
    assert out.stats.step == "loop"


def test_load_compiles():
    pipe = arvision.load("llamagen-fashion", device="cpu", compile="eager")
    assert pipe("bag", seed=0).stats.step == "eager"
