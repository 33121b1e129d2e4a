"""Guidance, temperature, top-k, top-p and a draw in few passes over the logits, without sorting.

The k-th largest logit and the logit that crosses the mass are found by narrowing an interval of
floating-point numbers, eight pivots a pass, at most eleven passes each: counts are exact, so top-k
is, ties included. Mass is summed in float64, where the reference sums a float32 softmax: the two
may keep a token more or less where the mass lies within about 1e-6 of `top_p`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ..dispatch import choose
from . import reference
from .laws import Laws
from .reference import Shaping, guide

__all__ = ["Laws", "Shaping", "draw_gumbel", "guide", "laws_of", "sample_gumbel"]
__all__ += ["sample_inverse", "shape"]

MAX_SIZE = 1 << 30


def shape(
    logits: Tensor,
    how: Shaping = Shaping(),
    null_logits: Tensor | None = None,
    guidance_scale: float = 1.0,
    *,
    check: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The law that the logits stand for; `Shaping.__call__` with checks and a choice of backend.

    Args:
        logits: [R, V]; conditional ones where `null_logits` is given, else already guided.
        how: temperature, top-k and top-p; of equal tokens at the threshold of top-p the first ones
            stay.
        null_logits: [R, V] of the null condition, same dtype.
        guidance_scale: weight of the conditional logits.
        check: refuse NaN, and rows without a finite logit; on an accelerator it waits for a result.
        backend: see `arvision.kernels.dispatch`; Triton takes no float64 and no gradients.

    Returns:
        Log-probabilities [R, V], -inf where a token was cut; float32, float64 for float64 logits.

    Raises:
        InputError: shapes that differ, or what `check` refuses, naming the row.
    """
    _check(logits, null_logits, check)
    if choose("sampling", logits, backend, _limit(logits)).is_triton:
        from . import triton

        return triton.shape(logits, how, null_logits, guidance_scale)
    return reference.shape(logits, how, null_logits, guidance_scale)


def laws_of(
    logits: Tensor,
    how: Shaping,
    null_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    *,
    backend: str = "auto",
) -> Tensor | Laws:
    """The laws of logits for who may only want to draw from them.

    Args:
        logits: [..., V].
        how: see `shape`, and so the others.
        guidance_scale: a number, or weights that broadcast to [..., 1], in the logits' dtype.

    Returns:
        `Laws`, of which nothing was made yet, where Triton runs; else log-probabilities [..., V].
    """
    if choose("sampling", logits, backend, _limit(logits)).is_triton:
        return Laws(logits, how, null_logits, guidance_scale)
    return reference.shape(logits, how, null_logits, guidance_scale)


def sample_gumbel(
    logits: Tensor,
    identity: Tensor,
    how: Shaping = Shaping(),
    use: int = 0,
    null_logits: Tensor | None = None,
    guidance_scale: float = 1.0,
    *,
    check: bool = False,
    backend: str = "auto",
) -> Tensor:
    """argmax(log p + g) of each row's law; the Gumbel numbers are made where they are used.

    They are those of `arvision.decoding.noise.Noise.gumbel`: word v % 4 of Philox4x32-10 at the
    counter (image, position, v // 4, use).

    Args:
        logits: [R, V].
        identity: [R, 4] int64: seed's low and high word, image, position.
        how: see `shape`, and so the others.
        use: the counter's last word.

    Returns:
        [R] int64.
    """
    _check(logits, null_logits, check)
    if identity.shape != (len(logits), 4) or identity.dtype != torch.int64:
        raise InputError(
            f"identity {tuple(identity.shape)} {identity.dtype}: expected [{len(logits)}, 4] int64"
        )
    given = (logits, identity, how, use, null_logits, guidance_scale)
    if choose("sampling", logits, backend, _limit(logits)).is_triton:
        from . import triton

        return triton.sample_gumbel(*given)
    return reference.sample_gumbel(*given)


def draw_gumbel(logp: Tensor, words: Tensor, positions: Tensor, *, backend: str = "auto") -> Tensor:
    """argmax(log p + g) of laws that stand in memory; the Gumbel numbers never do.

    They are those of `sample_gumbel` for `use` 0, so that candidates at one position (siblings in a
    tree) share theirs.

    Args:
        logp: [B, T, V] float32 or float64, or [B, 1, V] for one law at all positions.
        words: [B, 3] int64: seed's low and high word, image.
        positions: [B, T] int64.
        backend: see `arvision.kernels.dispatch`.

    Returns:
        [B, T] int64.

    Raises:
        InputError: shapes or dtypes that do not fit together.
    """
    batch, num = positions.shape
    if logp.dim() != 3 or len(logp) != batch or logp.shape[1] not in (1, num):
        raise InputError(
            f"logp {tuple(logp.shape)}: expected [{batch}, {num}, V] or [{batch}, 1, V]"
        )
    if words.shape != (batch, 3):
        raise InputError(f"words {tuple(words.shape)}: expected [{batch}, 3]")
    limit = None
    if logp.dtype not in (torch.float32, torch.float64):
        limit = f"a draw takes laws in float32 or float64, not {logp.dtype}"
    if choose("sampling", logp, backend, limit).is_triton:
        from . import triton

        return triton.draw_gumbel(logp, words, positions)
    return reference.draw_gumbel(logp, words, positions)


def sample_inverse(
    logits: Tensor,
    uniforms: Tensor,
    how: Shaping = Shaping(),
    null_logits: Tensor | None = None,
    guidance_scale: float = 1.0,
    *,
    check: bool = False,
    backend: str = "auto",
) -> Tensor:
    """A draw from each row's law by inversion, see `arvision.kernels.inversion.draw`.

    Args:
        logits: [R, V].
        uniforms: [R] float64 in (0, 1).
        how: see `shape`, and so the others.

    Returns:
        [R] int64.
    """
    _check(logits, null_logits, check)
    if uniforms.shape != (len(logits),) or uniforms.dtype != torch.float64:
        raise InputError(
            f"uniforms {tuple(uniforms.shape)} {uniforms.dtype}: expected [{len(logits)}] float64"
        )
    given = (logits, uniforms, how, null_logits, guidance_scale)
    if choose("sampling", logits, backend, _limit(logits)).is_triton:
        from . import triton

        return triton.sample_inverse(*given)
    return reference.sample_inverse(*given)


def _check(logits: Tensor, null_logits: Tensor | None, check: bool) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise InputError(f"logits {tuple(logits.shape)} {logits.dtype}: expected floats [R, V > 0]")
    given = logits if null_logits is None else null_logits
    if given.shape != logits.shape or given.dtype != logits.dtype:
        raise InputError(
            f"null_logits {tuple(given.shape)} {given.dtype}: expected {tuple(logits.shape)} "
            f"{logits.dtype}"
        )
    if check:
        for name, tensor in (("logits", logits), ("null_logits", null_logits)):
            if tensor is not None:
                _refuse_unusable(name, tensor)


def _refuse_unusable(name: str, logits: Tensor) -> None:
    # A row's maximum is NaN where any of its logits is.
    top = logits.amax(dim=1)
    wrong = (~top.isfinite()).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"{name} row {row}: its largest logit is {float(top[row])}; expected no NaN, no +inf "
            f"and at least one finite logit"
        )


def _limit(logits: Tensor) -> str | None:
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"sampling takes no {logits.dtype}"
    if logits.requires_grad and torch.is_grad_enabled():
        return "sampling gives no gradients"
    if logits.shape[1] > MAX_SIZE:
        return f"sampling takes at most {MAX_SIZE} logits a row, not {logits.shape[1]}"
    return None
