"""What `cspd` and `ar` refuse on continuous models, and what temperature 0 means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gaussian_latents import GaussianModel

import arvision
from arvision import InputError, get_sampler


def model(**changes: Any) -> Any:
    made = GaussianModel(0.3, 1.2, num_tokens=3)
    made.grid = (1, 3)
    for name, value in changes.items():
        owner = made if hasattr(made, name) or name == "latent_space" else made.head
        setattr(owner, name, value)
    return made


def draw(draft: Any, target: Any = None, num: int = 1, **options: Any) -> Any:
    sampler = get_sampler("cspd", draft=draft, **{"max_draft": 2} | options)
    return sampler(target or model(), [None] * num, seeds=list(range(num)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 4}, "draft with latents 4: expected the target's 3"),
        ({"grid": (3, 1)}, r"draft with grid \(3, 1\): expected the target's \(1, 3\)"),
        ({"latent_dim": 2}, "draft with latent width 2: expected the target's 1"),
        ({"num_steps": 5}, "draft with denoising steps 5: expected the target's 10"),
        ({"latent_space": "kl8"}, "draft with the autoencoder kl8: expected the target's kl16"),
    ],
)
def test_another_draft(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        draw(model(**changes), model(latent_space="kl16"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_draft": 4}, "max_draft 4: expected 1 to 3, the latents"),
        ({"max_draft": 0}, "max_draft 0: expected an integer >= 1"),
        ({"num_iter": 4}, "num_iter 4: expected 1 to 3, the latents"),
        ({"num_iter": 0}, "num_iter 0: expected an integer >= 1"),
        ({"temperature": 0}, "temperature 0: a chain without noise has no density"),
        ({"criterion": "published_"}, "did you mean 'published'"),
        ({"context": "all"}, "unknown context 'all'"),
        ({"prefill": 2}, "prefill 2: expected a share"),
        ({"order": "spiral"}, "unknown order 'spiral'"),
    ],
)
def test_options(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        draw(model(), **options)


def test_no_draft_and_too_few_seeds():
    with pytest.raises(InputError, match="no draft: expected a continuous model"):
        get_sampler("cspd")(model(), [None], seeds=[0])
    with pytest.raises(InputError, match="1 seeds for 2 conditions"):
        get_sampler("cspd", draft=model(), max_draft=2)(model(), [None] * 2, seeds=[0])
    with pytest.raises(InputError, match="draft 'a name' is a name that is not loaded"):
        get_sampler("cspd", draft="a name", max_draft=2)(model(), [None], seeds=[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iter": 4}, "num_iter 4: expected 1 to 3"),
        ({"num_iter": 0}, "num_iter 0"),
        ({"temperature": -1}, "temperature -1"),
    ],
)
def test_ar(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        get_sampler("ar", **options)(model(), [None], seeds=[0])


def test_temperature_0_leaves_the_means():
    """The start of a chain is still noise; what the steps add is not."""
    out = get_sampler("ar", temperature=0)(model(), [None] * 4, seeds=[(0, k) for k in range(4)])
    law = model().head.law(torch.tensor([[0.3, 1.2]], dtype=torch.float64))
    again = get_sampler("ar", temperature=0)(model(), [None], seeds=[(0, 2)])
    torch.testing.assert_close(again.tokens, out.tokens[2:3])
    shares = []
    for scale in (0.0, 1.0):
        x = torch.full((1, 1), scale, dtype=torch.float64)
        for step in range(9, -1, -1):
            x = law.moments(x, step)[0]
        shares.append(float(x))
    # Linear steps: the end lies between what starts at 0 and at 1 say, and is close to the mean.
    assert abs(shares[0] - 0.3) < 0.05
    assert float((out.tokens - shares[0]).abs().max()) < 4 * abs(shares[1] - shares[0]) + 1e-9


def test_an_image_does_not_depend_on_its_batch():
    pipe = arvision.load("mar-fashion", device="cpu")
    options: dict[str, Any] = {"progress": False, "num_iter": 8, "draft": "mar-fashion-draft"}
    both = arvision.sample(pipe, [1, 8], "cspd", seed=[(0, 0), (0, 1)], **options)
    one = arvision.sample(pipe, [8], "cspd", seed=[(0, 1)], **options)
    torch.testing.assert_close(both.tokens[1:], one.tokens, rtol=1e-3, atol=1e-3)
