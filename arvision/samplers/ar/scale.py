"""Plain sampling of scale models: all tokens of one resolution per pass."""

from __future__ import annotations

from collections.abc import Sequence

from ...contracts import Conditions, Samples, ScaleModel, Schedule
from ...decoding.flow import flow_map_of, flow_pick
from ...decoding.logits import Shaping, per_scale
from ...decoding.run import Run
from ...decoding.scale_loop import ScalePlan, decode_scales
from ...decoding.verify import gumbel_draw


def draw_scales(
    model: ScaleModel,
    conditions: Conditions,
    run: Run,
    *,
    temperature: Schedule,
    top_k: int,
    top_p: float,
    noise: str,
    prune: float,
    prune_scales: int,
    prune_whole: Sequence[int],
    more_smooth: bool,
) -> Samples:
    """Draw scale by scale; for the options see `ARSampler`."""
    return decode_scales(
        model,
        conditions,
        run,
        shape=[
            Shaping(temperature=value, top_k=top_k or 0, top_p=top_p)
            for value in per_scale("temperature", temperature, len(model.scales))
        ],
        pick=gumbel_draw if noise == "gumbel" else flow_pick(flow_map_of(model)),
        plan=ScalePlan(
            prune=prune,
            prune_scales=prune_scales,
            prune_whole=prune_whole,
            more_smooth=more_smooth,
        ),
    )
