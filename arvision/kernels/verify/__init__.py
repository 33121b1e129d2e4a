"""What stays of drafts: acceptance and residual sampling over a window, one program per position, and
the walks down a chain or a tree, one program per row."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError, unknown_name
from ..dispatch import choose
from . import reference

__all__ = ["COUPLINGS", "follow", "in_turn", "verify"]

COUPLINGS = ("maximal", "independent")
MAX_WINDOW = 1024
MAX_TREE = 64


def verify(
    drafts: Tensor,
    draft_logp: Tensor,
    target_logp: Tensor,
    accept_uniforms: Tensor,
    recover_uniforms: Tensor,
    fresh_uniforms: Tensor,
    *,
    coupling: str,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Keep each draft with probability min(1, p / q), draw the recovered ones and the bonus.

    The same decisions as `arvision.decoding.verify` makes from the same numbers. In float32 the two
    implementations may differ where a uniform number lies within rounding of a boundary, once in
    about 10^7 draws.

    Args:
        drafts: [B, m] int64, -1 where a row has none.
        draft_logp: [B, m, V] float32 or float64, the laws that the drafts were drawn from.
        target_logp: [B, m + 1, V], same dtype.
        accept_uniforms: [B, m] float64 in (0, 1).
        recover_uniforms: [B, m] float64, for draws from the residual (p - q)+.
        fresh_uniforms: [B, m + 1] float64, for draws from p; "maximal" reads the last only.
        coupling: "maximal" (each position keeps or recovers) or "independent" (fresh draws behind
            the first rejection).
        backend: see `arvision.kernels.dispatch`; Triton takes windows of at most 1024 drafts.

    Returns:
        Tokens [B, m + 1] and counts [B], both int64: `tokens[b, :counts[b]]` are final.

    Raises:
        InputError: an unknown coupling, or shapes or dtypes that do not fit together.
    """
    if coupling not in COUPLINGS:
        raise unknown_name("coupling", coupling, COUPLINGS)
    batch, window = drafts.shape
    _check_laws(target_logp, batch, window)
    size = target_logp.shape[2]
    if draft_logp.shape != (batch, window, size) or draft_logp.dtype != target_logp.dtype:
        raise InputError(
            f"draft_logp {tuple(draft_logp.shape)} {draft_logp.dtype}: expected "
            f"[{batch}, {window}, {size}] {target_logp.dtype}"
        )
    for name, uniforms, num in (
        ("accept_uniforms", accept_uniforms, window),
        ("recover_uniforms", recover_uniforms, window),
        ("fresh_uniforms", fresh_uniforms, window + 1),
    ):
        if uniforms.shape != (batch, num) or uniforms.dtype != torch.float64:
            raise InputError(
                f"{name} {tuple(uniforms.shape)} {uniforms.dtype}: expected [{batch}, {num}] float64"
            )
    given = (drafts, draft_logp, target_logp, accept_uniforms, recover_uniforms, fresh_uniforms)
    if choose("verify", target_logp, backend, _limit(target_logp, window)).is_triton:
        from . import triton

        return triton.verify(*given, coupling)
    return reference.verify(*given, coupling)


