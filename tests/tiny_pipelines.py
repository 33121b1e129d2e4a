"""A tiny random pipeline of every family, with a prompt for each."""

from __future__ import annotations

from typing import Any

import torch
from nextstep_models import load_calm
from torch import nn

from arvision import ARPipeline
from arvision.models import (
    MAR,
    VAR,
    InfinityTokenizer,
    InfinityTransformer,
    LlamaGenStudent,
    MARAutoencoder,
    MARTransformer,
    VARStudent,
    VARTokenizer,
    VARTransformer,
)
from arvision.testing import tiny_llamagen


def _lively(*networks: nn.Module) -> None:
    """Weights with which laws and pictures differ from one another."""
    for network in networks:
        for parameter in network.eval().parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape))


def text_parts(width: int) -> dict[str, Any]:
    """A text encoder of that width and its tokenizer."""
    from arvision.training.llamagen_text import build_text_encoder, build_text_tokenizer

    tokenizer = build_text_tokenizer()
    encoder = build_text_encoder(len(tokenizer), width, seed=0).eval()
    return {"text_encoder": encoder, "text_tokenizer": tokenizer}


def _llamagen() -> ARPipeline:
    return ARPipeline.from_model(tiny_llamagen())


def _captioned() -> ARPipeline:
    model = tiny_llamagen(caption_dim=16, caption_length=6, num_classes=None)
    return ARPipeline(model.transformer, model.tokenizer, **text_parts(16))


def _var_model(shared_aln: bool) -> VAR:
    shape: dict[str, Any] = {"patch_nums": (1, 2, 3, 4), "z_channels": 8, "codebook_size": 64}
    sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_classes": 3}
    network = VARTransformer(**shape, **sizes, shared_aln=shared_aln)
    tokenizer = VARTokenizer(**shape, ch=32, ch_mult=(1, 1), num_res_blocks=1)
    _lively(network, tokenizer)
    return VAR(network, tokenizer)


def _mar() -> ARPipeline:
    network = MARTransformer(
        latent_dim=4,
        grid=(3, 3),
        hidden_size=32,
        encoder_depth=2,
        decoder_depth=2,
        num_heads=2,
        head_width=16,
        head_depth=2,
        num_classes=3,
        num_buffer=4,
        num_sampling_steps=5,
    )
    vae = MARAutoencoder(ch=32, ch_mult=(1, 1), num_res_blocks=1, latent_dim=4)
    _lively(network, vae)
    return ARPipeline.from_model(MAR(network, vae))


def _infinity(guidance_layer: int = 0) -> ARPipeline:
    scales = ((1, 1), (2, 2), (4, 4))
    network = InfinityTransformer(
        scale_schedule=scales,
        num_bits=8,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_chunks=2,
        text_dim=16,
        text_length=6,
        pool_heads=2,
        guidance_layer=guidance_layer,
    )
    tokenizer = InfinityTokenizer(
        scale_schedule=scales, ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8
    )
    _lively(network, tokenizer)
    return ARPipeline(network, tokenizer, **text_parts(16))


def _student() -> ARPipeline:
    student = LlamaGenStudent.from_teacher(tiny_llamagen(), timesteps=(0, 4), split=8)
    student.transformer.eval()
    return ARPipeline.from_model(student)


def _var_student(shared_aln: bool) -> ARPipeline:
    student = VARStudent.from_teacher(_var_model(shared_aln), timesteps=(0, 2), split=3)
    student.transformer.eval()
    return ARPipeline.from_model(student)


MAKERS: dict[str, Any] = {
    "llamagen": (_llamagen, 1),
    "captioned": (_captioned, "a dark boot"),
    "var": (lambda: ARPipeline.from_model(_var_model(False)), 1),
    "var shared": (lambda: ARPipeline.from_model(_var_model(True)), 1),
    "mar": (_mar, 1),
    "infinity": (_infinity, "a dark boot"),
    "infinity inside": (lambda: _infinity(-1), "a dark boot"),
    "nextstep": (lambda: ARPipeline.from_model(load_calm()), "a cat"),
    "student": (_student, 1),
    "var student": (lambda: _var_student(False), 1),
    "var student shared": (lambda: _var_student(True), 1),
}
"""Name to a maker and a prompt."""


def tiny(name: str) -> tuple[ARPipeline, Any]:
    """A pipeline and a prompt of it."""
    from arvision.samplers import DDSampler

    maker, prompt = MAKERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = maker()
    if pipe.kind == "student":
        pipe.sampler = DDSampler(steps=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe, prompt


def disturbed_copy(model: Any, scale: float, seed: int = 1) -> Any:
    """The same network with noise on its weights: a draft that is often, but not always, right."""
    generator = torch.Generator().manual_seed(seed)
    other: Any = tiny_llamagen(grid=model.grid).to(torch.float64)
    for ours, theirs in zip(
        model.transformer.parameters(), other.transformer.parameters(), strict=True
    ):
        noise = torch.randn(ours.shape, generator=generator, dtype=ours.dtype)
        theirs.data.copy_(ours.data + scale * ours.data.std() * noise)
    return other
