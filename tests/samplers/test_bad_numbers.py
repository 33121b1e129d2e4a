"""Weights, features and tokenizers that give NaN or infinity are refused, never drawn from."""

from __future__ import annotations

import pytest
import torch

import arvision
from arvision import ARPipeline, InputError, get_sampler
from arvision.testing import tiny_llamagen

SAMPLERS = ["ar", "sjd", "sjd:coupling=maximal", "sjd:coupling=independent", "gsd", "lantern"]
SAMPLERS += ["zipar", "pjd", "draft", "draft:coupling=maximal"]


def spoil(parameter, value):
    with torch.no_grad():
        parameter.view(-1)[0] = value


def draw(name, model):
    sampler = get_sampler(name)
    if "draft" in sampler.needs:
        sampler = sampler.bind(draft=tiny_llamagen(grid=(4, 4)))
    return sampler(model, [0, 1], seeds=[0, 1], guidance_scale=2.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_weights_of_a_token_model_are_refused(name, value):
    model = tiny_llamagen(grid=(4, 4))
    draw(name, model)  # with good weights it draws
    spoil(model.transformer.output.weight, value)
    with pytest.raises(InputError, match="the model gave NaN or infinity in pass 0"):
        draw(name, model)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_bad_code_is_refused_when_it_is_drawn(name):
    model = tiny_llamagen(grid=(4, 4))
    with torch.no_grad():
        model.transformer.tok_embeddings.weight[::2, 0] = float("nan")
    with pytest.raises(InputError, match="the model gave NaN or infinity in pass"):
        draw(name, model)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_greedy_draws_are_refused_as_well(temperature):
    model = tiny_llamagen(grid=(4, 4))
    spoil(model.transformer.output.weight, float("nan"))
    with pytest.raises(InputError, match="NaN or infinity"):
        get_sampler("ar", temperature=temperature)(model, [0], seeds=[0])


@pytest.mark.parametrize(
    ("name", "samplers"),
    [("var-fashion", ["ar"]), ("mar-fashion", ["ar", "csjd", "csjd:criterion=tolerance"])],
)
def test_scales_and_latents_too(name, samplers):
    pipe = arvision.load(name, device="cpu")
    spoil(
        next(p for n, p in pipe.transformer.named_parameters() if n.endswith("qkv.weight")),
        float("nan"),
    )
    for sampler in samplers:
        with pytest.raises(InputError, match="NaN or infinity"):
            arvision.sample(pipe, 1, sampler, progress=False)


def test_students_too():
    pipe = arvision.load("llamagen-fashion-dd", device="cpu")
    spoil(pipe.transformer.layers[0].attention_norm.weight, float("nan"))
    with pytest.raises(InputError, match="NaN or infinity"):
        arvision.sample(pipe, 1, progress=False)


def test_a_tokenizer_that_decodes_nan():
    pipe = ARPipeline.from_model(tiny_llamagen())
    spoil(pipe.tokenizer.decoder.conv_out.weight, float("nan"))
    with pytest.raises(InputError, match="the tokenizer decoded NaN or infinity"):
        arvision.sample(pipe, 1, progress=False)
    assert arvision.sample(pipe, 1, output_type="latent", progress=False).tokens.shape[0] == 1


def test_features_with_nan():
    pipe = arvision.load("llamagen-fashion-t2i", device="cpu")
    features = torch.zeros(3, pipe.transformer.config["caption_dim"])
    features[1, 0] = float("nan")
    with pytest.raises(InputError, match=r"caption features \(3, \d+\): NaN or infinity"):
        pipe(features)
