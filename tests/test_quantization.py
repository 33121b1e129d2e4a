"""Weights of fewer bits: smaller, near the original, and exact with respect to what they are."""

from __future__ import annotations

import pytest
import torch

import arvision
from arvision import InputError, get_sampler
from arvision.decoding.teacher_forcing import teacher_forced
from arvision.quantization import QUANTIZATIONS

pytest.importorskip("torchao", reason="torchao, the extra `quantize`, is not installed")


@pytest.fixture(scope="module")
def original():
    pipe = arvision.load("llamagen-fashion", device="cpu")
    return pipe, pipe([1, 2], seed=0, sampler=get_sampler("ar"), progress=False).tokens


def size(pipe):
    return sum(p.untyped_storage().nbytes() for p in _tensors(pipe.transformer))


def _tensors(network):
    for parameter in network.parameters():
        inner = getattr(parameter, "__tensor_flatten__", None)
        if inner is None or type(parameter) is torch.nn.Parameter:
            yield parameter
        else:
            yield from (getattr(parameter, name) for name in inner()[0])


@pytest.mark.parametrize("how", list(QUANTIZATIONS))
def test_a_quantised_model_is_smaller_and_its_samplers_stay_exact(original, how):
    pipe, tokens = original
    small = arvision.load("llamagen-fashion", device="cpu", quantize=how)
    assert size(small) < 0.45 * size(pipe)
    plain = small([1, 2], seed=0, sampler=get_sampler("ar"), progress=False)
    guessed = small([1, 2], seed=0, sampler=get_sampler("sjd", window=8), progress=False)
    assert plain.stats.quantized == guessed.stats.quantized == how
    assert torch.equal(plain.tokens, guessed.tokens)
    # It is near the original, and it is not the original.
    laws = [
        teacher_forced(each.model, [1, 2], tokens, 3.0).log_softmax(-1) for each in (pipe, small)
    ]
    distance = float((laws[0].exp() * (laws[0] - laws[1])).sum(-1).mean())
    assert 1e-7 < distance < 0.3
    with pytest.raises(InputError, match="quantised already"):
        small.quantize(how)
    with pytest.raises(InputError, match="not saved"):
        small.save_pretrained("nowhere")


def test_an_unknown_way_is_named():
    with pytest.raises(InputError, match=r"unknown quantize 'int7'.*fp8, int4, int8"):
        arvision.load("llamagen-fashion", device="cpu", quantize="int7")
