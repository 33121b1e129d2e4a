"""One picture file to bytes: what is read, what counts as lossy, and how it becomes 8-bit RGB.

Pixels are those that torch-fidelity and clean-fid get from Pillow's `convert("RGB")`, so figures stay
comparable: alpha is dropped and the colour under it kept, palettes are looked up, CMYK is converted
by Pillow's formula, and neither an EXIF orientation nor a colour profile nor gamma is applied. We
depart where they would score something else than the picture: grey levels of 9 to 16 bits are
brought to 8 by their high bits, as Pillow does with 16-bit colours (they clip them to white), and
floats or 32-bit integers, whose white is written nowhere, are refused.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import ArvisionError, InputError

MAX_PIXELS = 2**26
"""Pixels that a picture may have: 8192 x 8192, known from its header before anything is decoded."""

UNREAD = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IMT", "MCIDAS", "MPEG", "SPIDER", "WMF"}
"""What Pillow knows and we do not open: programs for Ghostscript, films, tables of measurements."""

LOSSLESS = {
    *("BMP", "CUR", "DCX", "DIB", "FLI", "GBR", "GIF", "ICO", "IM", "MSP", "PCX", "PIXAR", "PNG"),
    *("PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
}
"""Formats that keep every pixel, TIFF and WebP with some of their compressions; others are lossy."""

LOSSLESS_TIFF = {
    *("raw", "tiff_ccitt", "group3", "group4", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate"),
    *("tiff_raw_16", "packbits", "lzma", "zstd"),
}
MARKED = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "AVIF", "QOI", "PSD", "PPM")
"""Formats known by their first bytes, whatever a file is called; others by its ending too."""

PLAIN = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339  # tags of TIFF and EXIF


@dataclass(frozen=True)
class PictureFacts:
    """What a picture's header says.

    Attributes:
        size: width and height.
        lossy: the format if it may have changed pixels, else None.
        notes: what reading it leaves out or changes, in words.
    """

    size: tuple[int, int]
    lossy: str | None
    notes: tuple[str, ...]


@lru_cache(maxsize=1)
def read_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened, those of its plug-ins too."""
    Image.init()
    return tuple(sorted(name for name in Image.OPEN if name not in UNREAD))


@lru_cache(maxsize=1)
def _suffixes() -> dict[str, str]:
    """Endings of names that promise a picture, such as ".png", and the format that they promise."""
    formats = read_formats()
    return {end: name for end, name in Image.registered_extensions().items() if name in formats}


def is_called_picture(name: str | Path) -> bool:
    """Whether the ending of a name promises a picture."""
    return Path(name).suffix.lower() in _suffixes()


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Any error of a decoder as one line: strangers' bytes raise almost everything."""
    try:
        yield
    except ArvisionError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} cannot be read as a picture (no format we know)") from error
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise InputError(f"{name} cannot be read as a picture ({reason})") from error


def _too_large(name: str) -> InputError:
    side = int(MAX_PIXELS**0.5)
    return InputError(f"{name} has more than {MAX_PIXELS:,} pixels: expected {side}x{side} at most")


def open_picture(file: BinaryIO | Image.Image, name: str) -> Image.Image:
    """A picture whose header is read and whose size is allowed; nothing is decoded yet.

    Args:
        file: at its start and seekable, or a picture that is open already.
        name: for messages.

    Raises:
        InputError: no picture, more than `MAX_PIXELS` pixels, or samples without a known white.
    """
    with _reading(name):
        picture = file
        if not isinstance(picture, Image.Image):
            promised = _suffixes().get(Path(name).suffix.lower(), MARKED[0])
            formats = [*MARKED] if promised in MARKED else [promised, *MARKED]
            picture = Image.open(picture, formats=[f for f in formats if f in read_formats()])
        if picture.width * picture.height > MAX_PIXELS:
            raise _too_large(name)
        if picture.width * picture.height == 0:
            raise InputError(f"{name} is {picture.width}x{picture.height}: expected pixels")
        if picture.mode not in PLAIN and _bits(picture) is None:
            raise InputError(
                f"{name} has samples of mode {picture.mode}, whose white is not known: expected 8 "
                "or 16 bits"
            )
        return picture


