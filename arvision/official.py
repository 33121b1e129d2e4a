"""The authors' own code beside ours: the same weights, drawn by what they published.

Nothing of theirs is here: it is imported where it stands on the Python path, a checkout of LlamaGen
(package `autoregressive`), VAR (`models.var`) or MAR (`models.mar`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .errors import InputError
from .pipeline import ARPipeline

Draw = Callable[[Sequence[int], int | None], int]
"""Draws an image for each class id (or the first tokens of one), and tells the number of passes."""


def official_draw(pipe: ARPipeline) -> Draw:
    """The authors' sampler over a copy of a pipeline's weights, with its recommended settings.

    Images are not decoded, and plain autoregressive sampling is what they publish. Tokens are drawn
    with their own noise, so that they differ from ours.

    Raises:
        InputError: no code of theirs for this model, or none on the path; a model that they do not
            have (captions, students); MAR without a GPU, which their code asks for.
    """
    kind = type(pipe.model).__name__
    if kind not in BUILDERS:
        raise InputError(
            f"--against official with a {kind}: expected a class-conditional LlamaGen, VAR or MAR"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # theirs tells about itself when it is built
        return BUILDERS[kind](pipe)


def _of(module: str, name: str, where: str) -> Any:
    """Something of the authors' code."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"--against official: no {module}.{name} on the Python path ({error}); expected "
            f"PYTHONPATH to name a checkout of {where}"
        ) from error


def _same_weights(theirs: nn.Module, ours: nn.Module, optional: Sequence[str] = ()) -> Any:
    """`theirs` with our weights, placed and cast like them.

    Raises:
        InputError: weights that do not fit.
    """
    try:
        told = theirs.load_state_dict(ours.state_dict(), strict=False)
    except RuntimeError as error:
        raise InputError(f"--against official: {str(error)[:200]}") from error
    missing = [key for key in told.missing_keys if not key.endswith(tuple(optional))]
    if missing or told.unexpected_keys:
        odd = (missing + told.unexpected_keys)[0]
        raise InputError(f"--against official: {odd} is not in both networks")
    first = next(ours.parameters())
    return theirs.eval().requires_grad_(False).to(first.device, first.dtype)


def _llamagen(pipe: ARPipeline) -> Draw:
    where = "https://github.com/FoundationVision/LlamaGen"
    config, settings = pipe.transformer.config, pipe.config
    if config["num_classes"] is None or config["grid"][0] != config["grid"][1]:
        raise InputError("--against official: expected classes and a square grid, as theirs have")
    arguments = _of("autoregressive.models.gpt", "ModelArgs", where)(
        dim=config["hidden_size"],
        n_layer=config["num_layers"],
        n_head=config["num_heads"],
        n_kv_head=config["num_kv_heads"],
        num_classes=config["num_classes"],
        vocab_size=config["vocab_size"],
        block_size=config["grid"][0] ** 2,
        norm_eps=config["norm_eps"],
        rope_base=config["rope_theta"],
    )
    network = _of("autoregressive.models.gpt", "Transformer", where)(arguments)
    network = _same_weights(network, pipe.transformer, ("freqs_cis",))
    generate = _of("autoregressive.models.generate", "generate", where)

    def draw(classes: Sequence[int], num: int | None) -> int:
        ids = torch.tensor(classes, device=pipe.device)
        length = num or pipe.model.num_tokens
        laws = {name: settings.get(name, plain) for name, plain in LAWS.items()}
        generate(network, ids, length, cfg_scale=settings["guidance_scale"], **laws)
        return length - 1  # the first token comes with the prompt

    return draw


LAWS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
"""How logits become a law, where a pipeline does not say."""


def _var(pipe: ARPipeline) -> Draw:
    where = "https://github.com/FoundationVision/VAR"
    config, settings = pipe.transformer.config, pipe.config
    scales = tuple(config["patch_nums"])
    tokenizer = _of("models", "VQVAE", where)(
        vocab_size=config["codebook_size"],
        z_channels=config["z_channels"],
        ch=32,
        v_patch_nums=scales,
    )
    network = _of("models.var", "VAR", where)(
        vae_local=tokenizer,
        num_classes=config["num_classes"],
        depth=config["num_layers"],
        embed_dim=config["hidden_size"],
        num_heads=config["num_heads"],
        norm_eps=config["norm_eps"],
        shared_aln=config["shared_aln"],
        attn_l2_norm=config["attn_l2_norm"],
        patch_nums=scales,
    )
    made = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
    network = _same_weights(network, pipe.transformer, made)
    # Their quantizer paints the canvas with weights of its own, which cost what ours do.
    tokenizer.eval().to(next(network.parameters()))
    tokenizer.fhat_to_img = lambda canvas: canvas

    def draw(classes: Sequence[int], num: int | None) -> int:
        ids = torch.tensor(classes, device=pipe.device)
        top_p = settings.get("top_p") or 1.0
        network.autoregressive_infer_cfg(
            len(classes),
            ids,
            g_seed=0,
            cfg=settings["guidance_scale"],
            top_k=settings.get("top_k") or 0,
            top_p=0.0 if top_p == 1 else top_p,
        )
        return len(scales)

    return draw


def _mar(pipe: ARPipeline) -> Draw:
    where = "https://github.com/LTH14/mar"
    if pipe.device.type != "cuda":
        raise InputError("--against official: MAR's code asks for a GPU: expected device cuda")
    config, settings = pipe.transformer.config, pipe.config
    side = config["grid"][0]
    network = _of("models.mar", "MAR", where)(
        img_size=16 * side,
        vae_stride=16,
        patch_size=1,
        vae_embed_dim=config["latent_dim"],
        encoder_embed_dim=config["hidden_size"],
        encoder_depth=config["encoder_depth"],
        encoder_num_heads=config["num_heads"],
        decoder_embed_dim=config["hidden_size"],
        decoder_depth=config["decoder_depth"],
        decoder_num_heads=config["num_heads"],
        class_num=config["num_classes"],
        buffer_size=config["num_buffer"],
        diffloss_d=config["head_depth"],
        diffloss_w=config["head_width"],
        num_sampling_steps=str(config["num_sampling_steps"]),
    )
    network = _same_weights(network, pipe.transformer)
    passes = settings.get("num_iter") or 64

    def draw(classes: Sequence[int], num: int | None) -> int:
        ids = torch.tensor(classes, device=pipe.device)
        network.sample_tokens(len(classes), passes, settings["guidance_scale"], labels=ids)
        return passes

    return draw


BUILDERS: dict[str, Callable[[ARPipeline], Draw]] = {
    "LlamaGen": _llamagen,
    "VAR": _var,
    "MAR": _mar,
}
"""By class of our model."""
