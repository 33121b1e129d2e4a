"""Plain autoregressive sampling, the baseline of everything else."""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config

from ..contracts import TokenModel
from ..decoding.loop import Drafter, NoDrafter
from ..decoding.verify import Rule, gumbel_coupling
from .base import TokenSampler, register


@register("ar", exact=True, drives="token")
class ARSampler(TokenSampler):
    """One token per pass.

    Each token is argmax(log p + g) with Gumbel noise g that is a function of (seed, image,
    position): an exact draw from p, and the same one that every Gumbel-coupled sampler makes.

    Law: exact. Cost: N - 1 passes after the prefill. Models: token models.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, 1 for all.

    Raises:
        InputError: a value out of range.
    """

    @register_to_config
    def __init__(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> None:
        self.shaping()

    def drafter(self, model: TokenModel) -> Drafter:
        """Nothing is drafted."""
        return NoDrafter()

    def rule(self, model: TokenModel) -> Rule:
        """A draw with fixed noise."""
        return gumbel_coupling
