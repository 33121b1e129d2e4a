"""Pictures as strangers have them: depth, lossy content under any name, odd folders, archives, bombs."""

from __future__ import annotations

import io
import os
import shutil
import socket
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from arvision.errors import InputError
from arvision.eval import arrays as arrays_module
from arvision.eval import get_extractor, open_source
from arvision.eval.arrays import NpzFile, open_npy
from arvision.eval.full_report import full_report
from arvision.eval.picture_sources import FolderSource, is_hidden, natural_key
from arvision.eval.pictures import LOSSLESS, MAX_PIXELS, UNREAD, read_formats
from arvision.models.conditions import Prompt

CONV = get_extractor("random-conv")
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
PICTURE = Image.fromarray(COLOURS)


def save(path: Path, picture: Image.Image = PICTURE, kind: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, kind, **options)
    return path


def pixels(path: Path, **options) -> np.ndarray:
    """The pixels [H, W, 3] of one picture, as evaluation reads it."""
    source = open_source([path], **options)
    return source.read(0, 1)[0].permute(1, 2, 0).numpy()


# Depth.

LEVELS = np.arange(256, dtype=np.uint16).reshape(16, 16)


@pytest.mark.parametrize("step", [257, 256])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "big-endian.tif", "a.jp2", "white-is-zero.tif"])
def test_16_bit_grey_is_scaled_by_its_depth(tmp_path, name, step):
    levels = LEVELS * step
    if name.startswith("white"):
        save(tmp_path / name, Image.fromarray(65535 - levels), tiffinfo={262: 0})
    else:
        kind = ">u2" if name.startswith("big") else np.uint16
        save(tmp_path / name, Image.fromarray(levels.astype(kind)))
    found = pixels(tmp_path / name, allow_jpeg=True)
    assert np.array_equal(found, np.repeat(LEVELS[..., None], 3, 2))


def pgm(largest: int, values: np.ndarray) -> bytes:
    kind = ">u2" if largest > 255 else np.uint8
    side = f"{values.shape[1]} {values.shape[0]}"
    return f"P5 {side} {largest}\n".encode() + values.astype(kind).tobytes()


