"""Relaxed acceptance over codebook neighbours."""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config

from ..contracts import TakesTrees, TokenModel
from ..decoding.jacobi import JacobiDrafter, check_init
from ..decoding.loop import LARGEST_TREE, Drafter, FixedWindow, WindowPolicy
from ..decoding.relaxed import (
    BOUNDS,
    check_codebook,
    check_relaxable,
    neighbour_loan,
    neighbour_log_ratio,
    relaxed_rule,
)
from ..decoding.static_tree import StaticTreeDrafter
from ..decoding.tree_rules import lenient
from ..decoding.verify import Rule
from ..decoding.window import check_window, clamp_window
from ..errors import InputError, unknown_name
from ..portable import OnlyWith
from .base import TokenSampler, register


@register("lantern", exact=False, drives="token")
class LanternSampler(TokenSampler):
    """Jacobi decoding that lends a guess the probability of its nearest codes (lossy, bounded).

    A guess x with law q is kept with probability min(1, (p(x) + e(x)) / q(x)), where e(x) is mass of p
    on the `neighbours` codes nearest to x. How much may be lent is the `bound`: "step" (ours), at most
    `tv` and at most x's share of `tv` among all guesses that p would turn down; "draft" (LANTERN), the
    nearest codes as far as their mass is within `tv`; "factor" (LANTERN++), the same as far as p(x) grows
    by the factor `factor` at most. Rejected guesses are drawn from the ordinary residual (p - q)+.

    Law: lossy. With bound "step" within a limit that holds exactly: each token's law, given all earlier
    tokens, is within total variation `tv` of the model's, so the law of an image of N tokens is within
    N * tv; no such rule accepts a guess more often than the exact probability + `tv`. The published
    bounds limit what one guess borrows, and the law not at all. On `llamagen-fashion` (256 images,
    guidance 3): 3.55 tokens per pass (`sjd` maximal, which is exact: 3.02), with `tv` 0.3 4.53; class
    consistency 0.97 and 0.90 (`ar`: 0.97), nats per token -3.12 and -3.90 (`ar`: -2.93); the other
    bounds are measured in docs/systems.md. Cost: as `sjd`, plus distances to the whole codebook per
    guess. Models: token models with a `codebook`; trees also need `takes_trees`.

    Args:
        window: tokens per pass, the last known one included.
        coupling: what becomes of the guesses after the first rejection: "maximal" keeps as many as
            exactness allows, "independent" redraws them.
        neighbours: k; 0 relaxes nothing.
        tv: delta of the bounds "step" and "draft"; 0 relaxes nothing.
        bound: see above.
        factor: lambda of the bound "factor"; 1 relaxes nothing.
        tree: None for a chain; "static" for a tree of fixed shape whose siblings are tried in turn
            (coupling "maximal"), `window` counts all candidates.
        init: first guess of a position, see `arvision.decoding.jacobi.INITS`.
        temperature: divides the logits; 0 is greedy.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, 1 for all.

    Raises:
        InputError: a value out of range, the limit of another bound, or (when called) a model without
            a codebook.

    Papers: Jang et al., "LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative
    Decoding", 2024, section 4; Park et al., "LANTERN++", 2025 (static tree, multiplicative bound). There
    a trained drafter proposes trees; here the guesses are Jacobi's, in a chain or in the static tree of
    `sjd`. The default of 32 neighbours is the paper's share of the codebook (1,000 of 16,384) for
    codebooks of about 512; for those of 16,384 say 1000. The default `tv` of 0.1 is the strict end of
    what the paper tries; `factor` 3 is LANTERN++'s, with 10 neighbours.
    """

    keeps_given = True

    only_with = (
        OnlyWith(("tv",), "bound", lambda name: name != "factor", "'step' or 'draft'"),
        OnlyWith(("factor",), "bound", lambda name: name == "factor", "'factor'"),
    )

    @register_to_config
    def __init__(
        self,
        window: int = 16,
        coupling: str = "maximal",
        neighbours: int = 32,
        tv: float = 0.1,
        bound: str = "step",
        factor: float = 3.0,
        tree: str | None = None,
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
        if bound not in BOUNDS:
            raise unknown_name("bound", bound, BOUNDS)
        if not 1 <= factor < float("inf"):
            raise InputError(f"factor {factor}: expected a number >= 1")
        self._check_tree()
        self.shaping()
        self.check_idle()

    def _check_tree(self) -> None:
        """Refuse trees that do not go with the other options."""
        tree, coupling, window = (self.config[name] for name in ("tree", "coupling", "window"))
        if tree is None:
            return
        if tree != "static":
            raise unknown_name("tree", tree, ["static"])
        if coupling != "maximal":
            raise InputError(f"tree 'static' with coupling {coupling!r}: expected 'maximal'")
        if window > LARGEST_TREE:
            raise InputError(
                f"window {window} with tree 'static': expected at most {LARGEST_TREE} candidates"
            )

    @property
    def is_exact(self) -> bool:
        """Whether nothing is relaxed."""
        config = self.config
        limit = config["factor"] - 1 if config["bound"] == "factor" else config["tv"]
        return config["neighbours"] == 0 or limit == 0

    def drafter(self, model: TokenModel) -> Drafter:
        """The last pass's guesses."""
        chain = JacobiDrafter(self.config["init"], model.grid)
        if self.config["tree"] is None:
            return chain
        if not (isinstance(model, TakesTrees) and model.takes_trees):
            raise InputError(
                f"tree 'static' with {type(model).__name__}, which takes no trees: expected None"
            )
        return StaticTreeDrafter(chain)

    def rule(self, model: TokenModel) -> Rule:
        """Acceptance with lent probability."""
        config = self.config
        codebook = check_codebook(model, self.name)
        bound = config["bound"]
        limit = config["factor" if bound == "factor" else "tv"]
        kind = (codebook, config["neighbours"], limit, bound)
        chains = relaxed_rule(config["coupling"], neighbour_log_ratio(*kind))
        if config["tree"] is None:
            return chains
        trees = lenient(neighbour_loan(*kind))
        return lambda batch: (chains if batch.topology is None else trees)(batch)

    def policy(self, model: TokenModel) -> WindowPolicy:
        """A fixed window."""
        if self.config["tree"] is not None:
            return FixedWindow(self.config["window"])
        return FixedWindow(clamp_window(self.config["window"], model.num_tokens))