def picture_facts(picture: Image.Image, file: Any) -> PictureFacts:
    """What the header of an open picture says.

    Args:
        picture: see `open_picture`.
        file: its bytes, seekable; None for a picture in memory.
    """
    notes = []
    if picture.mode[-1:] in "Aa" or "transparency" in picture.info:
        notes.append("alpha left out")
    if picture.mode[:1] == "P":
        notes.append("palette of at most 256 colours")
    if picture.mode not in PLAIN or any(";16" in str(part[3]) for part in _tiles(picture)):
        notes.append("more than 8 bits a sample, the high 8 taken")
    if picture.mode in ("CMYK", "YCbCr", "HSV"):
        notes.append(f"{picture.mode} made RGB")
    if _is_turned(picture):
        notes.append("EXIF orientation not applied")
    if picture.info.get("icc_profile"):
        notes.append("colour profile not applied")
    if getattr(picture, "is_animated", False):
        notes.append("first of several frames")
    return PictureFacts(picture.size, _lossy(picture, file), tuple(notes))


def _tiles(picture: Image.Image) -> Any:
    return [part for part in getattr(picture, "tile", None) or [] if len(part) > 3]


def _tag(picture: Image.Image, number: int) -> Any:
    """First value of a TIFF tag, None elsewhere."""
    value = getattr(picture, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value


def _is_turned(picture: Image.Image) -> bool:
    turn = _tag(picture, ORIENTATION)
    if turn is None and isinstance(data := picture.info.get("exif"), bytes):
        exif = Image.Exif()
        with contextlib.suppress(Exception):  # a broken EXIF block turns nothing
            exif.load(data)
        turn = exif.get(ORIENTATION)
    return turn not in (None, 1)


def _lossy(picture: Image.Image, file: Any) -> str | None:
    kind = picture.format
    if kind is None:  # made in memory
        return None
    if kind == "TIFF":
        means = str(picture.info.get("compression", "raw"))
        is_exact = means in LOSSLESS_TIFF and picture.mode != "YCbCr"
        return None if is_exact else f"{means.removeprefix('tiff_')} inside TIFF"
    if kind == "WEBP":
        return "lossy WebP" if file is None or _is_lossy_webp(file) else None
    return None if kind in LOSSLESS else kind


def _is_lossy_webp(file: BinaryIO) -> bool:
    """Whether a WebP holds a frame of the lossy kind (chunk "VP8 "), else "VP8L" only.

    Source: Google, "WebP Container Specification" (RFC 9649, section 2).
    """
    place = 12
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return False
        kind, length = struct.unpack("<4sI", head)
        if kind == b"VP8 ":
            return True
        place += 8 + (16 if kind == b"ANMF" else length + length % 2)  # a frame holds chunks


def _bits(picture: Image.Image) -> int | None:
    """Bits of a grey sample of more than 8, where a picture says; None where it does not."""
    is_tiff = picture.format == "TIFF"
    if picture.mode.startswith("I;16"):
        return int(_tag(picture, BITS) or 16) if is_tiff else 16
    if picture.mode != "I":
        return None
    if is_tiff:
        is_unsigned = _tag(picture, SAMPLE_FORMAT) in (None, 1)
        return 16 if is_unsigned and _tag(picture, BITS) == 16 else None
    return 16 if picture.format in ("PNG", "PPM", "JPEG2000") else None


def to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """An open picture as 8-bit RGB, see the top of this file.

    Raises:
        InputError: it cannot be decoded.
    """
    with _reading(name):
        bits = _bits(picture)
        if bits is not None:
            levels = np.asarray(picture).astype(np.int64)
            if levels.min() < 0 or levels.max() >= 2**bits:
                raise InputError(
                    f"{name} holds {levels.min()} to {levels.max()}: expected {bits} bits"
                )
            high = (levels >> (bits - 8)).astype(np.uint8)
            if picture.format == "TIFF" and _tag(picture, PHOTOMETRIC) == 0:  # white is 0
                high = 255 - high
            return Image.fromarray(high).convert("RGB")
        if picture.mode in ("La", "RGBa") or "transparency" in picture.info:
            # Out of premultiplied levels; and Pillow warns of palettes with levels of alpha.
            picture = picture.convert("RGBA")
        return picture.convert("RGB")


def as_seen(picture: Image.Image, name: str) -> Image.Image:
    """An open picture as viewers show it, as 8-bit RGB: turned as its EXIF says, on white where it is
    transparent.

    Raises:
        InputError: it cannot be decoded.
    """
    with _reading(name):
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode[-1:] in "Aa" or "transparency" in picture.info:
            coloured = picture.convert("RGBA")
            white = Image.new("RGBA", coloured.size, "white")
            return Image.alpha_composite(white, coloured).convert("RGB")
    return to_rgb(picture, name)
