"""Nearest codebook row of each vector, as a matrix product and a running maximum."""

from __future__ import annotations

from torch import Tensor

from ...errors import InputError, unknown_name
from ..dispatch import choose
from . import reference

__all__ = ["METRICS", "nearest_code"]

METRICS = ("inner", "euclidean")
MAX_WIDTH = 256


def nearest_code(
    vectors: Tensor, codes: Tensor, *, metric: str = "inner", backend: str = "auto"
) -> Tensor:
    """Index of the code nearest to each vector; of equally near ones the first.

    Neither implementation forms a difference of a vector and a code, let alone of all of them:
    |z - c|^2 = |z|^2 - 2 z.c + |c|^2, and |z|^2 does not matter. The Triton one does not hold the
    [N, V] inner products either.

    Args:
        vectors: [..., D], floating point.
        codes: [V, D], same dtype.
        metric: "inner" for the largest inner product (on unit vectors: the largest cosine),
            "euclidean" for the smallest distance.
        backend: see `arvision.kernels.dispatch`; Triton takes D <= 256 and no float64.

    Returns:
        [...] int64 in 0..V-1.

    Raises:
        InputError: an unknown metric, widths or dtypes that differ, or an empty codebook.
    """
    if metric not in METRICS:
        raise unknown_name("metric", metric, METRICS)
    if codes.dim() != 2 or len(codes) == 0 or vectors.shape[-1:] != codes.shape[1:]:
        raise InputError(
            f"vectors {tuple(vectors.shape)} and codes {tuple(codes.shape)}: "
            f"expected [..., D] and [V, D], V > 0"
        )
    if vectors.dtype != codes.dtype:
        raise InputError(f"vectors are {vectors.dtype}, codes {codes.dtype}: expected one dtype")
    limit = None
    if codes.shape[1] > MAX_WIDTH:
        limit = f"nearest_code takes codes of width <= {MAX_WIDTH}, not {codes.shape[1]}"
    elif codes.element_size() > 4:
        limit = f"nearest_code takes no {codes.dtype}"
    if choose("nearest_code", codes, backend, limit).is_triton:
        from . import triton

        return triton.nearest_code(vectors, codes, metric)
    return reference.nearest_code(vectors, codes, metric)
