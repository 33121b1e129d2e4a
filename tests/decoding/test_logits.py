"""The one place where logits become probabilities."""

from __future__ import annotations

import pytest
import torch

from arvision import InputError
from arvision.decoding.logits import Shaping

LOGITS = torch.tensor([2.0, 1.0, 1.0, 0.0, -1.0])


def shape_logits(logits, null_logits=None, guidance_scale=1.0, **how):
    return Shaping(**how)(logits, null_logits, guidance_scale)


def kept(**options) -> list[int]:
    return torch.isfinite(shape_logits(LOGITS, **options)).nonzero()[:, 0].tolist()


def test_plain_softmax_and_temperature():
    torch.testing.assert_close(shape_logits(LOGITS).exp(), LOGITS.softmax(0))
    torch.testing.assert_close(shape_logits(LOGITS, temperature=0.5).exp(), (2 * LOGITS).softmax(0))


def test_guidance_comes_first():
    null = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    guided = null + 3.0 * (LOGITS - null)
    ours = shape_logits(LOGITS, null_logits=null, guidance_scale=3.0, temperature=2.0, top_k=2)
    torch.testing.assert_close(ours, shape_logits(guided, temperature=2.0, top_k=2))


def test_top_k_keeps_ties():
    assert kept(top_k=1) == [0]
    assert kept(top_k=2) == [0, 1, 2]
    assert kept(top_k=4) == [0, 1, 2, 3]
    assert kept(top_k=99) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_token_that_crosses():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for top_p, number in ((0.4, 1), (0.49, 1), (0.6, 2), (0.79, 2), (0.81, 3), (1.0, 4)):
        shaped = shape_logits(probs.double().log(), top_p=top_p)
        assert int(torch.isfinite(shaped).sum()) == number, top_p
        assert float(shaped.exp().sum()) == pytest.approx(1.0)


def test_top_p_acts_on_what_top_k_left():
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    shaped = shape_logits(probs, top_k=2, top_p=0.5)  # 0.4 / 0.7 crosses already
    assert int(torch.isfinite(shaped).sum()) == 1


def test_zero_temperature_is_greedy_and_half_precision_widens():
    assert kept(temperature=0.0) == [0]
    assert shape_logits(LOGITS.bfloat16()).dtype == torch.float32
    assert shape_logits(LOGITS.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_k": 1.5}, "top_k 1.5"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        Shaping(**options)
