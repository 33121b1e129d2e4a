"""Nodes: load a pipeline, draw, edit, and the codes of GLM-Image's first stage.

ComfyUI's pictures are float tensors [B, H, W, 3] in [0, 1], its masks [B, H, W] with 1 where a picture
is to change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import arvision
from arvision import InputError

from .host import Progress

CATEGORY = "arvision"
PIPELINE = "ARVISION_PIPELINE"
MOST_SEED = 2**63 - 1
MOST_IMAGES = 64

HOW: dict[str, Any] = {
    "sampler": ("STRING", {"default": "sjd"}),
    "num_images": ("INT", {"default": 1, "min": 1, "max": MOST_IMAGES}),
    "seed": ("INT", {"default": 0, "min": 0, "max": MOST_SEED, "control_after_generate": True}),
    "guidance_scale": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1}),
    "preview_every": ("INT", {"default": 8, "min": 0, "max": 10_000}),
}
"""Inputs of every node that draws: guidance below 0 is the model's own, 0 previews are none."""


def draw(pipeline: Any, prompt: str, how: dict[str, Any], **given: Any) -> Tensor:
    """Pictures [B, H, W, 3] of a pipeline's call."""
    scale, every = how["guidance_scale"], how["preview_every"]
    out = pipeline(
        prompt,
        num_images_per_prompt=how["num_images"],
        seed=how["seed"],
        guidance_scale=None if scale < 0 else scale,
        sampler=arvision.get_sampler(how["sampler"].strip()),
        callback_on_step_end=Progress(),
        preview_every=every or None,
        output_type="pt",
        progress=False,
        **given,
    )
    return out.images.movedim(1, -1).float().cpu()


class LoadPipeline:
    """A model by name, folder or hub id."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = (PIPELINE,)
    RETURN_NAMES = ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The models inside the package; a folder or hub id goes before them."""
        return {
            "required": {
                "model": (arvision.list_models(),),
                "dtype": (["float32", "bfloat16", "float16"],),
            },
            "optional": {"path_or_id": ("STRING", {"default": ""})},
        }

    def load(self, model: str, dtype: str, path_or_id: str = "") -> tuple[Any]:
        """The pipeline, on an accelerator if there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipe = arvision.load(path_or_id.strip() or model, dtype=getattr(torch, dtype))
        return (pipe.to(device),)


class Sample:
    """Pictures of a prompt."""

    CATEGORY = CATEGORY
    FUNCTION = "sample"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A pipeline, a prompt, and how to draw."""
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "prompt": ("STRING", {"default": "sneaker", "multiline": True}),
                **HOW,
            }
        }

    def sample(self, pipeline: Any, prompt: str, **how: Any) -> tuple[Tensor]:
        """Pictures [B, H, W, 3]."""
        return (draw(pipeline, prompt, how),)


class Edit:
    """A picture whose masked part is drawn anew; one for all images, or one for each."""

    CATEGORY = CATEGORY
    FUNCTION = "edit"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Those of `Sample`, a picture and a mask."""
        wanted = Sample.INPUT_TYPES()["required"]
        keep = ("BOOLEAN", {"default": False})
        return {"required": {**wanted, "image": ("IMAGE",), "mask": ("MASK",), "keep_pixels": keep}}

    def edit(
        self, pipeline: Any, prompt: str, image: Tensor, mask: Tensor, keep_pixels: bool, **how: Any
    ) -> tuple[Tensor]:
        """Pictures [B, H, W, 3].

        Raises:
            InputError: another number of pictures or masks, a picture of another size, an empty mask.
        """
        for name, given in (("pictures", image), ("masks", mask)):
            if len(given) not in (1, how["num_images"]):
                raise InputError(
                    f"{len(given)} {name} for {how['num_images']} images: expected one, or as many"
                )
        pixels, masks = list(2 * image.clamp(0, 1) - 1), list(mask.clamp(0, 1))
        return (draw(pipeline, prompt, how, image=pixels, mask_image=masks, blend=keep_pixels),)


class GlmPriorTokens:
    """Codes of GLM-Image's first stage, as diffusers' `GlmImagePipeline(prior_token_ids=)` takes them."""

    CATEGORY = CATEGORY
    FUNCTION = "draw"
    RETURN_TYPES = ("GLM_PRIOR_TOKENS",)
    RETURN_NAMES = ("prior_token_ids",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A pipeline of GLM-Image, a prompt, a size, and how to draw."""
        side = {"default": 1024, "min": 32, "max": 4096, "step": 32}
        own = {name: HOW[name] for name in ("sampler", "num_images", "seed")}
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "prompt": ("STRING", {"multiline": True}),
                "height": ("INT", side),
                "width": ("INT", side),
                **own,
            }
        }

    def draw(
        self,
        pipeline: Any,
        prompt: str,
        height: int,
        width: int,
        sampler: str,
        num_images: int,
        seed: int,
    ) -> tuple[Tensor]:
        """Ids [B, N] of cells of 16 pixels.

        Raises:
            InputError: a pipeline of another model.
        """
        if not hasattr(pipeline, "prior_token_ids"):
            raise InputError(f"{type(pipeline).__name__}: expected a pipeline of GLM-Image")
        out = pipeline(
            prompt,
            height=height,
            width=width,
            num_images_per_prompt=num_images,
            seed=seed,
            sampler=arvision.get_sampler(sampler.strip()),
            callback_on_step_end=Progress(),
            output_type="latent",
            progress=False,
        )
        return (pipeline.prior_token_ids(out.tokens, height, width),)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "ArvisionLoadPipeline": LoadPipeline,
    "ArvisionSample": Sample,
    "ArvisionEdit": Edit,
    "ArvisionGlmPriorTokens": GlmPriorTokens,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "ArvisionLoadPipeline": "Load AR pipeline (arvision)",
    "ArvisionSample": "Sample (arvision)",
    "ArvisionEdit": "Edit (arvision)",
    "ArvisionGlmPriorTokens": "GLM-Image prior tokens (arvision)",
}
