"""Keep some candidates' keys and values: gather them to the front of the candidates' area."""

from __future__ import annotations

from torch import Tensor

from ...errors import InputError
from ..dispatch import choose
from . import reference

__all__ = ["compact_"]

MAX_KEPT = 128


def compact_(
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    kept: Tensor,
    counts: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Move, in place, slot `lengths[r] + kept[r, k]` to slot `lengths[r] + k` for k < `counts[r]`.

    All other slots keep what they hold; any order of `kept` is right.

    Args:
        keys: [L, R, H, S, D], any dtype and strides.
        values: like `keys`; their width D may be another one (PyTorch only).
        lengths: [R] int64, committed length of each row.
        kept: [R, K] int64, candidates in their new order; entries behind a row's count are ignored.
        counts: [R] int64 in 0..K.
        backend: see `arvision.kernels.dispatch`; Triton takes K <= 128.

    Raises:
        InputError: shapes that do not fit together.
    """
    rows = keys.shape[1] if keys.dim() == 5 else -1
    shapes = (tuple(lengths.shape), tuple(kept.shape[:1]), tuple(counts.shape))
    if keys.shape[:-1] != values.shape[:-1] or shapes != ((rows,),) * 3 or kept.dim() != 2:
        raise InputError(
            f"keys {tuple(keys.shape)}, values {tuple(values.shape)}, lengths {shapes[0]}, kept "
            f"{tuple(kept.shape)}, counts {shapes[2]}: expected [L, R, H, S, D] twice, [R], "
            f"[R, K], [R]"
        )
    limit = None
    if kept.shape[1] > MAX_KEPT:
        limit = f"compaction takes at most {MAX_KEPT} candidates a row, not {kept.shape[1]}"
    elif keys.stride() != values.stride():
        limit = "compaction takes keys and values of the same strides"
    if choose("compaction", keys, backend, limit).is_triton:
        from . import triton

        triton.compact_(keys, values, lengths, kept, counts)
    else:
        reference.compact_(keys, values, lengths, kept, counts)
