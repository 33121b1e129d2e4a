"""Strings to objects: `load` and `sample`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .adapters import merge_adapter
from .contracts import Schedule
from .errors import InputError
from .folders import parse_device, parse_dtype
from .inputs import as_prompts, expand_prompts
from .opening import open_cached, open_model
from .pipeline import ARPipeline, SampleOutput
from .samplers import BaseSampler, get_sampler
from .samplers.base import LAW, join_options, parse_sampler

LEAST_WINDOW, MOST_WINDOW = 4, 16
"""Tokens per pass and image of the sampler that `sample` chooses by itself; below, it is "ar"."""

CANDIDATES = {"cpu": 16, "accelerator": 256}
"""Tokens of all images that a pass of that sampler holds at most: more, and a pass costs more than
its guesses save. That of a CPU is measured (docs/samplers/sjd.md), that of accelerators is not: their
passes are bound by reading weights up to some hundred tokens."""


def load(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    compile: str | None = None,
    quantize: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    decoder: str | Path | None = None,
    adapter: str | Path | None = None,
    **options: Any,
) -> ARPipeline:
    """Load a pipeline, or an image model of transformers with its authors' settings.

    A folder or repository is told apart by its `model_index.json` (a pipeline of ours, or
    `GlmImagePipeline` of diffusers) or its `config.json` (a network of transformers: Janus, Emu3,
    Chameleon, Anole, Lumina-mGPT).

    From the hub comes only what is needed, as safetensors, and is compared with the sizes and sums
    that the hub tells; code of a repository is never fetched and never run. Without an answer of the
    hub, what was downloaded before counts; `HF_HUB_OFFLINE=1` asks nobody.

    Args:
        name_or_path: an embedded model (see `list_models`), a folder written by `save_pretrained`,
            or a hub id "owner/name".
        device: None for an accelerator where there is one, else the CPU.
        dtype: None for float32 on a CPU, bfloat16 elsewhere.
        variant: of the weight files, such as "fp16", as `save_pretrained(variant=...)` names them.
        revision: of a repository: a branch, a tag or a commit.
        token: of an account at the hub; None for the one that this machine is logged in with.
        local_files_only: take what was downloaded before and ask nobody.
        cache_dir: where downloads lie; None for the hub's own place.
        force_download: fetch also what is there.
        compile: a mode of `ARPipeline.compile`; None for plain PyTorch.
        quantize: "int8", "int4" or "fp8" for weights of fewer bits in the transformer (torchao),
            which makes it another model; None for the weights as they are.
        device_map: where the layers of an image model of transformers go, in place of `device`; they
            must run on one device, with weights offloaded or not.
        quantization_config: of an image model of transformers, such as `TorchAoConfig`; None for
            what its `config.json` says.
        adapter: folder of a LoRA adapter in peft's layout, such as `arvision finetune --lora-rank` writes;
            it is merged into the transformer (extra `peft`).
        decoder: of a Chameleon's pixels, a `vqgan.ckpt` or a folder; None for one beside the network.
        **options: arguments of an image model's class, such as `layout="lumina"`, `height=768`, or
            `processor=` (a loaded one, or a tokenizer) where the repository has none.

    Raises:
        InputError: an unknown name, device or dtype; a repository, revision or variant that is not
            there, or no access to it.
        CheckpointError: a folder or repository that is not a complete pipeline, a download that
            failed, or a file that is not what the hub says.
    """
    pipe = open_model(
        name_or_path,
        device,
        dtype,
        variant,
        revision=revision,
        token=token,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
        force_download=force_download,
        device_map=device_map,
        quantization_config=quantization_config,
        decoder=decoder,
        options=options,
    )
    if adapter is not None:
        merge_adapter(pipe, adapter)
    if quantize is not None:
        pipe.quantize(quantize)
    return pipe if compile is None else pipe.compile(compile)


def sample(
    model: str | Path | ARPipeline,
    prompt: Any,
    sampler: str | BaseSampler | None = None,
    *,
    num_images: int = 1,
    seed: Any = 0,
    guidance_scale: Any = None,
    guidance_schedule: Any = None,
    temperature: Schedule | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool = True,
    output_type: str = "pil",
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    image: Any = None,
    mask_image: Any = None,
    known_tokens: Any = None,
    known_scales: int | None = None,
    blend: bool = False,
    num_inference_steps: int | None = None,
    callback_on_step_end: Callable[..., Any] | None = None,
    preview_every: int | None = None,
    **sampler_options: Any,
) -> SampleOutput:
    """Draw images in one call.

    Args:
        model: an embedded name, a folder, a hub id, or a loaded pipeline.
        prompt: a class id, class name or caption, or a list of them; for models that take text also
            `arvision.Prompt(caption, negative=...)`.
        sampler: a name (see `list_samplers`), one with options such as "sjd:window=32", or a
            sampler object; None for the pipeline's own sampler with its options, and for a token
            model whose own is "ar" the faster of "ar" and "sjd" for this many images, which draw
            the same; `stats.sampler` tells which.
        num_images: images of each prompt.
        seed: image k has identity (seed, k); or a list with a seed or a pair (seed, k) per image.
        guidance_scale: weight of the condition; None for the model's recommendation, as below; a list
            has a number for each unit, a list of lists one for each image, see `ARPipeline.__call__`.
        guidance_schedule: how the weight changes over an image, see there.
        temperature: divides the logits; 0 is greedy; scale models also take a list.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, 1 for all.
        device: for a model given by name; None for an accelerator where there is one.
        dtype: likewise; None for float32 on a CPU and bfloat16 elsewhere.
        progress: show a progress bar.
        output_type: "pil", "np", "pt" or "latent".
        height: pixels, for models that draw several sizes; None for the model's own.
        width: likewise.
        negative_prompt: what guidance leads away from, for models that take text; one for all
            prompts, or one each.
        image: picture to edit, with `mask_image` or `known_scales` (see `ARPipeline.__call__`); or source
            images of a prompt, for models that read such.
        mask_image: white is redrawn, black is kept.
        known_tokens: tokens that are kept, -1 where one is drawn.
        known_scales: coarse scales of `image` that are kept, for scale models.
        blend: paste what is redrawn into `image`.
        num_inference_steps: of a diffusion decoder (GLM-Image).
        callback_on_step_end: called after each pass, see `ARPipeline.__call__`.
        preview_every: passes between two previews for it, see there.
        **sampler_options: passed to the sampler, such as `window=32`.

    Raises:
        InputError: an argument that is unknown or out of range, before the model is called.

    Example:
        >>> import arvision
        >>> out = arvision.sample("llamagen-fashion", "sneaker", seed=7, progress=False)
        >>> out.images[0].size
        (32, 32)
    """
    if isinstance(model, ARPipeline):
        pipe = model
        if device is not None or dtype is not None:
            raise InputError("device and dtype belong to load: this pipeline is loaded already")
    else:
        place = parse_device(device)
        pipe = open_cached(str(model), str(place), parse_dtype(dtype, place))
    num = 0 if sampler is not None else len(expand_prompts(prompt, num_images))
    wanted = _own_sampler(pipe, num) if sampler is None else sampler
    if isinstance(wanted, str):
        chosen = get_sampler(wanted, **sampler_options)
    else:
        chosen = wanted.with_options(**sampler_options) if sampler_options else wanted
    written = parse_sampler(wanted)[1] if isinstance(wanted, str) else {}
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    join_options(str(wanted), written, {k: v for k, v in given.items() if v is not None})
    if isinstance(wanted, str):
        asked = {name for name, value in given.items() if value is not None}
        chosen = chosen.with_law(pipe.config, {*written, *asked, *sampler_options})
    beside = {
        "height": height,
        "width": width,
        "negative_prompt": negative_prompt,
        "image": image,
        "mask_image": mask_image,
        "known_tokens": known_tokens,
        "known_scales": known_scales,
        "blend": blend or None,
        "num_inference_steps": num_inference_steps,
    }
    prompt, beside = _beside(pipe, prompt, {k: v for k, v in beside.items() if v is not None})
    out = pipe(
        prompt,
        num_images_per_prompt=num_images,
        guidance_scale=guidance_scale,
        guidance_schedule=guidance_schedule,
        seed=seed,
        sampler=chosen,
        output_type=output_type,
        progress=progress,
        callback_on_step_end=callback_on_step_end,
        preview_every=preview_every,
        **given,
        **beside,
    )
    assert isinstance(out, SampleOutput)
    window = chosen.config.get("window")
    out.stats["sampler"] = chosen.name + ("" if window is None else f":window={window}")
    return out


def _beside(pipe: ARPipeline, prompt: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The prompt, and what a call says beside it, in the words of the pipeline.

    Raises:
        InputError: something that the pipeline does not take.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    if "negative_prompt" in given and "negative_prompt" not in known:
        prompt = as_prompts(prompt, given.pop("negative_prompt"))
    for name, value in given.items():
        if name not in known:
            shown = value if isinstance(value, (int, str)) else type(value).__name__
            raise InputError(
                f"{name} {shown!r}: this model takes none, it draws one size from a prompt"
            )
    return prompt, given


def _own_sampler(pipe: ARPipeline, num_images: int) -> BaseSampler:
    """The pipeline's sampler, or a faster one that draws the same tokens from the same law.

    Which window is the faster one depends on the images that are drawn together: see `CANDIDATES`.
    Tokens do not, as Gumbel noise is that of the image and the position.
    """
    own = pipe.sampler
    shaping = {name: own.config.get(name) for name in LAW}
    if own.name != "ar" or pipe.kind != "token" or own.config["noise"] != "gumbel":
        return own
    kind = "cpu" if pipe.model.device.type == "cpu" else "accelerator"
    window = min(MOST_WINDOW, CANDIDATES[kind] // max(1, num_images))
    return own if window < LEAST_WINDOW else get_sampler("sjd", window=window, **shaping)
