"""Pictures as users have them to the pixels that image tokenizers encode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from ..errors import InputError
from ..networks import enter, place_of

SLACK = 1e-3
"""How far a float pixel may lie outside of [-1, 1]: what half precision rounds 1 to, and more."""


def check_codes(indices: Tensor, size: int) -> None:
    """Refuse code indices outside of 0..size - 1; a compiled graph takes them as checked.

    Raises:
        InputError: see above.
    """
    if torch.compiler.is_compiling() or not indices.numel():
        return
    if not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise InputError(f"code indices must lie in 0..{size - 1}")


def read_pixels(
    images: Any,
    like: Any,
    *,
    multiple: int = 1,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] of pictures, on the device and in the dtype of a network.

    Args:
        images: see `pixels_of`, like the others and the errors.
        like: the network, for its place and `dtype`.
        multiple: likewise.
        size: likewise.
    """
    return pixels_of(images, multiple=multiple, size=size).to(place_of(like), like.dtype)


class EncodesPixels:
    """Mixin of models whose `tokenizer` has the entry `encode_pixels`, see `arvision.contracts.Encodes`."""

    tokenizer: Any

    @torch.no_grad()
    def tokens_of(self, pixels: Tensor) -> Tensor:
        """Tokens [B, N, ...] of pixels [B, 3, H, W] in [-1, 1]."""
        return enter(self.tokenizer, "encode_pixels", read_pixels(pixels, self.tokenizer))


def pixels_of(images: Any, *, multiple: int = 1, size: tuple[int, int] | None = None) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] of pictures.

    Args:
        images: a PIL image, an array or tensor [H, W, 3], [3, H, W] or with a batch in front, uint8
            in 0..255 or float in [-1, 1]; or a list of those, all of one size.
        multiple: what must divide both sides.
        size: height and width that they must have; None for any.

    Raises:
        InputError: something else, another size, a value out of range, NaN or infinity.
    """
    listed = images if isinstance(images, (list, tuple)) else [images]
    if not listed:
        raise InputError("no images: expected at least one")
    parts = [_read(image) for image in listed]
    for part in parts:
        shape = tuple(part.shape)
        if size is not None and shape[2:] != size:
            raise InputError(
                f"pixels {shape}: expected [B, 3, {size[0]}, {size[1]}], pictures of {size[0]} rows and "
                f"{size[1]} columns; crop or resize"
            )
        if not part.numel() or shape[2] % multiple or shape[3] % multiple:
            raise InputError(
                f"pixels {shape}: expected sides that {multiple} divides; crop or resize"
            )
    sizes = {tuple(part.shape[2:]) for part in parts}
    if len(sizes) > 1:
        raise InputError(f"images of sizes {sorted(sizes)}: expected one size")
    return torch.cat([part.to(parts[0].device) for part in parts])


def _read(image: Any) -> Tensor:
    """One picture or batch as float pixels [B, 3, H, W]."""
    if hasattr(image, "convert"):
        check_depth(image)
        image = np.array(image.convert("RGB"))
    if not isinstance(image, (np.ndarray, Tensor)):
        raise InputError(
            f"images of type {type(image).__name__}: expected PIL images, arrays or tensors"
        )
    is_array = isinstance(image, np.ndarray)
    if is_array and image.dtype.kind not in "fu":
        raise InputError(f"pixels of type {image.dtype}: expected uint8, or float in [-1, 1]")
    pixels = torch.from_numpy(np.ascontiguousarray(image)) if is_array else image
    pixels = _channels_first(pixels, prefers_last=is_array)
    if pixels.dtype == torch.uint8:
        return pixels.float() / 127.5 - 1
    if not pixels.is_floating_point():
        raise InputError(f"pixels of type {pixels.dtype}: expected uint8, or float in [-1, 1]")
    if pixels.numel() and not bool(pixels.isfinite().all()):
        raise InputError("pixels hold NaN or infinity: expected float in [-1, 1]")
    if pixels.numel() and float(pixels.abs().max()) > 1 + SLACK:
        low, high = float(pixels.min()), float(pixels.max())
        raise InputError(
            f"pixels {low:.4g} to {high:.4g}: expected float in [-1, 1], or uint8 in 0..255"
        )
    return pixels


def check_depth(image: Any) -> None:
    """Refuse PIL pictures of 16 and 32 bits or floats, whose levels PIL cuts off at 255.

    Raises:
        InputError: see above.
    """
    mode = getattr(image, "mode", None)
    if isinstance(mode, str) and mode[:1] in ("I", "F"):
        raise InputError(f"image of mode {mode!r}: expected 8 bits a channel")


def _channels_first(pixels: Tensor, prefers_last: bool) -> Tensor:
    """[3, H, W] or [H, W, 3], with or without a batch, as [B, 3, H, W]."""
    shape: Sequence[int] = tuple(pixels.shape)
    if pixels.dim() == 3:
        pixels = pixels[None]
    if pixels.dim() == 4 and 3 in (pixels.shape[1], pixels.shape[3]):
        is_last = pixels.shape[3] == 3 and (prefers_last or pixels.shape[1] != 3)
        return pixels.permute(0, 3, 1, 2) if is_last else pixels
    raise InputError(f"pixels {shape}: expected [B, 3, H, W] or [B, H, W, 3], or one of those")


def as_source(image: Any) -> Any:
    """A picture in any of the forms of `read_pixels` as PIL has it; codes [h, w] of integers stay.

    Raises:
        InputError: something else, several pictures, or a value out of range.
    """
    if isinstance(image, np.ndarray) and image.ndim == 2 and image.dtype.kind in "iu":
        image = torch.from_numpy(image.astype(np.int64))
    is_codes = isinstance(image, Tensor) and image.dim() == 2 and not image.is_floating_point()
    if is_codes or hasattr(image, "convert"):
        return image
    pixels = _read(image)
    if len(pixels) != 1:
        raise InputError(f"a source image of {len(pixels)} pictures: expected one")
    array = (pixels[0].float().permute(1, 2, 0).cpu() * 127.5 + 127.5).round().to(torch.uint8)
    return PIL.Image.fromarray(array.numpy())


def written(pixels: Tensor, output_type: str) -> Any:
    """Decoded pixels as users have pictures.

    Args:
        pixels: [B, 3, H, W] in [-1, 1].
        output_type: "pt" for a tensor, "np" for an array [B, H, W, 3], both in [0, 1], or "pil".

    Raises:
        InputError: NaN or infinity among them.
    """
    pixels = pixels / 2 + 0.5
    if not bool(pixels.isfinite().all()):
        raise InputError(
            "the tokenizer decoded NaN or infinity: expected finite pixels; look at its weights "
            'and its dtype (output_type="latent" gives the tokens)'
        )
    if output_type == "pt":
        return pixels
    array = pixels.permute(0, 2, 3, 1).cpu().float().numpy()
    return array if output_type == "np" else DiffusionPipeline.numpy_to_pil(array)
