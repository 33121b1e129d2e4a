"""Official VAR files: what does not fit is named."""

from __future__ import annotations

import re

import pytest
import torch

from arvision.errors import CheckpointError, InputError
from arvision.models import VAR, VARTokenizer, VARTransformer


@pytest.fixture
def transformer(goldens):
    return torch.load(goldens / "var" / "var_d2.pth", weights_only=True)


@pytest.fixture
def tokenizer(goldens):
    return torch.load(goldens / "var" / "var_d2_vae.pth", weights_only=True)


def refuses(load, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load()


def test_a_training_checkpoint_is_unwrapped(transformer, tmp_path):
    path = tmp_path / "ar-ckpt-last.pth"
    torch.save({"epoch": 3, "trainer": {"var_wo_ddp": transformer, "var_opt": {}}}, path)
    loaded = VARTransformer.from_official(path)
    assert loaded.num_tokens == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.attn.q_bias": None}, "key 'blocks.1.attn.q_bias' is missing"),
        ({"blocks.1.attn.extra": torch.ones(1)}, "key 'blocks.1.attn.extra' is unexpected"),
        (
            {"head.bias": torch.ones(3)},
            "key 'head.bias' has shape [3], expected [64]",
        ),
        ({"word_embed.weight": None}, "key 'word_embed.weight' is missing"),
        ({"lvl_1L": torch.zeros(1, 29)}, "key 'lvl_1L' holds no scales"),
    ],
)
def test_a_transformer_that_does_not_fit(transformer, change, message):
    changed = {k: v for k, v in (transformer | change).items() if v is not None}
    refuses(lambda: VARTransformer.from_official(changed), message)


def test_a_scale_list_that_does_not_fit(transformer, tokenizer):
    wrong = {"patch_nums": (1, 2, 3, 5)}
    refuses(
        lambda: VARTransformer.from_official(transformer, **wrong),
        "its tensors say patch_nums (1, 2, 3, 4), not (1, 2, 3, 5)",
    )
    bare = {k: v for k, v in transformer.items() if k != "lvl_1L"}
    refuses(
        lambda: VARTransformer.from_official(bare, **wrong),
        "patch_nums (1, 2, 3, 5) are 4 scales of 39 tokens: its tensors hold 4 scales of 30 tokens",
    )
    refuses(
        lambda: VARTransformer.from_official(bare),
        "30 tokens in 4 scales are no official model's: pass patch_nums",
    )
    assert VARTransformer.from_official(bare, patch_nums=(1, 2, 3, 4)).num_tokens == 30
    refuses(
        lambda: VARTokenizer.from_official(tokenizer, patch_nums=(1, 2, 4)),
        "patch_nums (1, 2, 4) are 3 scales: its tensors hold 4",
    )
    refuses(lambda: VARTokenizer.from_official(tokenizer), "4 scales of unknown sides")


def test_sizes_that_disagree(transformer):
    refuses(
        lambda: VARTransformer.from_official(transformer, depth=16),
        "its tensors say num_layers 2, not 16",
    )
    with pytest.raises(InputError, match="size of a VAR transformer"):
        VARTransformer.from_official(transformer, deepth=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_conv.weight": None}, "key 'quant_conv.weight' is missing"),
        ({"decoder.up.9.block.0.norm1.weight": torch.ones(1)}, "is unexpected"),
        ({"quantize.embedding.weight": None}, "key 'quantize.embedding.weight' is missing"),
    ],
)
def test_a_tokenizer_that_does_not_fit(tokenizer, change, message):
    changed = {k: v for k, v in (tokenizer | change).items() if v is not None}
    refuses(lambda: VARTokenizer.from_official(changed, patch_nums=(1, 2, 3, 4)), message)


def test_a_truncated_file(tmp_path, goldens):
    path = tmp_path / "var_d16.pth"
    path.write_bytes((goldens / "var" / "var_d2.pth").read_bytes()[:5000])
    refuses(lambda: VARTransformer.from_official(path), "cannot be read")


def test_networks_that_do_not_fit_each_other(transformer, tokenizer):
    network = VARTransformer.from_official(transformer)
    small = VARTokenizer(patch_nums=(1, 2, 4), ch=32, z_channels=8, codebook_size=64)
    with pytest.raises(InputError, match=r"scales \[1, 2, 4\]: expected \[1, 2, 3, 4\]"):
        VAR(network, small)
    with pytest.raises(InputError, match="codebook_size 32: expected 64"):
        VAR(network, VARTokenizer(ch=32, z_channels=8, codebook_size=32))
    with pytest.raises(InputError, match="VAR needs its image tokenizer"):
        VAR(network, None)


def test_smoothers_in_every_layout_round_trip():
    for num_shared in (0, 1, 4):
        sizes = {"patch_nums": (1, 2), "ch": 32, "ch_mult": (1, 1), "z_channels": 4}
        ours = VARTokenizer(codebook_size=8, num_shared=num_shared, **sizes).eval()
        again = VARTokenizer.from_official(ours.state_dict(), patch_nums=(1, 2))
        assert again.config["num_shared"] == num_shared
        indices = torch.randint(8, (2, 5))
        assert torch.equal(ours.decode(indices), again.decode(indices))


def test_save_and_load(transformer, tokenizer, tmp_path):
    model = VAR.from_official(transformer, tokenizer)
    model.transformer.save_pretrained(tmp_path / "transformer")
    model.tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = VAR(
        VARTransformer.from_pretrained(tmp_path / "transformer"),
        VARTokenizer.from_pretrained(tmp_path / "tokenizer"),
    )
    weights = model.transformer.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in again.transformer.state_dict().items())
    assert torch.allclose(again.start([1]).next(), model.start([1]).next(), atol=1e-5)
