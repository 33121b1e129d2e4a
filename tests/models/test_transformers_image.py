"""Image models of transformers: their classes' own greedy tokens, whatever the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from image_networks import (
    CHAMELEON,
    EMU,
    chameleon_prompts,
    emu3_prompts,
    emu3_sequence,
    forced_generate,
    glm_generate,
    glm_prompts,
    janus_generate,
    janus_prompts,
    tiny_chameleon,
    tiny_emu3,
    tiny_glm,
    tiny_janus,
)

from arvision import get_sampler
from arvision.contracts import ContinuousModel, ScaleModel, TokenModel
from arvision.models import Chameleon, Emu3, GlmImage, ImagePrompt, Janus

LENGTHS = [4, 9, 2]


@dataclass
class Case:
    """A model, ragged prompts, and what the class generates greedily behind them."""

    model: Any
    conditions: list[Any]
    scale: float
    expected: torch.Tensor  # [B, M] ids
    codes: torch.Tensor | None = None  # [B, N] where the ids are not the sequence


def janus(seed, side, scale):
    network = tiny_janus(seed, side)
    prompts = janus_prompts(LENGTHS, seed)
    return Case(Janus(network), prompts, scale, janus_generate(network, prompts, scale))


def glm(seed, height, width):
    network = tiny_glm(seed)
    model = GlmImage(network, grids=[(3, 2), (height, width)])
    prompts = glm_prompts(LENGTHS, seed)
    return Case(model, prompts, 1.0, glm_generate(network, prompts, model.grids))


def glm_editing(seed, sources):
    network, grid = tiny_glm(seed), (4, 3)
    model = GlmImage(network, grids=[grid])
    prompts = glm_prompts(LENGTHS, seed, sources)
    generator = torch.Generator().manual_seed(seed)
    patches = sum(rows * columns for rows, columns in sources)
    one = torch.randn(patches, 3 * 16 * 16, generator=generator, dtype=torch.float64)
    expected = glm_generate(network, prompts, [grid], sources, torch.cat([one] * len(prompts)))
    grids = torch.tensor([[1, *source] for source in sources])
    features = network.get_image_features(one, grids).pooler_output
    codes = network.get_image_tokens(features).split([r * c for r, c in sources])
    images = [c.view(*source) for c, source in zip(codes, sources, strict=True)]
    conditions = [ImagePrompt(prompt, images=images) for prompt in prompts]
    return Case(model, conditions, 1.0, expected)


def emu3(seed, grid, scale, negative):
    network = tiny_emu3(seed)
    model, prompts = Emu3(network, grids=[grid]), emu3_prompts(LENGTHS, seed)
    negatives = emu3_prompts([1, 3, 6], seed + 1) if negative else None
    if scale != 1 and not negative:
        negatives = [prompt[-1:] for prompt in prompts]
    codes = list(range(EMU["first"], EMU["first"] + EMU["codes"]))
    expected = forced_generate(
        network, prompts, emu3_sequence(*grid), codes, EMU["pad"], scale, negatives
    )
    if negative:
        assert negatives is not None
        prompts = [ImagePrompt(p, n) for p, n in zip(prompts, negatives, strict=True)]
    return Case(model, prompts, scale, expected)


def chameleon(seed, layout, grid, scale, negative=False, swin_norm=False):
    network = tiny_chameleon(seed, swin_norm=swin_norm)
    model = Chameleon(network, layout=layout, grids=[grid])
    is_lumina = layout == "lumina"
    sides = grid if is_lumina else None
    prompts = chameleon_prompts(LENGTHS, seed, sides)
    null = [p[-3:] if is_lumina else p[[0, -1]] for p in prompts]
    if negative:
        null = chameleon_prompts([2, 7, 1], seed + 1, sides)
    line: list[Any] = [None] * grid[1] + ([CHAMELEON["line_end"]] if is_lumina else [])
    sequence = line * grid[0] + [CHAMELEON["image_end"]]
    codes = list(range(CHAMELEON["first"], CHAMELEON["first"] + 48))
    used = None if scale == 1 else null
    expected = forced_generate(network, prompts, sequence, codes, 1, scale, used)
    conditions: list[Any] = prompts
    if negative:
        conditions = [ImagePrompt(p, n) for p, n in zip(prompts, null, strict=True)]
    return Case(model, conditions, scale, expected)


CASES = {
    "janus": lambda: janus(0, 5, 3.0),
    "janus-small": lambda: janus(3, 4, 5.0),
    "glm": lambda: glm(0, 5, 4),
    "glm-wide": lambda: glm(2, 3, 6),
    "glm-editing": lambda: glm_editing(1, [(2, 3)]),
    "glm-two-sources": lambda: glm_editing(4, [(3, 2), (2, 2)]),
    "emu3": lambda: emu3(0, (4, 5), 3.0, False),
    "emu3-negative": lambda: emu3(1, (5, 3), 2.0, True),
    "emu3-plain": lambda: emu3(2, (4, 4), 1.0, False),
    "chameleon": lambda: chameleon(0, "chameleon", (4, 4), 3.0),
    "chameleon-negative": lambda: chameleon(1, "chameleon", (3, 5), 2.0, True, True),
    "lumina": lambda: chameleon(2, "lumina", (4, 6), 4.0),
    "lumina-plain": lambda: chameleon(3, "lumina", (6, 2), 1.0),
}


@pytest.fixture(scope="module")
def cases():
    made: dict[str, Case] = {}
    return lambda name: made.setdefault(name, CASES[name]()) if name not in made else made[name]


@pytest.fixture(params=sorted(CASES))
def case(request, cases):
    return cases(request.param)


def draw(case, sampler, rows=None, seeds=None, **options):
    rows = range(len(case.conditions)) if rows is None else rows
    conditions = [case.conditions[row] for row in rows]
    seeds = [(7, row) for row in rows] if seeds is None else seeds
    chosen = get_sampler(sampler, **options)
    return chosen(case.model, conditions, seeds=seeds, guidance_scale=case.scale)


def test_greedy_tokens_are_those_of_the_class(case):
    out = draw(case, "ar", temperature=0.0)
    assert torch.equal(case.model.sequence(out.tokens), case.expected)
    assert out.stats.forward_passes == case.model.num_tokens - 1
    assert len(set(out.tokens.flatten().tolist())) > 4
    assert isinstance(case.model, TokenModel)
    assert not isinstance(case.model, (ScaleModel, ContinuousModel))


def test_jacobi_draws_what_plain_sampling_draws(case):
    plain = draw(case, "ar").tokens
    for window in (2, 7, 16):
        out = draw(case, "sjd", window=window)
        assert torch.equal(out.tokens, plain)
        assert out.stats.forward_passes < case.model.num_tokens
    for row in range(len(case.conditions)):
        assert torch.equal(draw(case, "sjd", [row], window=5).tokens[0], plain[row])
