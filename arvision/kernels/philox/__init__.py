"""Counter-based random bits: Philox4x32-10.

The Triton implementation is the library's own `triton.language.random.philox_impl`, which the
sampling kernel calls, too, so that its noise never touches memory.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import choose
from . import reference

__all__ = ["philox4x32"]


def philox4x32(
    counter: tuple[Tensor, ...], key: tuple[Tensor, ...], *, backend: str = "auto"
) -> Tensor:
    """Four random 32-bit words for each counter and key.

    Args:
        counter: four int64 tensors of words in 0..2^32-1 that broadcast together.
        key: two int64 tensors of words that broadcast with them.
        backend: see `arvision.kernels.dispatch`.

    Returns:
        [..., 4] int64 of words in 0..2^32-1, the same for every backend.

    Paper: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011, section 3.
    """
    if choose("philox", counter[0], backend).is_triton:
        from . import triton

        return triton.philox4x32(counter, key)
    return reference.philox4x32(counter, key)