def follow(
    drafts: Tensor,
    choice: Tensor,
    tree: tuple[Tensor, Tensor, Tensor] | None = None,
    num_levels: int = 0,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Walk down the drafts as long as they are what was chosen.

    Args:
        drafts: [B, m] int64, -1 where a row has none.
        choice: [B, m + 1] int64, the token chosen under each law.
        tree: of the drafts: which law judges each, how deep it stands, and which are its ancestors
            (itself included) as bits of one integer, each [m] or [B, m] int64; None for a chain.
        num_levels: of the tree, at least its largest depth plus one.
        backend: see `arvision.kernels.dispatch`; Triton takes trees of at most 64 drafts.

    Returns:
        Tokens [B, m + 1], counts [B] and None for a chain; for a tree tokens [B, levels + 1],
        counts and the path [B, levels] of the longest way down. `tokens[b, :counts[b]]` and
        `path[b, :counts[b] - 1]` mean something.

    Raises:
        InputError: shapes that do not fit together.
    """
    batch, num = drafts.shape
    if choice.shape != (batch, num + 1):
        raise InputError(f"choice {tuple(choice.shape)}: expected [{batch}, {num + 1}]")
    for name, part in zip(("laws", "depths", "ancestors"), tree or (), strict=False):
        if part.shape not in ((num,), (batch, num)):
            raise InputError(f"{name} {tuple(part.shape)}: expected [{num}] or [{batch}, {num}]")
    limit = None
    if tree is not None and num > MAX_TREE:
        limit = f"verify takes trees of at most {MAX_TREE} drafts, not {num}"
    elif num > MAX_WINDOW:
        limit = f"verify takes windows of at most {MAX_WINDOW} drafts, not {num}"
    if choose("verify", drafts, backend, limit).is_triton:
        from . import triton

        return triton.follow(drafts, choice, tree, num_levels)
    return reference.follow(drafts, choice, tree, num_levels)


def in_turn(
    drafts: Tensor,
    children: Tensor,
    target_logp: Tensor,
    draft_logp: Tensor | None,
    accept_uniforms: Tensor,
    recover_uniforms: Tensor,
    num_levels: int,
    *,
    replaces: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk down a tree whose siblings are tried one after another; see `arvision.decoding.tree_rules`.

    In float32 the two implementations may differ where a uniform number lies within rounding of a
    boundary, once in about 10^7 decisions.

    Args:
        drafts: [B, m] int64, -1 where a row has none.
        children: [m + 1, C] or [B, m + 1, C] int64, the drafts that each law judges, in order; -1
            for none.
        target_logp: [B, m + 1, V].
        draft_logp: [B, m, V], same dtype, laws that siblings were drawn from (that of the first one
            counts); None for drafts that were chosen.
        accept_uniforms: [B, m + 1, C] float64 in (0, 1), for the siblings at each place.
        recover_uniforms: [B, m + 1] float64, for the draw where the walk ends.
        num_levels: of the tree.
        replaces: whether siblings were drawn independently, else without replacement.
        backend: see `arvision.kernels.dispatch`.

    Returns:
        Tokens [B, levels + 1], counts [B] and the path [B, levels]: `tokens[b, :counts[b]]` and
        `path[b, :counts[b] - 1]` mean something.

    Raises:
        InputError: shapes or dtypes that do not fit together.
    """
    batch, num = drafts.shape
    _check_laws(target_logp, batch, num)
    if children.dim() not in (2, 3) or children.shape[-2] != num + 1:
        raise InputError(
            f"children {tuple(children.shape)}: expected [{num + 1}, C] or [{batch}, ..]"
        )
    expected = (batch, num, target_logp.shape[2])
    if draft_logp is not None and draft_logp.shape != expected:
        raise InputError(f"draft_logp {tuple(draft_logp.shape)}: expected {list(expected)}")
    given = (drafts, children, target_logp, draft_logp, accept_uniforms, recover_uniforms)
    if choose("verify", target_logp, backend, _limit(target_logp, 0)).is_triton:
        from . import triton

        return triton.in_turn(*given, num_levels, replaces)
    return reference.walk(
        *given, num_levels, lambda siblings: reference.in_turn(siblings, replaces)
    )


def _check_laws(target_logp: Tensor, batch: int, window: int) -> None:
    if target_logp.dim() != 3 or target_logp.shape[:2] != (batch, window + 1):
        raise InputError(
            f"target_logp {tuple(target_logp.shape)}: expected [{batch}, {window + 1}, V], one law "
            f"more than drafts"
        )


def _limit(target_logp: Tensor, window: int) -> str | None:
    if target_logp.dtype not in (torch.float32, torch.float64):
        return f"verify takes laws in float32 or float64, not {target_logp.dtype}"
    if window > MAX_WINDOW:
        return f"verify takes windows of at most {MAX_WINDOW} drafts, not {window}"
    return None
