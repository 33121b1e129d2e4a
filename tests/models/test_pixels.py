"""What `encode` takes is the same in every family: pictures as users have them, checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from arvision import InputError
from arvision.models import (
    InfinityTokenizer,
    LlamaGenTokenizer,
    MARAutoencoder,
    NextStepAutoencoder,
    VARTokenizer,
)
from arvision.models.conv_blocks import group_norm, regroup
from arvision.testing import tiny_llamagen

SIZES = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1}


def _llamagen() -> LlamaGenTokenizer:
    tokenizer = tiny_llamagen().tokenizer
    assert tokenizer is not None
    return tokenizer


# Each reads pictures of 16 x 16, and none of 33 x 33.
FAMILIES = {
    "llamagen": _llamagen,
    "var": lambda: VARTokenizer((1, 2, 8), z_channels=8, codebook_size=16, **SIZES),
    "infinity": lambda: InfinityTokenizer([(1, 1), (2, 2), (8, 8)], z_channels=8, **SIZES),
    "mar": lambda: MARAutoencoder(latent_dim=4, **SIZES),
    "nextstep": lambda: NextStepAutoencoder(latent_channels=4, **SIZES),
}


@pytest.fixture(params=FAMILIES, scope="module")
def tokenizer(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


@pytest.fixture(scope="module")
def bytes_():
    return np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


@torch.no_grad()
def test_every_form_of_a_picture_gives_the_same_tokens(tokenizer, bytes_):
    floats = bytes_.astype(np.float32) / 127.5 - 1
    first = torch.from_numpy(floats).permute(0, 3, 1, 2)
    wanted = tokenizer.encode(first)
    pictures = [Image.fromarray(each) for each in bytes_]
    forms = [
        pictures,
        tuple(bytes_),
        bytes_,
        floats,
        floats.astype(np.float64),
        torch.from_numpy(bytes_),
        torch.from_numpy(bytes_).permute(0, 3, 1, 2),
        bytes_.transpose(0, 3, 1, 2),
        [pictures[0], first[1]],
    ]
    for form in forms:
        torch.testing.assert_close(tokenizer.encode(form), wanted, rtol=1e-4, atol=1e-5)
    for one in (pictures[0], bytes_[0], first[0]):
        torch.testing.assert_close(tokenizer.encode(one), wanted[:1], rtol=1e-4, atol=1e-5)


def _broken(value: float) -> torch.Tensor:
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[0, 0, 0, 0] = value
    return pixels


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 16, 16), 255.0), r"pixels 255 to 255: expected float in \[-1, 1\]"),
        (_broken(-1.5), "pixels -1.5 to 0"),
        (_broken(float("nan")), "NaN or infinity"),
        (_broken(float("inf")), "NaN or infinity"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), "pixels of type torch.int64"),
        (np.zeros((16, 16, 3), dtype=np.int32), "pixels of type int32"),
        (torch.zeros(1, 3, 33, 33), r"pixels \(1, 3, 33, 33\): expected"),
        (Image.new("RGB", (17, 16)), r"pixels \(1, 3, 16, 17\): expected"),
        (torch.zeros(1, 1, 16, 16), r"pixels \(1, 1, 16, 16\): expected"),
        (torch.zeros(16, 16), r"pixels \(16, 16\): expected"),
        (Image.new("I;16", (16, 16)), "mode 'I;16'"),
        ([], "no images"),
        ("bag.png", "images of type str"),
        (None, "images of type NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(tokenizer, images, message):
    with pytest.raises(InputError, match=message) as told:
        tokenizer.encode(images)
    assert "\n" not in str(told.value)


def test_wider_groups_keep_what_is_the_same_in_all_places():
    norm = group_norm(32)
    flat = torch.randn(2, 32, 1, 1).expand(2, 32, 4, 4)
    assert norm(flat).abs().max() < 1e-3
    regroup(norm, 8)
    assert norm(flat).std() > 0.9


@pytest.mark.parametrize("kind", [LlamaGenTokenizer, VARTokenizer, MARAutoencoder])
def test_groups_of_channels_are_saved_with_a_tokenizer(kind, tmp_path):
    sizes = {"ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1}
    sizes |= {"patch_nums": (1, 4)} if kind is VARTokenizer else {}
    pixels = torch.rand(1, 3, 8, 8)
    narrow, wide = kind(**sizes), kind(**sizes, norm_num_groups=8)
    wide.load_state_dict(narrow.state_dict())
    seen = wide.encoder(pixels)
    assert not torch.allclose(seen, narrow.encoder(pixels), atol=1e-2)
    wide.save_pretrained(tmp_path)
    assert torch.equal(kind.from_pretrained(tmp_path).encoder(pixels), seen)
    with pytest.raises(InputError, match="norm_num_groups 5: expected a divisor of all widths"):
        kind(**sizes, norm_num_groups=5)