@pytest.mark.parametrize("largest", [255, 1023, 4095, 65535])
def test_pgm_of_any_depth(tmp_path, largest):
    steps = np.arange(16).reshape(4, 4)
    (tmp_path / "a.pgm").write_bytes(pgm(largest, steps * largest // 15))
    assert np.abs(pixels(tmp_path / "a.pgm")[..., 0].astype(int) - steps * 17).max() <= 1


def tiff(bits: int, data: bytes, side: int = 4, sample_format: int = 1) -> bytes:
    """A little-endian grey TIFF of one strip."""
    tags = [(256, side), (257, side), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, side), (279, len(data)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data
    return start + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def test_12_bit_tiff_is_scaled_by_12_bits(tmp_path):
    levels = np.arange(16) * 273  # 0..4095
    packed = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in levels.reshape(-1, 2).tolist()
    )
    (tmp_path / "a.tif").write_bytes(tiff(12, packed))
    assert pixels(tmp_path / "a.tif")[..., 0].ravel().tolist() == [17 * k for k in range(16)]


def test_16_bit_colours_keep_their_high_byte(tmp_path):
    rows = b"".join(
        b"\0" + (COLOURS[y].astype(np.uint16) * 257).astype(">u2").tobytes() for y in range(16)
    )
    (tmp_path / "a.png").write_bytes(png(16, 16, rows, depth=16, colour=2))
    assert np.array_equal(pixels(tmp_path / "a.png"), COLOURS)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("float.tif", tiff(32, np.ones(16, np.float32).tobytes(), sample_format=3)),
        ("long.tif", tiff(32, np.ones(16, np.uint32).tobytes())),
        ("signed.tif", tiff(16, np.ones(16, np.int16).tobytes(), sample_format=2)),
        ("float.pfm", b"Pf\n4 4\n-1.0\n" + np.ones(16, np.float32).tobytes()),
    ],
)
def test_samples_without_a_known_white_are_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name} has samples of mode [FI], whose white is not"):
        open_source(tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_what_pillow_converts(tmp_path, mode):
    picture = PICTURE.convert(mode)
    name = "a.tif" if mode in ("CMYK", "YCbCr") else "a.png"
    save(tmp_path / name, picture)
    try:
        wanted = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    except OSError:
        pytest.skip("Pillow before 13 does not read the YCbCr that it wrote")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = pixels(tmp_path / name, allow_jpeg=True)
    assert np.array_equal(found, wanted)
    assert bool(said) is (mode not in ("1", "L"))


def test_alpha_is_dropped_and_the_colour_under_it_stays(tmp_path):
    clear = PICTURE.copy()
    clear.putalpha(0)
    with pytest.warns(UserWarning, match=r"1 read: alpha left out \(a.png\)"):
        assert np.array_equal(pixels(save(tmp_path / "a.png", clear)), COLOURS)


def test_an_exif_orientation_is_named_and_not_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    with pytest.warns(UserWarning, match="EXIF orientation not applied"):
        assert np.array_equal(pixels(save(tmp_path / "a.png", exif=exif)), COLOURS)


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_prompts_take_no_picture_that_would_turn_white(mode):
    with pytest.raises(InputError, match=f"image of mode '{mode}': expected 8 bits a channel"):
        Prompt("a cat", images=[Image.new(mode, (8, 8))])
    assert Prompt("a cat", images=(PICTURE,)).images == (PICTURE,)


# Lossy content.

LOSSY = {
    "JPEG": {},
    "MPO": {},
    "WEBP": {"quality": 90},
    "AVIF": {},
    "JPEG2000": {"irreversible": True},
    "TIFF": {"compression": "jpeg"},
    "DDS": {"pixel_format": "DXT1"},
}


@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".webp", ".jpg", ".gif", ""])
def test_lossy_content_never_passes_as_lossless(tmp_path, kind, suffix):
    if kind == "DDS":
        suffix = ".dds"
    save(tmp_path / f"0{suffix}", kind=kind, **LOSSY[kind])
    for given in (tmp_path, [tmp_path / f"0{suffix}"], [Image.open(tmp_path / f"0{suffix}")]):
        with pytest.raises(InputError, match=r"changes every distance: expected a lossless format"):
            open_source(given)
    with pytest.warns(UserWarning, match="1 read: lossy"):
        assert len(open_source(tmp_path, allow_jpeg=True)) == 1


def test_lossy_frames_and_alpha_of_webp_are_seen(tmp_path):
    frames = {"save_all": True, "append_images": [PICTURE.rotate(90)]}
    save(tmp_path / "film" / "a.webp", **frames)
    clear = PICTURE.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((16, 16)))
    save(tmp_path / "alpha" / "a.webp", clear)
    for folder in ("film", "alpha"):
        with pytest.raises(InputError, match="lossy WebP"):
            open_source(tmp_path / folder)
    save(tmp_path / "exact" / "a.webp", clear, lossless=True, exact=True)
    save(tmp_path / "exact" / "b.webp", lossless=True, **frames)
    with pytest.warns(UserWarning, match="first of several frames"):
        source = open_source(tmp_path / "exact")
    assert np.array_equal(source.read(0, 2).permute(0, 2, 3, 1).numpy(), [COLOURS, COLOURS])


EXACT = {
    "png": {},
    "jpg": {"kind": "PNG"},
    "bmp": {},
    "dib": {},
    "tif": {"compression": "tiff_lzw"},
    "tiff": {"compression": "tiff_adobe_deflate"},
    "webp": {"lossless": True},
    "ppm": {},
    "pnm": {"kind": "PPM"},
    "tga": {},
    "pcx": {},
    "sgi": {},
    "qoi": {},
    "ico": {"sizes": [(16, 16)]},
    "PNG": {},
}


