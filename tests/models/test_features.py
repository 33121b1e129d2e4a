"""Text features as encoders give them: batches, padding with a mask, arrays, half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import arvision
from arvision import InputError, Prompt
from arvision.inputs import expand_prompts
from arvision.models import Infinity, InfinityTransformer
from arvision.models.conditions import read_features

CAPTIONS = ["a dark bag", "a bright ankle boot", "a sneaker"]


@pytest.fixture(scope="module")
def pipe():
    return arvision.load("llamagen-fashion-t2i", device="cpu")


@pytest.fixture(scope="module")
def encoded(pipe):
    """Output of the encoder and the mask, padded on the right."""
    batch = pipe.text_tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return pipe.text_encoder(**batch), batch["attention_mask"]


@pytest.fixture(scope="module")
def infinity():
    torch.manual_seed(0)
    network = InfinityTransformer(
        scale_schedule=[(1, 1), (2, 2)],
        rope_grid=(2, 2),
        num_bits=4,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_chunks=1,
        text_dim=8,
        text_length=6,
        pool_heads=2,
        max_scales=2,
    )
    return Infinity(network.eval())


def stop_early(pipe, step, time, given):
    pipe._interrupt = step >= 12


def draw(pipe, prompt, num=3):
    """The first tokens of some images."""
    options = {"output_type": "latent", "progress": False, "callback_on_step_end": stop_early}
    return pipe(prompt, seed=list(range(num)), **options).tokens[:, :12]


@pytest.fixture(scope="module")
def wanted(pipe):
    """What the captions themselves draw."""
    tokens = draw(pipe, CAPTIONS)
    assert len(tokens.unique()) > 3
    return tokens


FORMS = {
    "output": lambda out, mask: Prompt(out, mask=mask),
    "batch": lambda out, mask: Prompt(out.last_hidden_state, mask=mask),
    "boolean mask": lambda out, mask: Prompt(out.last_hidden_state, mask=mask.bool()),
    "arrays": lambda out, mask: Prompt(out.last_hidden_state.numpy(), mask=mask.numpy()),
    "lists of the mask": lambda out, mask: Prompt(out.last_hidden_state, mask=mask.tolist()),
    "one by one": lambda out, mask: [
        Prompt(rows[None], mask=own[None])
        for rows, own in zip(out.last_hidden_state, mask, strict=True)
    ],
    "rows": lambda out, mask: [
        Prompt(rows, mask=own) for rows, own in zip(out.last_hidden_state, mask, strict=True)
    ],
    "cut": lambda out, mask: [
        rows[own.bool()][None] for rows, own in zip(out.last_hidden_state, mask, strict=True)
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_features_draw_what_their_captions_draw(pipe, encoded, wanted, form):
    assert torch.equal(draw(pipe, FORMS[form](*encoded)), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision_is_taken(pipe, encoded, dtype):
    rows = encoded[0].last_hidden_state[:1].to(dtype)
    assert torch.equal(draw(pipe, rows, 1), draw(pipe, rows.float(), 1))
    if dtype is torch.float16:
        assert torch.equal(draw(pipe, rows.numpy(), 1), draw(pipe, rows.float(), 1))


def test_a_batch_is_as_many_prompts(pipe, encoded):
    rows, mask = encoded[0].last_hidden_state, encoded[1]
    out = pipe(Prompt(rows, mask=mask), num_images_per_prompt=2, seed=0, output_type="latent")
    assert len(out.tokens) == 6
    assert len(draw(pipe, [rows, CAPTIONS[0]], 4)) == 4


def test_the_model_itself_takes_one_caption(pipe, encoded):
    rows, mask = encoded[0].last_hidden_state, encoded[1]
    _, wanted = pipe.model.start([CAPTIONS[0]], 3.0)
    for form in (
        Prompt(rows[:1], mask=mask[:1]),
        rows[:1, : mask[0].sum()],
        rows[0, : mask[0].sum()].numpy(),
    ):
        _, logits = pipe.model.start([form], 3.0)
        assert torch.allclose(logits, wanted, atol=1e-3)
    with pytest.raises(InputError, match="3 captions in the place of one"):
        pipe.model.start([rows], 3.0)


@pytest.mark.parametrize("negative", [False, True])
def test_infinity_takes_the_same_forms(infinity, negative):
    rows = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    cut = [rows[0, :3], rows[1]]
    against = torch.randn(4, 8)
    plain = [Prompt(row, against[:2] if negative else None) for row in cut]
    padded = Prompt(against[None].numpy(), mask=[[1, 1, 0, 0]]) if negative else None
    wanted = infinity.start(plain, 2.0).next()
    forms = [
        Prompt(row[None].double().numpy(), padded, mask=own)
        for row, own in zip(rows, mask, strict=True)
    ]
    assert torch.allclose(infinity.start(forms, 2.0).next(), wanted, atol=1e-5)
    spread = expand_prompts(Prompt(rows, padded, mask=mask), 1)
    assert torch.allclose(infinity.start(spread, 2.0).next(), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("features", "mask", "words"),
    [
        (torch.zeros(2, 3, 4), torch.ones(2, 4), r"mask \(2, 4\)"),
        (torch.zeros(2, 3, 4), torch.ones(3), r"mask \(1, 3\)"),
        (torch.zeros(2, 3, 4), torch.full((2, 3), 2), "expected 0 and 1"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), "a 1 for each caption"),
        (torch.zeros(2, 3, 4), torch.tensor([[1, 1, 1], [0, 0, 0]]), "a 1 for each caption"),
        (torch.zeros(2, 3, 4), torch.full((2, 3), float("nan")), "expected 0 and 1"),
        (torch.zeros(1, 2, 3, 4), None, r"text features \(1, 2, 3, 4\)"),
        (torch.zeros(3, 4, dtype=torch.int64), None, "real numbers"),
        ("a dog", None, "text features str"),
        (np.zeros(3), None, r"text features \(3,\)"),
    ],
)
def test_features_that_are_none(features, mask, words):
    with pytest.raises(InputError, match=words):
        read_features(features, mask)


def test_negatives_are_as_many(infinity):
    rows = torch.zeros(3, 5, 8)
    assert len(expand_prompts(Prompt(rows, torch.zeros(3, 2, 8)), 1)) == 3
    with pytest.raises(InputError, match="2 negatives of 3 captions"):
        expand_prompts(Prompt(rows, torch.zeros(2, 2, 8)), 1)
