"""Philox known answers, and noise as a function of identity alone."""

from __future__ import annotations

import pytest
import torch

from arvision import InputError
from arvision.decoding.noise import PURPOSES, Noise, draw
from arvision.kernels.philox import philox4x32, reference

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    out = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert " ".join(f"{word:08x}" for word in out.tolist()) == words


@pytest.mark.parametrize("num", [1, 7, 3 * reference.BLOCK // 2])
def test_numpy_and_pytorch_give_the_same_words(num):
    words = torch.randint(0, ONES + 1, (6, num))
    words[:, :1] = ONES
    in_torch = reference._in_torch(words)
    assert in_torch.equal(philox4x32(tuple(words[:4]), tuple(words[4:])))
    rows = words[:3, :, None], words[3:, None, :4]
    broadcast = philox4x32((*rows[0], rows[1][0]), (*rows[1][1:],))
    assert broadcast.shape == (num, min(4, num), 4)
    for column in range(min(4, num)):
        key = tuple(word[0, column] for word in rows[1][1:])
        alone = philox4x32((*words[:3], rows[1][0][0, column]), key)
        assert broadcast[:, column].equal(alone)


def test_batch_order_and_calls_do_not_matter():
    seeds = [7, (7, 1), (7, 2), (8, 0), 2**63]
    positions = torch.arange(40).expand(5, 40)
    whole = Noise(seeds)
    gumbel = whole.gumbel(positions, 100)
    uniform = whole.uniform(positions, "accept", round_number=3)
    for row, seed in enumerate(seeds):
        alone = Noise([seed])
        alone.uniform(positions[:1], "init")
        some = torch.tensor([[33, 2, 39]])
        assert torch.equal(alone.gumbel(some, 100)[0], gumbel[row, [33, 2, 39]])
        assert torch.equal(
            alone.uniform(some, "accept", round_number=3)[0], uniform[row, [33, 2, 39]]
        )
    chosen = whole.select(torch.tensor([4, 1]))
    assert torch.equal(chosen.gumbel(positions[:2], 100), gumbel[[4, 1]])
    assert torch.equal(
        Noise([7]).gumbel(positions[:1], 100), Noise([(7, 0)]).gumbel(positions[:1], 100)
    )


def test_without_room_for_a_memo_the_numbers_are_the_same(monkeypatch):
    positions = torch.arange(20).expand(2, 20)
    expected = Noise([1, 2]).gumbel(positions, 50)
    monkeypatch.setattr("arvision.decoding.noise.MEMO_ELEMENTS", 0)
    assert torch.equal(Noise([1, 2]).gumbel(positions, 50), expected)


def test_every_part_of_the_identity_matters():
    position = torch.tensor([[5]])
    numbers = [Noise([seed]).uniform(position, "accept") for seed in (1, 2, (1, 1), 2**32 + 1)]
    numbers += [Noise([1]).uniform(position + 1, "accept")]
    numbers += [Noise([1]).uniform(position, purpose) for purpose in PURPOSES]
    numbers += [Noise([1]).uniform(position, "accept", round_number=n) for n in (1, 2)]
    assert len({float(n) for n in numbers}) == len(numbers) - 1  # "accept" stands there twice


def test_laws():
    from scipy.stats import gumbel_r, kstest

    positions = torch.arange(500).expand(4, 500)
    noise = Noise([0, 1, 2, 3])
    uniform = noise.uniform(positions, "recover", num=5).flatten().numpy()
    assert kstest(uniform, "uniform").pvalue > 1e-4
    gumbel = noise.gumbel(positions, 11).flatten().numpy()
    assert kstest(gumbel, gumbel_r.cdf).pvalue > 1e-4
    assert uniform.min() > 0
    assert uniform.max() < 1


@pytest.mark.parametrize("seed", ["1", 1.5, -1, 2**64, (1, 2, 3), (1, -1)])
def test_bad_seeds(seed):
    with pytest.raises(InputError, match="seed"):
        Noise([seed])


def test_draw_never_takes_a_token_without_mass():
    probs = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    edges = torch.tensor([1e-12, 0.3 - 1e-9, 0.3 + 1e-6, 1 - 2.0**-33], dtype=torch.float64)
    assert draw(probs.expand(4, 5), edges).tolist() == [1, 1, 3, 3]
    tiny = torch.tensor([1e-38, 0.0])
    assert draw(tiny, torch.tensor(0.999999)).item() == 0
