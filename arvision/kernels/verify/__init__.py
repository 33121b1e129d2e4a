"""Acceptance and residual sampling over a window of drafts, one program per position."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError, unknown_name
from ..dispatch import choose
from . import reference

__all__ = ["COUPLINGS", "verify", "verify_gumbel"]

COUPLINGS = ("maximal", "independent")
MAX_WINDOW = 1024


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


def verify_gumbel(
    drafts: Tensor, target_logp: Tensor, gumbel: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """argmax(log p + g) at every position, final through the first that differs from its draft.

    Args:
        drafts: [B, m] int64, -1 where a row has none.
        target_logp: [B, m + 1, V] float32 or float64.
        gumbel: like `target_logp`, standard Gumbel numbers.
        backend: see `arvision.kernels.dispatch`.

    Returns:
        Tokens [B, m + 1] and counts [B], both int64.

    Raises:
        InputError: shapes or dtypes that do not fit together.
    """
    batch, window = drafts.shape
    _check_laws(target_logp, batch, window)
    if gumbel.shape != target_logp.shape or gumbel.dtype != target_logp.dtype:
        raise InputError(
            f"gumbel {tuple(gumbel.shape)} {gumbel.dtype}: expected "
            f"{tuple(target_logp.shape)} {target_logp.dtype}"
        )
    if choose("verify", target_logp, backend, _limit(target_logp, window)).is_triton:
        from . import triton

        return triton.verify_gumbel(drafts, target_logp, gumbel)
    return reference.verify_gumbel(drafts, target_logp, gumbel)


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