@pytest.mark.parametrize("suffix", EXACT)
def test_lossless_formats_are_read(tmp_path, suffix):
    if suffix == "qoi" and "QOI" not in Image.SAVE:
        pytest.skip("this Pillow writes no QOI")
    save(tmp_path / f"a.{suffix}", **EXACT[suffix])
    source = open_source(tmp_path)
    assert np.array_equal(source.read(0, 1)[0].permute(1, 2, 0).numpy(), COLOURS)


def test_every_format_of_pillow_is_placed():
    known = {*LOSSLESS, *UNREAD, "JPEG", "JPEG2000", "AVIF", "DDS", "ICNS", "BLP", "FTEX", "PCD"}
    assert {*Image.OPEN} >= {*read_formats()}
    assert {*read_formats()} - known <= {"IPTC", "XVTHUMB", "WAL", "MPO", "HEIF", "JXL"}


# Folders.


def test_hidden_entries_are_skipped_and_the_rest_is_named(tmp_path):
    for number in range(3):
        save(tmp_path / f"{number}.png")
    save(tmp_path / ".ipynb_checkpoints" / "0-checkpoint.png")
    save(tmp_path / "__MACOSX" / "0.png")
    save(tmp_path / "@eaDir" / "0.png")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    for name in ("labels.txt", "captions.json", "notes", "BMW.md"):
        (tmp_path / name).write_text("BM is how this text begins")
    with pytest.warns(UserWarning, match=r"4 left out: no picture \(BMW.md, captions.json, "):
        source = open_source(tmp_path)
    assert len(source) == 3
    found = source.notes["left_out"]  # type: ignore[attr-defined]
    assert found["hidden"]["count"] == 7
    assert found["no picture"] == {
        "count": 4,
        "first": ["BMW.md", "captions.json", "labels.txt"],
    }
    assert not is_hidden("0.png")


def test_the_report_says_what_was_left_out(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png", PICTURE.rotate(90 * number))
    save(tmp_path / "4.tif", Image.fromarray(LEVELS * 257))
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "a|b.txt").write_text("x")
    with pytest.warns(UserWarning, match=r"1 left out: no picture \(a\|b.txt\)"):
        found = full_report(tmp_path, tmp_path, CONV, metrics=["frechet"], progress=False)
    assert found is not None
    for side in ("samples", "reference"):
        notes = found["notes"][side]
        assert notes["left_out"]["hidden"] == {"count": 1, "first": [".hidden.png"]}
        assert notes["left_out"]["no picture"]["first"] == ["a|b.txt"]
        assert notes["read_with"]["more than 8 bits a sample, the high 8 taken"]["count"] == 1
    from arvision.eval.report import to_markdown

    assert "| samples: left out | 1: no picture (a\\|b.txt) |" in to_markdown(found)


def test_linked_folders_are_followed_once(tmp_path):
    real, other = tmp_path / "set" / "a", tmp_path / "elsewhere"
    save(real / "0.png")
    save(other / "deep" / "1.png")
    (tmp_path / "set" / "0-link").symlink_to(other)
    (tmp_path / "set" / "again").symlink_to(other / "deep")
    (real / "loop").symlink_to(tmp_path / "set")
    (other / "deep" / "loop").symlink_to(other)
    (tmp_path / "set" / "2.png").symlink_to(other / "deep" / "1.png")
    with pytest.warns(UserWarning, match="3 left out: a link to a folder that is read already"):
        source = FolderSource(tmp_path / "set")
    names = [Path(entry.name).name for entry in source.entries]
    assert names == ["1.png", "2.png", "0.png"]


def test_only_regular_files_are_pictures(tmp_path):
    save(tmp_path / "0.png")
    (tmp_path / "2.png").mkdir()
    save(tmp_path / "2.png" / "0.png")
    os.mkfifo(tmp_path / "pipe")
    with pytest.warns(UserWarning, match=r"1 left out: no regular file \(pipe\)"):
        assert len(open_source(tmp_path)) == 2
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(InputError, match=r"1.png is a FIFO: expected a regular file"):
        open_source(tmp_path)
    (tmp_path / "1.png").unlink()
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "1.png"))
    with pytest.raises(InputError, match=r"1.png is a socket"):
        open_source(tmp_path)
    server.close()
    (tmp_path / "1.png").unlink()
    (tmp_path / "1.png").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"1.png is a device"):
        open_source(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / "1.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"1.png cannot be read \(No such file"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.zip", "a.tar", "a.png", "a"])
