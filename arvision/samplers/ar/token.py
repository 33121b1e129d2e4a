"""Plain sampling of token models: one token per pass."""

from __future__ import annotations

from ...contracts import Conditions, Samples, TokenModel
from ...decoding.drafter import NoDrafter
from ...decoding.flow import flow_map_of, flow_rule
from ...decoding.logits import Shaping
from ...decoding.loop import FixedWindow, decode_tokens
from ...decoding.run import Run
from ...decoding.verify import gumbel_coupling


def draw_tokens(
    model: TokenModel,
    conditions: Conditions,
    run: Run,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    noise: str,
) -> Samples:
    """Draw each token with the noise of its position; for the options see `ARSampler`."""
    return decode_tokens(
        model,
        conditions,
        run,
        drafter=NoDrafter(),
        rule=gumbel_coupling if noise == "gumbel" else flow_rule(flow_map_of(model)),
        shape=Shaping(temperature=temperature, top_k=top_k or 0, top_p=top_p),
        policy=FixedWindow(1),
    )
