"""Pipelines around the image models of transformers, with the settings of their authors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .contracts import Schedule
from .editing import read_edit
from .errors import InputError, unknown_name
from .inputs import as_prompts, check_images
from .models import Chameleon, Emu3, GlmImage, ImagePrompt, Janus, TransformersImageModel
from .models.transformers_image import emu3
from .models.transformers_image.network import base_of
from .pipeline import ARPipeline, SampleOutput
from .samplers import BaseSampler, get_sampler
from .samplers.base import LAW
from .schema import Side

FAMILIES: dict[str, type[TransformersImageModel]] = {
    str(family.network_class): family for family in (Chameleon, Emu3, GlmImage, Janus)
}
"""Families by the network's class."""

LAWS: dict[str, dict[str, Any]] = {
    "chameleon": {"guidance_scale": 3.0, "temperature": 0.7, "top_p": 0.9},
    "lumina": {"guidance_scale": 3.0, "top_k": 2000},
    "Emu3": {"guidance_scale": 3.0, "top_k": 2048, "negative_prompt": emu3.NEGATIVE},
    "GLM-Image": {"temperature": 0.9, "top_p": 0.75},
    "Janus": {"guidance_scale": 5.0},
}
"""What the authors draw with, where it is not 1, or nothing cut off."""


def family_of(network: Any) -> type[TransformersImageModel]:
    """The family of a network, also of one in a wrapper of peft.

    Raises:
        InputError: a class that no family drives.
    """
    name = type(base_of(network)).__name__
    if name not in FAMILIES:
        raise unknown_name("class of an image network", name, FAMILIES)
    return FAMILIES[name]


