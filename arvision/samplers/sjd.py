"""Speculative Jacobi decoding."""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config

from ..contracts import TokenModel
from ..decoding.jacobi import JacobiDrafter, check_init
from ..decoding.loop import Drafter, FixedWindow, WindowPolicy
from ..decoding.verify import Rule, get_coupling
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

    Law: exact with all three. Cost: N / tokens-per-pass passes of `window` tokens each. Models:
    token models.

    Args:
        window: tokens per pass, the last known one included.
        coupling: see above.
        init: first guess of a position, see `arvision.decoding.jacobi.INITS`.
        temperature: divides the logits; 0 is greedy.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, 1 for all.

    Raises:
        InputError: an unknown coupling or init, or a value out of range.

    Paper: Teng et al., "Accelerating Auto-regressive Text-to-Image Generation with Training-free
    Speculative Jacobi Decoding", 2024, section 3 (independent); So et al., "Speculative Coupled
    Decoding", 2025 (maximal and Gumbel coupling).
    """

    @register_to_config
    def __init__(
        self,
        window: int = 16,
        coupling: str = "gumbel",
        init: str = "prior",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise InputError(f"window {window!r}: expected an integer >= 1")
        get_coupling(coupling)
        check_init(init, (1, 1))
        self.shaping()

    def drafter(self, model: TokenModel) -> Drafter:
        """The last pass's guesses."""
        config = self.config
        is_gumbel = config["coupling"] == "gumbel"
        return JacobiDrafter(
            config["init"], model.grid, share_noise=is_gumbel, keeps_laws=not is_gumbel
        )

    def rule(self, model: TokenModel) -> Rule:
        """The configured coupling."""
        return get_coupling(self.config["coupling"])

    def policy(self, model: TokenModel) -> WindowPolicy:
        """A fixed window."""
        return FixedWindow(self.config["window"])
