"""GLM-Image whole: codes by our samplers, pictures by diffusers' diffusion decoder."""

from __future__ import annotations

from typing import Any, cast

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from .contracts import Conditions
from .drawing import OUTPUT_TYPES, SampleOutput
from .errors import InputError, check_count
from .image_pipeline import ImageModelPipeline
from .inputs import as_prompts, check_images
from .models import GlmImage, ImagePrompt, TransformersImageModel
from .models.transformers_image.glm_image import doubled
from .models.transformers_image.network import base_of

MOST_INFERENCE_STEPS = 10_000
"""Of the diffusion decoder, which was trained on 1,000."""

DECODER_SCALE = 1.5
"""Guidance of the diffusion decoder, as diffusers has it."""


def part_bases() -> dict[str, Any]:
    """What the class of each part of diffusers' `GlmImagePipeline` is derived from."""
    import transformers as t
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    return {
        "vision_language_encoder": t.PreTrainedModel,
        "processor": t.ProcessorMixin,
        "tokenizer": t.PreTrainedTokenizerBase,
        "text_encoder": t.PreTrainedModel,
        "vae": ModelMixin,
        "transformer": ModelMixin,
        "scheduler": SchedulerMixin,
    }


class GlmPipeline(ImageModelPipeline):
    """GLM-Image whole: its network draws codes, diffusers' `GlmImagePipeline` makes the picture.

    A call also takes `num_inference_steps` of the diffusion decoder, whose guidance is what
    `guidance_scale` says; the network itself has none. Image k has the identity (seed, k), whatever
    the batch, in the decoder's noise too.

    Args:
        vision_language_encoder: the network that draws codes.
        processor: of the network.
        tokenizer: of the text encoder.
        text_encoder: reads what is written in the picture.
        vae: of the diffusion decoder.
        transformer: the diffusion decoder.
        scheduler: of the diffusion decoder.
        sampler: of codes.
        guidance_scale: of the diffusion decoder.
        temperature: None for what the network's generation configuration says, else the authors'.
        top_k: likewise.
        top_p: likewise.
        num_threads: CPU threads at which the model measures fastest.
    """

    model_cpu_offload_seq = "vision_language_encoder->text_encoder->transformer->vae"
    _optional_components = ["sampler"]

    @register_to_config
    def __init__(
        self,
        vision_language_encoder: Any,
        processor: Any,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        transformer: Any,
        scheduler: Any,
        sampler: Any = None,
        guidance_scale: float = DECODER_SCALE,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_threads: int | None = None,
    ) -> None:
        DiffusionPipeline.__init__(self)
        self._calls = []
        network = base_of(vision_language_encoder)
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        own = network.generation_config
        said = {k: getattr(own, k, None) if v is None else v for k, v in given.items()}
        if (said["top_k"] or 0) >= network.config.vq_config.num_embeddings:
            said["top_k"] = 0  # nothing is cut off
        self._settle(GlmImage, {}, guidance_scale=guidance_scale, **said)
        self.register_modules(
            tokenizer=tokenizer,
            processor=processor,
            text_encoder=text_encoder,
            vision_language_encoder=vision_language_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            sampler=self._suited(sampler),
        )
        self._decoder()

    def _decoder(self) -> Any:
        """diffusers' pipeline around the current parts."""
        parts = {name: part for name, part in self.components.items() if name != "sampler"}
        pipe = cast(Any, diffusers).GlmImagePipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def network(self) -> Any:
        """What draws the codes; `transformer` is the diffusion decoder's."""
        return self.vision_language_encoder

    @property
    def model(self) -> GlmImage:
        """The family object around the current network."""
        return GlmImage(self.network, self.processor)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a folder as `GlmImagePipeline` does, which both libraries load; without a sampler."""
        self._decoder().save_pretrained(save_directory, *args, **kwargs)

    def _check_output(self, model: Any, output_type: str) -> None:
        if output_type not in OUTPUT_TYPES:
            raise InputError(
                f"output_type {output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}"
            )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: Any = None,
        image: Any = None,
        mask_image: Any = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int = 50,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        output_type: str = "pil",
        **call: Any,
    ) -> SampleOutput:
        """Draw images from texts, or edit source images.

        Args:
            prompt: a text, an `ImagePrompt` with source images, or a list.
            height: pixels, a multiple of 32; None for 1024, or for the first source image's side.
            width: likewise.
            negative_prompt: refused, GLM-Image has none.
            image: source images, see `ImageModelPipeline.__call__`; as many for each prompt.
            mask_image: refused, no codes of a source image are kept.
            num_images_per_prompt: images of each prompt, each with codes of its own.
            guidance_scale: of the diffusion decoder; None for the recommended one.
            num_inference_steps: of the diffusion decoder.
            temperature: of the codes; None for the sampler's own value.
            top_k: likewise.
            top_p: likewise.
            output_type: "pil", "np", "pt" or "latent" (codes only).
            **call: the other arguments of a pipeline, see `ARPipeline.__call__`.

        Raises:
            InputError: any argument out of range, or that the model does not know, before it is
                called.
        """
        if mask_image is not None:
            raise InputError(
                "mask_image: GLM-Image edits source images by a prompt and keeps no tokens of them, "
                "expected none"
            )
        prompts = as_prompts(prompt, negative_prompt, image)
        for one in prompts:
            if not isinstance(one.prompt, str):
                raise InputError(
                    f"prompt {type(one.prompt).__name__}: the diffusion decoder reads it too, "
                    "expected a text"
                )
        sources = {len(one.images) for one in prompts}
        if len(sources) != 1:
            raise InputError("prompts with other numbers of source images: expected as many each")
        check_count("num_inference_steps", num_inference_steps, MOST_INFERENCE_STEPS)
        if prompts[0].images:
            side = GlmImage.cell
            own_width, own_height = prompts[0].images[0].size
            height = own_height // side * side if height is None else height
            width = own_width // side * side if width is None else width
        num = check_images(len(prompts), num_images_per_prompt)
        conditions = [one for one in prompts for _ in range(num)]
        model = self.model.at_size(height, width, sources.pop())
        scale = self.config["guidance_scale"] if guidance_scale is None else guidance_scale
        codes = [ImagePrompt(one.prompt, one.negative, one.images) for one in conditions]

        def render(part: Conditions, tokens: Tensor, seeds: list[tuple[int, int]]) -> Any:
            return self._render(
                model, part, tokens, seeds, output_type, scale, int(num_inference_steps)
            )

        return self._draw(
            model,
            codes,
            law={"temperature": temperature, "top_k": top_k, "top_p": top_p},
            guidance_scale=1.0,
            output_type=output_type,
            render=render,
            **call,
        )

    def prior_token_ids(
        self, tokens: Tensor, height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Drawn codes as diffusers' `GlmImagePipeline` takes them: ids [B, N] of cells of 16 pixels.

        Args:
            tokens: `tokens` of a call without source images.
            height: pixels of that call.
            width: likewise.
        """
        return _prior_ids(self.model.at_size(height, width), tokens)

    def _render(
        self,
        model: TransformersImageModel,
        conditions: Conditions,
        tokens: Tensor,
        seeds: list[tuple[int, int]],
        output_type: str,
        guidance_scale: float,
        num_inference_steps: int,
    ) -> Any:
        """Pictures of drawn codes, by the diffusion decoder."""
        assert isinstance(model, GlmImage)
        rows, columns = model.grids[-1]
        priors: dict[str, Any] = {"prior_token_ids": _prior_ids(model, tokens)}
        if conditions[0].images:
            sources = [model.source_codes(one.images) for one in conditions]
            priors["image"] = [list(one.images) for one in conditions]
            priors["prior_token_image_ids"] = [
                torch.cat([doubled(one[None])[0] for one in own]) for own in sources
            ]
            priors["source_image_grid_thw"] = [
                torch.tensor([[1, 2 * h, 2 * w] for h, w in (one.shape for one in own)])
                for own in sources
            ]
        made = self._decoder()(
            [one.prompt for one in conditions],
            height=rows * model.cell,
            width=columns * model.cell,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[_generator(*identity) for identity in seeds],
            output_type=output_type,
            **priors,
        )
        return made.images


def _prior_ids(model: TransformersImageModel, tokens: Tensor) -> Tensor:
    """Ids [B, N] of the cells that the diffusion decoder is given, from codes."""
    assert isinstance(model, GlmImage)
    return doubled(model.picture(tokens).unflatten(1, model.grids[-1]))


def _generator(seed: int, image: int) -> torch.Generator:
    """The diffusion decoder's noise of one image, a function of its identity."""
    mixed = int(np.random.SeedSequence([seed, image]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(mixed >> 1)
