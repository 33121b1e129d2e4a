"""`generate_prior_tokens` of diffusers' `GlmImagePipeline`, drawn by our samplers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contracts import Stats
from ..errors import InputError
from ..models.transformers_image.glm_image import doubled, grids_of
from .images import Plan, glm_entry, with_seeds

Priors = tuple[Tensor, list[Tensor] | None, list[Tensor] | None]


@torch.no_grad()
def generate_prior_tokens(
    pipe: Any,
    network: Any,
    plan: Plan,
    note: Callable[[Stats], None],
    prompt: str | list[str],
    height: int,
    width: int,
    image: list[list[Any]] | None = None,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Priors:
    """Codes that the diffusion decoder takes, each side doubled.

    Args:
        pipe: the pipeline.
        network: its `vision_language_encoder`.
        plan: how to draw.
        note: takes the statistics.
        prompt: a text, or one per image.
        height: pixels, a multiple of 32.
        width: likewise.
        image: source images of each prompt, as many for each; None to draw from text.
        device: None for the pipeline's.
        generator: image k has the identity (its seed, k); None for one draw from torch.

    Returns:
        Codes [B, 4 H W]; with source images also, per prompt, their codes one after the other and
        their grids [n, 3].

    Raises:
        InputError: a size that the model does not draw.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    rows, columns = grids_of(height, width, editing=True)[0]
    if image is not None and len({len(one) for one in image}) != 1:
        raise InputError("prompts with other numbers of source images: expected as many for each")
    messages = [
        [{"role": "user", "content": [*_pictures(image, place), {"type": "text", "text": text}]}]
        for place, text in enumerate(prompts)
    ]
    inputs = pipe.processor.apply_chat_template(
        messages,
        tokenize=True,
        padding=len(prompts) > 1,
        target_h=height,
        target_w=width,
        return_dict=True,
        return_tensors="pt",
    ).to(device or pipe._execution_device)
    seeds = None
    if generator is not None:
        seeds = [(generator.initial_seed(), place) for place in range(len(prompts))]
    grids, per_prompt = inputs["image_grid_thw"], inputs["images_per_sample"].tolist()
    num_tokens = rows * columns if image is not None else int(grids[: per_prompt[0]].prod(1).sum())
    out = glm_entry(
        network,
        with_seeds(plan, seeds),
        note,
        **inputs,
        max_new_tokens=num_tokens + 1,
        do_sample=True,
    )
    drawn = out[:, inputs["input_ids"].shape[1] :][:, :num_tokens]
    codes = doubled(drawn[:, -rows * columns :].unflatten(1, (rows, columns)))
    if image is None:
        return codes, None, None
    own = [part[:-1] for part in torch.split(grids, per_prompt)]
    features = network.get_image_features(inputs["pixel_values"], torch.cat(own)).pooler_output
    sources = [
        doubled(network.get_image_tokens([one]).view(1, *one.shape[-2:]))[0] for one in features
    ]
    num = len(image[0])
    of_prompts = [torch.cat(sources[k * num : (k + 1) * num]) for k in range(len(prompts))]
    scale = grids.new_tensor([1, 2, 2])
    return codes, of_prompts, [part * scale for part in own]


def _pictures(image: Sequence[Sequence[Any]] | None, place: int) -> list[dict[str, Any]]:
    if image is None:
        return []
    return [{"type": "image", "image": one} for one in image[place]]
