"""Speculative Jacobi decoding."""

from __future__ import annotations

from typing import Any, cast

from diffusers.configuration_utils import register_to_config

from ..contracts import Conditions, Samples, TakesTrees, TokenModel, device_of
from ..decoding.drafter import LARGEST_TREE
from ..decoding.drift import DriftDrafter
from ..decoding.first_laws import LawMemory, Memories
from ..decoding.guidance import plain_scale
from ..decoding.jacobi import FROM_LAWS, JacobiDrafter, check_init, first_laws
from ..decoding.loop import Drafter, FixedWindow, WindowPolicy
from ..decoding.relaxed import check_relaxable, relaxed_rule
from ..decoding.run import Run
from ..decoding.static_tree import StaticTreeDrafter, tree_coupling
from ..decoding.verify import Rule, coupling_name, get_coupling
from ..decoding.window import (
    GoodputWindow,
    check_window,
    clamp_window,
    measured_costs,
    tables_by_tree,
)
from ..errors import InputError, unknown_name
from ..portable import OnlyWith
from .base import LAW, TokenSampler, register

TREES = {"drift": "gumbel", "static": "maximal"}
"""Trees, and the coupling that each is for."""


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
    it as `cost_table` to repeat a run on any machine. Chains and the trees that go with the coupling
    are measured, and `stats.tree` says which promised more.

    With `tree` the candidates of a pass are a tree, see `docs/trees.md`: "drift" (Gumbel coupling, the
    very tokens of `ar`) or "static" (maximal coupling, the same law). With 64 candidates "drift"
    gives 4.1 tokens per pass on `llamagen-fashion` where a chain gives 3.2.

    Args:
        window: tokens per pass, the last known one included, or "auto".
        coupling: see above.
        init: first guess of a position, see `arvision.decoding.jacobi.INITS`; for drift trees one of
            "prior", "above" and "memory". The memory is this object's: of all images that it drew.
        reuse: None, or the probability above which a guess after the first rejection stays as it
            is; needs coupling "independent" (as published) or "maximal".
        cost_table: for window "auto": rows [images, window, seconds] or [images, window, seconds,
            tokens per pass], with the name of a tree behind it for trees; or a dict of windows to
            seconds; None to measure.
        cost_file: for window "auto": where measured tables are kept; None for the user's cache
            folder. It stays on this machine: it is not saved, nor taken from a saved sampler.
        tree: None for a chain, "drift" or "static"; `window` counts all candidates, at most 64.
        min_share: for drift trees: leave out candidates off the main chain that are less likely than
            this to be right.
        temperature: divides the logits; 0 is greedy.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, 1 for all.

    Raises:
        InputError: an unknown coupling, init or tree, options that do not go together, a value out
            of range, or a model that takes no trees.

    Paper: Teng et al., "Accelerating Auto-regressive Text-to-Image Generation with Training-free
    Speculative Jacobi Decoding", 2024, section 3 (independent); So et al., "Speculative Coupled
    Decoding", 2025 (maximal and Gumbel coupling); Teng et al., "SJD++: Improved Speculative Jacobi
    Decoding", 2025 (reuse of confident drafts); Liu et al., "Optimizing Speculative Decoding for
    Serving Large Language Models Using Goodput", 2024, section 4 (window "auto").
    """

    local_files = ("cost_file",)

    only_with = (
        OnlyWith(("cost_file",), "window", lambda window: window == "auto", "'auto'"),
        OnlyWith(("cost_file",), "cost_table", lambda table: table is None, "None"),
        OnlyWith(("min_share",), "tree", lambda tree: tree == "drift", "'drift'"),
    )

    keeps_given = True

    @register_to_config
    def __init__(
        self,
        window: int | str = 16,
        coupling: str = "gumbel",
        init: str = "prior",
        reuse: float | None = None,
        cost_table: Any = None,
        cost_file: str | None = None,
        tree: str | None = None,
        min_share: float = 0.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        check_window(window, cost_table)
        get_coupling(coupling)
        check_init(init, (1, 1), remembers=True)
        if reuse is not None:
            check_relaxable(coupling)
            if not 0 <= reuse <= 1:
                raise InputError(f"reuse {reuse}: expected a probability, or None")
        self.shaping()
        self._memories = Memories()
        self._check_tree()
        self.check_idle()

    def _check_tree(self) -> None:
        """Refuse options that do not go together with each other or with a tree.

        Raises:
            InputError: see above.
        """
        tree, coupling, init, min_share, window = (
            self.config[name] for name in ("tree", "coupling", "init", "min_share", "window")
        )
        coupling = coupling_name(coupling)
        if init == "memory" and coupling != "gumbel":
            raise InputError(
                f'init "memory" with coupling {coupling!r}: expected coupling "gumbel", under which '
                "a picture does not depend on those before it"
            )
        is_number = isinstance(min_share, int | float) and not isinstance(min_share, bool)
        if not is_number or not 0 <= min_share < 1:
            raise InputError(f"min_share {min_share!r}: expected a number, 0 <= min_share < 1")
        table = self.config["cost_table"]
        for name in [tree, *(() if table is None else tables_by_tree(table))]:
            if name is not None and name not in TREES:
                raise unknown_name("tree", name, TREES)
        if tree is None:
            return
        if coupling != TREES[tree]:
            raise InputError(
                f"tree {tree!r} with coupling {coupling!r}: expected coupling {TREES[tree]!r}"
            )
        if self.config["reuse"] is not None:
            raise InputError(f"tree {tree!r} with reuse: expected reuse None")
        if tree == "drift" and init not in FROM_LAWS:
            raise InputError(
                f'init {init!r} with tree "drift", which starts positions from laws: expected one '
                f"of {', '.join(FROM_LAWS)}"
            )
        if window != "auto" and window > LARGEST_TREE:
            raise InputError(
                f"window {window} with tree {tree!r}: expected at most {LARGEST_TREE} candidates"
            )

    @property
    def is_exact(self) -> bool:
        """Whether this configuration draws from the model's own law."""
        return self.config["reuse"] is None

    def drafter(self, model: TokenModel) -> Drafter:
        """The last pass's guesses."""
        config = self.config
        init, is_gumbel = config["init"], config["coupling"] == "gumbel"
        memory = self._memory(model) if init == "memory" else None
        if config["tree"] == "drift":
            check_init(init, model.grid, remembers=True)
            columns = None if model.grid is None else model.grid[1]
            return DriftDrafter(first_laws(init, model.grid, memory), columns, config["min_share"])
        chain = JacobiDrafter(
            init, model.grid, share_noise=is_gumbel, keeps_laws=not is_gumbel, memory=memory
        )
        return chain if config["tree"] is None else StaticTreeDrafter(chain)

    def _memory(self, model: TokenModel) -> LawMemory:
        """What this sampler remembers of the model's images under the same laws."""
        kind = tuple(self.config[name] for name in LAW)
        return self._memories.of(model, kind, device_of(model))

    def rule(self, model: TokenModel) -> Rule:
        """The configured coupling."""
        if self.config["reuse"] is not None:
            return relaxed_rule(self.config["coupling"], reuse=self.config["reuse"])
        if self.config["tree"] == "static":
            return tree_coupling
        return get_coupling(self.config["coupling"])

    def policy(self, model: TokenModel) -> WindowPolicy:
        """A fixed window, or the one with the most tokens per second."""
        if self.config["window"] == "auto":
            tables = tables_by_tree(self.config["cost_table"])
            return GoodputWindow(tables.get(self.config["tree"]) or tables[None])
        if self.config["tree"] is not None:
            return FixedWindow(self.config["window"])
        return FixedWindow(clamp_window(self.config["window"], model.num_tokens))

    def decode(self, model: Any, conditions: Conditions, run: Run) -> Samples:
        """Run the decoding loop; for window "auto" measure the costs of a pass first if need be."""
        config = self.config
        if config["tree"] is not None and not _takes_trees(model):
            raise InputError(
                f"tree {config['tree']!r} with {type(model).__name__}, which takes no tree of its "
                "own for every row: expected tree None"
            )
        if config["window"] != "auto":
            return super().decode(model, conditions, run)
        table, tree = config["cost_table"], config["tree"]
        if len(conditions):
            if table is None:
                table = self._measured(model, conditions, plain_scale(run.guidance_scale))
            tree = tree or self._best_tree(model, table, len(conditions))
        sampler = cast(SJDSampler, self.with_options(cost_table=table, tree=tree))
        sampler._memories = self._memories
        samples = TokenSampler.decode(sampler, model, conditions, run)
        samples.stats["cost_table"], samples.stats["tree"] = table, tree
        return samples

    def _measured(self, model: Any, conditions: Conditions, guidance_scale: Any) -> list[list[Any]]:
        """The costs of chains and of trees; of the tree that was asked for, if there is one."""
        config = self.config
        label = f"{self.name} {config['coupling']} {config['init']}"
        fitting = [tree for tree in TREES if self._can(model, tree)]
        table: list[list[Any]] = []
        for tree in [config["tree"]] if config["tree"] else [None, *fitting]:
            entries = measured_costs(
                lambda window, tree=tree: self.with_options(
                    window=window, cost_file=None, tree=tree
                ),
                label if tree is None else f"{label} {tree} {config['min_share']}",
                model,
                conditions,
                guidance_scale,
                config["cost_file"],
            )
            table += entries if tree is None else [[*entry, tree] for entry in entries]
        return table

    def _can(self, model: Any, tree: str) -> bool:
        """Whether trees of this kind go with the other options and with the model."""
        config = self.config
        return (
            TREES[tree] == coupling_name(config["coupling"])
            and config["reuse"] is None
            and (tree != "drift" or config["init"] in FROM_LAWS)
            and _takes_trees(model)
        )

    def _best_tree(self, model: Any, table: Any, num_rows: int) -> str | None:
        """What promises most tokens per second: a tree of the table, or None for chains."""
        promised = {
            tree: GoodputWindow(own).best(num_rows, model.num_tokens)
            for tree, own in tables_by_tree(table).items()
            if tree is None or self._can(model, tree)
        }
        if not promised:
            raise InputError(
                f"cost_table for trees alone, which coupling {self.config['coupling']!r} or the "
                "model does not take: expected entries for chains"
            )
        return max(promised, key=lambda tree: (promised[tree], tree is None))


def _takes_trees(model: Any) -> bool:
    return isinstance(model, TakesTrees) and model.takes_trees
