"""Relaxed acceptance over codebook neighbours."""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config

from ..contracts import TokenModel
from ..decoding.jacobi import JacobiDrafter, check_init
from ..decoding.loop import Drafter, FixedWindow, WindowPolicy
from ..decoding.relaxed import check_codebook, check_relaxable, neighbour_log_ratio, relaxed_rule
from ..decoding.verify import Rule
from ..decoding.window import check_window, clamp_window
from ..errors import InputError
from .base import TokenSampler, register


@register("lantern", exact=False, drives="token")
class LanternSampler(TokenSampler):
    """Jacobi decoding that lends a guess the probability of its nearest codes (lossy, bounded).

    A guess x with law q is kept with probability min(1, (p(x) + e(x)) / q(x)), where e(x) is the
    mass of p on the `neighbours` codes nearest to x, at most `tv`, and at most x's share of `tv`
    among all guesses that p would turn down. Rejected guesses are drawn from the ordinary
    residual (p - q)+.

    Law: lossy, within a bound that holds exactly: each token's law, given all earlier tokens, is
    within total variation `tv` of the model's, so the law of an image of N tokens is within N * tv.
    A bound of this kind has a price: no such rule accepts a guess more often than the exact
    probability + `tv`. On `llamagen-fashion` (256 images, guidance 3): 3.55 tokens per pass (`sjd`
    maximal, which is exact: 3.02), with `tv` 0.3 4.53; class consistency 0.97 and 0.90 (`ar`:
    0.97), nats per token -3.12 and -3.90 (`ar`: -2.93). Cost: as `sjd`, plus distances to the whole codebook per guess. Models:
    token models with a `codebook`.

    Args:
        window: tokens per pass, the last known one included.
        coupling: what becomes of the guesses after the first rejection: "maximal" keeps as many as
            exactness allows, "independent" redraws them.
        neighbours: k; 0 relaxes nothing.
        tv: delta, bound of the total variation of one token's law; 0 relaxes nothing.
        init: first guess of a position, see `arvision.decoding.jacobi.INITS`.
        temperature: divides the logits; 0 is greedy.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, 1 for all.

    Raises:
        InputError: a value out of range, or (when called) a model without a codebook.

    Paper: Jang et al., "LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative
    Decoding", 2024, section 4 (aggregation over the latent neighbourhood, total variation bound).
    There a trained drafter proposes trees; here the guesses are Jacobi's. There delta bounds the
    mass lent to each guess alone, which over all guesses can sum to more than delta; here the whole
    step obeys it, see `arvision.decoding.relaxed.neighbour_log_ratio`. The default of 32 neighbours is
    the paper's share of the codebook (1,000 of 16,384) for codebooks of about 512; for those of
    16,384 say 1000. The default bound of 0.1 is the strict end of what the paper tries.
    """

    keeps_given = True

    @register_to_config
    def __init__(
        self,
        window: int = 16,
        coupling: str = "maximal",
        neighbours: int = 32,
        tv: float = 0.1,
        init: str = "prior",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        if window == "auto":
            raise InputError("window 'auto': lantern takes an integer >= 1")
        check_window(window)
        check_relaxable(coupling)
        check_init(init, (1, 1))
        if isinstance(neighbours, bool) or int(neighbours) != neighbours or neighbours < 0:
            raise InputError(f"neighbours {neighbours}: expected an integer >= 0")
        if not 0 <= tv <= 1:
            raise InputError(f"tv {tv}: expected a total variation in [0, 1]")
        self.shaping()

    @property
    def is_exact(self) -> bool:
        """Whether nothing is relaxed."""
        return self.config["neighbours"] == 0 or self.config["tv"] == 0

    def drafter(self, model: TokenModel) -> Drafter:
        """The last pass's guesses."""
        return JacobiDrafter(self.config["init"], model.grid)

    def rule(self, model: TokenModel) -> Rule:
        """Acceptance with lent probability."""
        config = self.config
        codebook = check_codebook(model, self.name)
        ratio = neighbour_log_ratio(codebook, config["neighbours"], config["tv"])
        return relaxed_rule(config["coupling"], ratio)

    def policy(self, model: TokenModel) -> WindowPolicy:
        """A fixed window."""
        return FixedWindow(clamp_window(self.config["window"], model.num_tokens))
