"""Pictures of what is drawn so far: finished rows, scales or latents, decoded while the rest is drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .contracts import DecodesPart
from .errors import InputError, check_count
from .models.pixels import written


def check_preview(every: Any, model: Any, callback: Any) -> int | None:
    """Passes between two previews; None for none.

    Raises:
        InputError: no number of passes, nobody to show them to, or tokens that are no single grid.
    """
    if every is None:
        return None
    if callback is None:
        raise InputError(
            "preview_every without callback_on_step_end: expected one, which is given the previews"
        )
    if not isinstance(model, DecodesPart) and getattr(model, "grid", None) is None:
        raise InputError(
            f"preview_every: the tokens of {type(model).__name__} are no single grid, expected none"
        )
    return check_count("preview_every", every)


@torch.no_grad()
def preview(model: Any, tokens: Tensor, is_final: Tensor) -> list[Any]:
    """PIL pictures of images that are being drawn; grey where nothing is final.

    Args:
        model: of the images.
        tokens: [B, N, ...], whatever stands at places that are not final.
        is_final: [B, N] bool.
    """
    if isinstance(model, DecodesPart):
        return written(model.decode_part(tokens, is_final).clamp(-1, 1), "pil")
    rows, columns = model.grid
    mask = is_final.view(-1, rows, columns)
    shape = mask.view(*mask.shape, *[1] * (tokens.dim() - 2))
    filled = torch.where(shape, tokens.unflatten(1, (rows, columns)), 0)
    # The decoder sees all of the picture: below what is final stands what is above it.
    for row in range(1, rows):
        filled[:, row] = torch.where(shape[:, row], filled[:, row], filled[:, row - 1])
    pixels = model.decode(filled.flatten(1, 2))
    seen = interpolate(mask[:, None].float(), size=pixels.shape[2:], mode="nearest") > 0
    return written(torch.where(seen, pixels, 0), "pil")
