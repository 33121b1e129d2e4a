"""Speculative Jacobi decoding."""

from __future__ import annotations

from typing import Any, cast

from diffusers.configuration_utils import register_to_config

from ..contracts import Conditions, Samples, TokenModel
from ..decoding.jacobi import JacobiDrafter, check_init
from ..decoding.loop import Drafter, FixedWindow, WindowPolicy
from ..decoding.relaxed import check_relaxable, relaxed_rule
from ..decoding.run import Run
from ..decoding.verify import Rule, get_coupling
from ..decoding.window import (
    CostTable,
    GoodputWindow,
    check_window,
    clamp_window,
    measured_costs,
)
from ..errors import InputError
from .base import TokenSampler, register


@register("sjd", exact=True, drives="token")
class SJDSampler(TokenSampler):
    """Guess a window of tokens, let one pass judge all of them, keep the prefix that stands.

    What the pass says about the rest of the window becomes the next guess, so guesses improve from
    pass to pass. How the guess at a position follows from the guess before is the coupling:

    - "gumbel": argmax(log p + g) with noise fixed per position. The picture is token for token the
      one that `ar` draws for the same seed (up to float ties), whatever the window.
    - "maximal": keep the old guess as often as any exact method can. A picture of the same law, which
      depends on the window schedule.
    - "independent": the published rule; guesses after the first rejection are drawn afresh.

    Law: exact with all three, and lossy with `reuse`, which keeps a guess because it looks likely
    and then takes it for a draw from the latest law. On `llamagen-fashion` (256 images, guidance 3,
    coupling independent) `reuse` 0.5 takes tokens per pass from 2.54 to 2.58, 0.1 to 2.83, at a
    class consistency of 0.98 and 1.00 (`ar`: 0.97); maximal coupling has 3.02 without loss. Cost:
    N / tokens-per-pass passes of `window` tokens each. Models: token models.

    With window "auto" each pass has the length that promises the most tokens per second: the
    costs of a pass are measured on first use of a model on this machine (seconds of work) and saved
    in the user's cache folder, see `arvision.decoding.window.measured_costs`; the run itself is a
    function of that table and of its own acceptances. `stats.cost_table` is the table used; pass
    it as `cost_table` to repeat a run on any machine.

    Args:
        window: tokens per pass, the last known one included, or "auto".
        coupling: see above.
        init: first guess of a position, see `arvision.decoding.jacobi.INITS`.
        reuse: None, or the probability above which a guess after the first rejection stays as it
            is; needs coupling "independent" (as published) or "maximal".
        cost_table: for window "auto": rows [images, window, seconds] or [images, window, seconds,
            tokens per pass], or a dict of windows to seconds; None to measure.
        cost_file: for window "auto": where measured tables are kept; None for the user's cache
            folder. It stays on this machine: it is not saved, nor taken from a saved sampler.
        temperature: divides the logits; 0 is greedy.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, 1 for all.

    Raises:
        InputError: an unknown coupling or init, or a value out of range.

    Paper: Teng et al., "Accelerating Auto-regressive Text-to-Image Generation with Training-free
    Speculative Jacobi Decoding", 2024, section 3 (independent); So et al., "Speculative Coupled
    Decoding", 2025 (maximal and Gumbel coupling); Teng et al., "SJD++: Improved Speculative Jacobi
    Decoding", 2025 (reuse of confident drafts); Liu et al., "Optimizing Speculative Decoding for
    Serving Large Language Models Using Goodput", 2024, section 4 (window "auto").
    """

    local_files = ("cost_file",)

    @register_to_config
    def __init__(
        self,
        window: int | str = 16,
        coupling: str = "gumbel",
        init: str = "prior",
        reuse: float | None = None,
        cost_table: Any = None,
        cost_file: str | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        check_window(window, cost_table)
        get_coupling(coupling)
        check_init(init, (1, 1))
        if reuse is not None:
            check_relaxable(coupling)
            if not 0 <= reuse <= 1:
                raise InputError(f"reuse {reuse}: expected a probability, or None")
        self.shaping()

    @property
    def is_exact(self) -> bool:
        """Whether this configuration draws from the model's own law."""
        return self.config["reuse"] is None

    def drafter(self, model: TokenModel) -> Drafter:
        """The last pass's guesses."""
        config = self.config
        is_gumbel = config["coupling"] == "gumbel"
        return JacobiDrafter(
            config["init"], model.grid, share_noise=is_gumbel, keeps_laws=not is_gumbel
        )

    def rule(self, model: TokenModel) -> Rule:
        """The configured coupling."""
        if self.config["reuse"] is not None:
            return relaxed_rule(self.config["coupling"], reuse=self.config["reuse"])
        return get_coupling(self.config["coupling"])

    def policy(self, model: TokenModel) -> WindowPolicy:
        """A fixed window, or the one with the most tokens per second."""
        if self.config["window"] == "auto":
            return GoodputWindow(CostTable(self.config["cost_table"]))
        return FixedWindow(clamp_window(self.config["window"], model.num_tokens))

    def decode(self, model: Any, conditions: Conditions, run: Run) -> Samples:
        """Run the decoding loop; for window "auto" measure the costs of a pass first if need be."""
        config = self.config
        if config["window"] != "auto":
            return super().decode(model, conditions, run)
        sampler = self
        if config["cost_table"] is None and len(conditions):
            table = measured_costs(
                lambda window: self.with_options(window=window, cost_file=None),
                f"{self.name} {config['coupling']} {config['init']}",
                model,
                conditions,
                run.guidance_scale,
                config["cost_file"],
            )
            sampler = self.with_options(cost_table=table)
        samples = TokenSampler.decode(cast(TokenSampler, sampler), model, conditions, run)
        samples.stats["cost_table"] = sampler.config["cost_table"]
        return samples