def test_a_fifo_as_a_file_never_waits(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is a FIFO: expected a regular file"):
        open_source(tmp_path / name)


def test_a_picture_that_became_a_fifo_never_waits(tmp_path):
    save(tmp_path / "0.png")
    source = open_source(tmp_path)
    (tmp_path / "0.png").unlink()
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(InputError, match="is a FIFO"):
        source.read(0, 1)
    (tmp_path / "0.png").unlink()
    with pytest.raises(InputError, match=r"0.png cannot be read \(No such file"):
        source.read(0, 1)


def test_names_of_any_bytes_are_ordered_and_shown_on_one_line(tmp_path):
    for name in ("10.png", "2.png", "a²\nb.png", "9" * 200 + ".png"):
        save(tmp_path / name)
    raw = os.fsencode(tmp_path) + b"/\xff.png"
    Path(os.fsdecode(raw)).write_bytes((tmp_path / "2.png").read_bytes())
    source = FolderSource(tmp_path)
    assert [Path(e.name).name[:3] for e in source.entries[:3]] == ["2.p", "10.", "999"]
    assert all(entry.name.isprintable() for entry in source.entries)
    assert len(source.read(0, 5)) == 5
    assert natural_key("02") == natural_key("2") < natural_key("10") < natural_key("9" * 9000)


# Archives and lists.


def archive(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members.items():
                file.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def png_bytes(picture: Image.Image = PICTURE, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_archives_of_pictures_are_read(tmp_path, suffix):
    members = {f"set/{number}.png": png_bytes(PICTURE.rotate(90 * number)) for number in (10, 2, 1)}
    members |= {"__MACOSX/set/._1.png": b"\0", "set/1.cls": b"7", "../../2.txt": b"x"}
    path = archive(tmp_path / f"a{suffix}", members)
    with pytest.warns(UserWarning, match=r"2 left out: no picture \(1.cls, 2.txt\)|2.txt, 1.cls"):
        source = open_source(path)
    wanted = [np.asarray(PICTURE.rotate(90 * number)) for number in (1, 2, 10)]
    assert np.array_equal(source.read(0, 3).permute(0, 2, 3, 1).numpy(), wanted)
    assert not list(tmp_path.parent.glob("2.txt"))
    jpeg = archive(tmp_path / f"b{suffix}", {"0.png": png_bytes(kind="JPEG")})
    with pytest.raises(InputError, match=r"b.*/0.png is JPEG"):
        open_source(jpeg)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(InputError, match=r"a\.(zip|tar)"):
        open_source(path).read(0, 3)


def test_what_cannot_be_read_at_any_place_is_refused(tmp_path):
    packed = archive(tmp_path / "a.tar.gz", {"0.png": png_bytes()})
    with pytest.raises(InputError, match=r"a.tar.gz is packed with gzip.*\.tar file.*unpack it"):
        open_source(packed)
    with pytest.raises(InputError, match="is one picture: expected an"):
        open_source(save(tmp_path / "a.png"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    shutil.copy(packed, tmp_path / "b.tar")
    with pytest.raises(InputError, match=r"b.tar is packed with gzip"):
        open_source(tmp_path / "b.tar")
    with pytest.raises(InputError, match=r"a{300}\.\.\. does not exist"):
        open_source("a" * 5000)
    with pytest.raises(InputError, match="is no file of images: expected an"):
        open_source(tmp_path / "a.parquet")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(InputError, match=r"empty.zip holds no pictures"):
        open_source(tmp_path / "empty.zip")


def test_lists_arrays_and_npy(tmp_path):
    turned = [PICTURE.rotate(90 * number) for number in range(4)]
    wanted = torch.from_numpy(np.stack([np.asarray(p) for p in turned])).permute(0, 3, 1, 2)
    paths = [save(tmp_path / f"{9 - n}.png", picture) for n, picture in enumerate(turned)]
    stacked = np.stack([np.asarray(p) for p in turned])
    np.save(tmp_path / "a.npy", stacked)
    for given in (
        *(turned, tuple(paths), [str(path) for path in paths], [turned[0], paths[1], *turned[2:]]),
        *(list(stacked), list(wanted), stacked, tmp_path / "a.npy", open_source(turned)),
    ):
        assert torch.equal(open_source(given).read(0, 4), wanted)
    assert open_source(turned).name == "list"
    assert isinstance(open_npy(tmp_path / "a.npy"), np.memmap)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "list is empty"),
        ([3, 4], r"list\[0\] is a int: expected pictures of PIL, paths, or arrays"),
        (["nowhere.png"], "nowhere.png does not exist"),
        ([PICTURE, PICTURE.resize((8, 8))], r"list\[1\] is 8x8, the first picture 16x16"),
        ([COLOURS, COLOURS[:8]], "arrays of shapes"),
        ([Image.new("F", (4, 4))] * 2, "samples of mode F"),
        ([Image.new("I", (4, 4))] * 2, "samples of mode I"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"expected \[N, H, W, 3\] \(transpose"),
        (np.zeros((4, 8, 8, 4), np.uint8), r"expected \[N, H, W, 3\]"),
        (np.zeros((4, 0, 8, 3), np.uint8), "expected pixels"),
        (np.zeros((4, 8, 8, 3)), "dtype float64, expected uint8"),
        (torch.zeros(4, 3, 8, 8), "dtype torch.float32"),
        (None, "images are a NoneType: expected a path, an array, a tensor or a list"),
        (7, "images are a int"),
        (io.BytesIO(b"x"), "images are a BytesIO"),
        ({"a": 1}, "images are a dict"),
    ],
)
def test_what_is_no_source_is_one_line(given, message):
    with pytest.raises(InputError, match=message) as error:
        open_source(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("crop", [0, -3, 1.5, "8", True])
def test_a_crop_is_a_count(tmp_path, crop):
    save(tmp_path / "0.png")
    with pytest.raises(InputError, match="crop"):
        open_source(tmp_path, crop=crop)


# Bombs.


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


HUGE = {
    "just.png": png(8192, 8193),
    "huge.png": png(60_000, 60_000),
    "huge.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0" + b"," + b"\0" * 20,
    "huge.bmp": b"BM" + struct.pack("<IIIIiiHH", 0, 0, 54, 40, 60_000, 60_000, 1, 24) + bytes(24),
    "huge.pgm": b"P5 60000 60000 255\n",
    "huge.tif": tiff(8, b"\0" * 16, side=60_000),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", HUGE)
def test_pictures_of_too_many_pixels_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(HUGE[name])
    archive(tmp_path / "a.zip", {name: HUGE[name]})
    for where in (tmp_path / name, tmp_path / "a.zip"):
        given = where if where.suffix == ".zip" else [where]
        with pytest.raises(InputError, match=f"{name} has more than 67,108,864 pixels") as error:
            open_source(given)
        assert "\n" not in str(error.value)
    assert MAX_PIXELS == 67_108_864


def test_bombs_in_text_of_png_are_one_line(tmp_path):
    text = b"k\0\0" + zlib.compress(b"\0" * 2**26)
    data = png(4, 4, b"\0" * 13 * 4)
    bomb = data[:33] + chunk(b"zTXt", text) + data[33:]
    (tmp_path / "0.png").write_bytes(bomb)
    with pytest.raises(InputError, match=r"0.png cannot be read as a picture \(Decompressed"):
        open_source(tmp_path).read(0, 1)
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat", zip=True)
    save(tmp_path / "0.png", pnginfo=info)
    assert len(open_source(tmp_path).read(0, 1)) == 1


@pytest.mark.parametrize("where", ["header", "middle", "end"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "TGA"])
def test_broken_pictures_are_one_line(tmp_path, kind, where):
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    data = buffer.getvalue()
    cut = {"header": 9, "middle": len(data) // 2, "end": len(data) * 3 // 4}[where]
    name = f"0.{'tif' if kind == 'TIFF' else kind.lower()}"
    (tmp_path / name).write_bytes(data[:cut])
    with pytest.raises(InputError, match=f"{name}") as error:
        open_source(tmp_path).read(0, 1)
    assert "\n" not in str(error.value)


def zip_bomb(path: Path, shape: tuple[int, ...], lie: int | None = None) -> Path:
    """A compressed npz whose zeros would fill `shape`; a lie is what its zip header says."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("arr_0.npy", "w", force_zip64=True) as member:
            member.write(head.getvalue())
            for _ in range(64):
                member.write(bytes(2**20))
        file.writestr("arr_1.npy", b"never read")
    return path


def test_an_npz_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    honest = zip_bomb(tmp_path / "a.npz", (64, 1024, 1024, 1))
    tracemalloc.start()
    monkeypatch.setattr(arrays_module, "MAX_INFLATED", 2**25)
    with pytest.raises(InputError, match=r"arr_0 is 67,108,864 bytes when inflated, expected at"):
        open_source(honest)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    monkeypatch.undo()
    large = zip_bomb(tmp_path / "b.npz", (50_000, 256, 256, 3))
    with pytest.raises(InputError, match=r"9,830,400,000 bytes when inflated.*2,147,483,648"):
        open_source(large)
    for shape in ((2**32, 2**32, 2**10, 3), (100, 1024, 1024, 1), (-1, 8, 8, 3)):
        with pytest.raises(InputError, match="expected"):
            open_source(zip_bomb(tmp_path / "c.npz", shape))


def test_members_of_an_npz_are_read_when_asked_for(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8), b=np.ones(3))
    members = NpzFile(tmp_path / "a.npz")
    assert list(members) == ["arr_0", "b"]
    assert "b" in members
    assert members["b"].tolist() == [1, 1, 1]
    fortran = np.asfortranarray(np.arange(24).reshape(2, 3, 4))
    np.savez_compressed(tmp_path / "f.npz", a=fortran, empty=np.zeros((0, 3)), one=np.float32(2))
    np.savez(tmp_path / "g.npz", a=fortran, empty=np.zeros((0, 3)), one=np.float32(2))
    for name in ("f.npz", "g.npz"):
        found = NpzFile(tmp_path / name)
        assert np.array_equal(found["a"], fortran)
        assert found["empty"].shape == (0, 3)
        assert found["one"] == 2


def npy(header: bytes, version: int = 1) -> bytes:
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header


HEADERS = {
    "not python": npy(b"{nonsense}\n"),
    "code": npy(b"__import__('os').system('touch x')\n"),
    "object": npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (2,)}\n"),
    "negative": npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-2, 8, 8, 3)}\n"),
    "short": npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 8, 8, 3)}\n"),
    "enormous": npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (10**30, 8, 8, 3)}\n"),
    "long": npy(
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (%s1,)}\n" % (b"1," * 40_000), 2
    ),
    "version": b"\x93NUMPY\x09\x00" + b"\0" * 100,
    "cut": b"\x93NUMPY\x01\x00\xff",
    "deep": npy(b"{'descr': " + b"[" * 5000 + b"}\n"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_arrays_are_one_line(tmp_path, name):
    (tmp_path / "a.npy").write_bytes(HEADERS[name])
    with zipfile.ZipFile(tmp_path / "stored.npz", "w") as file:
        file.writestr("arr_0.npy", HEADERS[name])
    with zipfile.ZipFile(tmp_path / "packed.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("arr_0.npy", HEADERS[name])
    for path in ("a.npy", "stored.npz", "packed.npz"):
        with pytest.raises(InputError, match="expected") as error:
            open_source(tmp_path / path)
        assert "\n" not in str(error.value)


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("arr_0.npy", "w") as member,
    ):
        member.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31))
        for _ in range(32):
            member.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(InputError, match="header of 2,147,483,648 bytes"):
        open_source(tmp_path / "a.npz")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