class ImageModelPipeline(ARPipeline):
    """Draws with an image model of transformers: Janus, Emu3, Chameleon, Anole, Lumina-mGPT.

    Called, saved and loaded as every `ARPipeline`; a call also takes a size, a negative prompt and
    source images where the model knows such.

    Args:
        transformer: the network, quantised or wrapped by peft or not.
        processor: of the network; without one prompts are ids of whole prompts.
        decoder: of a Chameleon's pixels, see `arvision.models.ChameleonDecoder`.
        sampler: default sampler; plain autoregressive sampling at the authors' settings if None.
        options: further arguments of the family's class, such as `{"layout": "lumina"}`.
        guidance_scale: recommended guidance scale; None for the authors'.
        temperature: likewise.
        top_k: likewise, 0 for all.
        top_p: likewise.
        negative_prompt: what guidance leads away from where a call says nothing; None for the
            authors' (Emu3), "" for none.
        num_threads: CPU threads at which the model measures fastest; None leaves torch's setting.
        draft: name or folder of the recommended draft model.

    Raises:
        InputError: a network that no family drives, or options that it does not take.
    """

    model_cpu_offload_seq = "transformer->decoder"
    _optional_components = ["processor", "decoder", "sampler"]

    @register_to_config
    def __init__(
        self,
        transformer: Any,
        processor: Any = None,
        decoder: Any = None,
        sampler: Any = None,
        options: dict[str, Any] | None = None,
        guidance_scale: Schedule | None = None,
        temperature: Schedule | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        negative_prompt: str | None = None,
        num_threads: Side | None = None,
        draft: str | None = None,
    ) -> None:
        DiffusionPipeline.__init__(self)
        self._calls = []
        family = family_of(transformer)
        self._settle(
            family,
            dict(options or {}),
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            negative_prompt=negative_prompt,
        )
        self.register_modules(
            transformer=transformer,
            processor=processor,
            decoder=decoder,
            sampler=self._suited(sampler),
        )
        _ = self.model  # refuses options that do not fit, before anything is drawn

    def _settle(
        self, family: type[TransformersImageModel], options: dict[str, Any], **given: Any
    ) -> None:
        """Fill in the authors' settings where none are given."""
        neutral = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        name = family.family
        if family is Chameleon:
            name = options.get("layout", "chameleon")
        law = neutral | LAWS.get(name, {})
        found = {key: law.get(key) if value is None else value for key, value in given.items()}
        self.register_to_config(**found)

    def _suited(self, sampler: Any) -> BaseSampler:
        """The given sampler, or plain sampling at the recommended settings."""
        if isinstance(sampler, BaseSampler):
            return sampler.suited("token")
        law = {name: self.config[name] for name in LAW}
        return get_sampler("ar", **law)

    @classmethod
    def from_model(cls, model: Any, **config: Any) -> ImageModelPipeline:
        """A pipeline around a loaded family object such as `Janus(network, processor)`.

        Args:
            model: the family object, whose own size and layout stay.
            **config: arguments of the class.
        """
        held = {
            "processor": model.processor,
            "decoder": getattr(model, "decoder", None),
            "options": model.options,
        }
        return cls(model.network, **held | config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """A folder or repository as `arvision.load` opens it.

        Args:
            pretrained_model_name_or_path: see there.
            **kwargs: likewise; `torch_dtype` is another name of `dtype`.
        """
        from .opening import open_model

        if "torch_dtype" in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        return open_model(pretrained_model_name_or_path, **kwargs)

    @property
    def model(self) -> TransformersImageModel:
        """The family object that satisfies the model contract, around the current network."""
        options = dict(self.config["options"] or {})
        if self.decoder is not None:
            options["decoder"] = self.decoder
        family = family_of(self.transformer)
        try:
            return cast(Any, family)(self.transformer, self.processor, **options)
        except TypeError as error:
            raise InputError(f"{family.family}: {error}") from error

    @property
    def kind(self) -> str:
        """Kind of model."""
        return "token"

    @property
    def calibration(self) -> None:
        """A draft model's calibration; these have none."""
        return None

    def _check_output(self, model: Any, output_type: str) -> None:
        if output_type in ("pil", "np", "pt"):
            model.check_pixels()
        elif output_type != "latent":
            raise InputError(f"output_type {output_type!r}: expected one of pil, np, pt, latent")

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        known_tokens: Any = None,
        blend: bool = False,
        num_images_per_prompt: int = 1,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        **call: Any,
    ) -> SampleOutput:
        """Draw images.

        Args:
            prompt: a text, ids [L] of a whole prompt, or an `ImagePrompt` of either, or a list.
            height: pixels; None for the model's own size.
            width: likewise.
            negative_prompt: what guidance leads away from, one for all prompts or one each; "" for
                none.
            image: source images: for one prompt a picture or a list, for more a list with a picture
                or a list for each. With `mask_image` it is the picture to edit, see
                `ARPipeline.__call__`.
            mask_image: white is redrawn, black is kept; see there.
            known_tokens: tokens that are kept, -1 where one is drawn; see there.
            blend: paste what is redrawn into the image; see there.
            num_images_per_prompt: images of each prompt.
            temperature: None for the sampler's own value.
            top_k: likewise.
            top_p: likewise.
            **call: the other arguments of a pipeline, see `ARPipeline.__call__`.

        Raises:
            InputError: any argument out of range, or that the model does not know, before it is
                called.
        """
        sources = image if mask_image is None else None
        prompts = self._prompts(prompt, negative_prompt, sources, call.get("guidance_scale"))
        num_sources = max(len(one.images) for one in prompts)
        num = check_images(len(prompts), num_images_per_prompt)
        conditions = [one for one in prompts for _ in range(num)]
        model = self.model.at_size(height, width, num_sources)
        law = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        edit = read_edit(
            model,
            len(prompts),
            len(conditions),
            image=None if mask_image is None else image,
            mask_image=mask_image,
            known_tokens=known_tokens,
            blend=blend,
        )
        return self._draw(model, conditions, law=law, edit=edit, **call)

    def _prompts(
        self, prompt: Any, negative: Any, image: Any, guidance_scale: Any
    ) -> list[ImagePrompt]:
        """What a call says, as one prompt each, with the recommended negative one."""
        prompts = as_prompts(prompt, negative, image)
        scale = self.config["guidance_scale"] if guidance_scale is None else guidance_scale
        usual = self.config["negative_prompt"] or None
        has_usual = usual is not None and scale != 1 and negative is None
        if not (has_usual and self.processor is not None):
            return prompts
        return [
            ImagePrompt(one.prompt, usual, one.images)
            if one.negative is None and isinstance(one.prompt, str)
            else one
            for one in prompts
        ]


# `DiffusionPipeline.from_pretrained` looks for the class of a saved pipeline among diffusers' names.
cast(Any, diffusers).ImageModelPipeline = ImageModelPipeline
