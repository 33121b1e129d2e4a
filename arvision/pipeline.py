"""ARPipeline: where a model and a sampler meet, in the manner of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .card import megabytes, settings_in_words, write_card
from .compiling import Prepares
from .components import checked_parts, quietly, told
from .contracts import Schedule
from .drawing import Draws, SampleOutput
from .editing import read_edit
from .errors import InputError, StateError, shown
from .files import user_path
from .going import Interruptible
from .inputs import as_prompts, expand_prompts
from .models import FAMILIES
from .models.conditions import check_class_names
from .models.network import REACHED
from .networks import bare, hooks_of, place_of
from .portable import Portable
from .quantization import is_quantized
from .samplers import BaseSampler, get_sampler
from .schema import Side


class ARPipeline(Draws, Prepares, Interruptible, Portable, DiffusionPipeline):
    """Draws images with an autoregressive model and an exchangeable sampler.

    Saved and loaded as every diffusers pipeline; `pipe.sampler` is swapped as a scheduler is:
    `pipe.sampler = SJDSampler.from_config(pipe.sampler.config)`.

    Args:
        transformer: network of a registered model family.
        tokenizer: its image tokenizer.
        sampler: default sampler; plain autoregressive sampling at the recommended settings if None.
        text_encoder: of a text-conditional model.
        text_tokenizer: of the text encoder.
        class_names: names of the classes, in the order of their ids.
        guidance_scale: recommended guidance scale; scale models also take a list, one for each scale.
        temperature: recommended temperature, likewise.
        top_k: recommended top-k, 0 for all.
        top_p: recommended top-p.
        num_threads: CPU threads at which the model measures fastest; None leaves torch's setting.
        draft: name or folder of the recommended draft model.
        calibration: of a draft model, how its confidence tells that a draft will be accepted; see
            `arvision.decoding.draft_model.Calibration`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->tokenizer"
    _optional_components = ["tokenizer", "sampler", "text_encoder", "text_tokenizer"]
    _callback_tensor_inputs = ["finished", "total", "accepted"]
    local_models = ("draft",)

    @register_to_config
    def __init__(
        self,
        transformer: Any,
        tokenizer: Any = None,
        sampler: Any = None,
        text_encoder: Any = None,
        text_tokenizer: Any = None,
        class_names: Sequence[str] | None = None,
        guidance_scale: Schedule = 1.0,
        temperature: Schedule = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_threads: Side | None = None,
        draft: str | None = None,
        calibration: dict[str, list[float]] | None = None,
    ) -> None:
        super().__init__()
        kind = FAMILIES.entry(type(bare(transformer)).__name__).facts["kind"]
        check_class_names(class_names, transformer.config.get("num_classes"))
        if isinstance(sampler, BaseSampler):
            sampler = sampler.suited(kind)
        plain = get_sampler("ar", temperature=temperature, top_k=top_k, top_p=top_p)
        self.register_modules(
            transformer=transformer,
            tokenizer=tokenizer,
            sampler=sampler if sampler is not None else plain,
            text_encoder=text_encoder,
            text_tokenizer=text_tokenizer,
        )
        self._calls = []

    @classmethod
    def from_model(cls, model: Any, **config: Any) -> ARPipeline:
        """A pipeline around a loaded family object such as `LlamaGen.from_official(...)`.

        Args:
            model: the family object.
            **config: arguments of the class; they replace what the model holds, such as its
                `class_names` or `text_encoder`.
        """
        captions = getattr(model, "captions", None)
        held = {
            "tokenizer": model.tokenizer,
            "text_encoder": getattr(captions, "text_encoder", None),
            "text_tokenizer": getattr(captions, "text_tokenizer", None),
            "class_names": getattr(model, "class_names", None) or None,
        }
        return cls(model.transformer, **held | config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """A saved pipeline, see diffusers' `DiffusionPipeline.from_pretrained`.

        Args:
            pretrained_model_name_or_path: folder, or a hub id "owner/name".
            **kwargs: parts that replace the saved ones, `dtype`, `variant`, and others of diffusers'.

        Raises:
            InputError: code of a stranger is asked for (`custom_pipeline`, `trust_remote_code`).
            CheckpointError: a folder that is not a complete pipeline, or names a class that we do
                not know, or whose weights do not fit; nothing of it was built or run.
        """
        for name in ("custom_pipeline", "trust_remote_code"):
            if kwargs.pop(name, None):
                raise InputError(f"{name}: code of a model's folder is never run, leave it out")
        folder = user_path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from .opening import find_folder

            reached = {name: kwargs.pop(name) for name in REACHED if name in kwargs}
            folder = find_folder(
                str(pretrained_model_name_or_path), kwargs.get("variant"), **reached
            )
        with told(folder), quietly():
            given = checked_parts(folder, cls, kwargs)
            return super().from_pretrained(str(folder), **{"use_safetensors": True} | given)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """A further pipeline around the same networks; arguments of the class replace its own.

        diffusers asks for float32 and leaves out networks whose class the signature does not name.
        """
        kept = {"transformer", "tokenizer"} & set(pipeline.components)
        held = {name: pipeline.components[name] for name in kept}
        if not {"dtype", "torch_dtype"} & set(kwargs):
            held["dtype"] = pipeline.dtype
        return super().from_pipe(pipeline, **held | kwargs)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write a folder as every diffusers pipeline does, with a model card where there is none."""
        if is_quantized(self.transformer):
            raise InputError(
                "quantised weights are not saved: save the pipeline before, and quantise what is loaded"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        if not (Path(save_directory) / "README.md").exists():
            family = type(bare(self.transformer)).__name__.removesuffix("Transformer")
            facts = {
                "Size": f"{megabytes(save_directory)}.",
                "Recommended settings": f"{settings_in_words(self.config)}.",
            }
            description = f'A {family} pipeline: `arvision.load("path/of/this/folder")`.'
            write_card(save_directory, description, facts, tags=("autoregressive",))

    @property
    def network(self) -> Any:
        """What draws the tokens."""
        return self.transformer

    @property
    def model(self) -> Any:
        """The family object that satisfies the model contract, around the current networks."""
        family = FAMILIES[type(bare(self.transformer)).__name__]
        text_parts = {"text_encoder": self.text_encoder, "text_tokenizer": self.text_tokenizer}
        given = {name: part for name, part in text_parts.items() if part is not None}
        return family(
            self.transformer, self.tokenizer, class_names=self.config["class_names"], **given
        )

    @property
    def calibration(self) -> dict[str, list[float]] | None:
        """How a draft model's confidence tells that a draft will be accepted."""
        return self.config["calibration"]

    def bind(self, sampler: BaseSampler, model: Any) -> BaseSampler:
        """The sampler with all that it needs besides the model, loaded on this device and dtype.

        What it does not name itself is what the model recommends: its `draft`, its `teacher`.
        """
        recommended = {
            "draft": self.config.get("draft"),
            "teacher": getattr(model, "teacher_name", None),
        }
        names = {need: sampler.config[need] or recommended[need] for need in sampler.missing(model)}
        found = {need: self.opened(name) for need, name in names.items() if name is not None}
        return sampler.bind(**found)

    def opened(self, name: str) -> ARPipeline:
        """A further model by name, on this device and dtype."""
        from .opening import open_cached

        return open_cached(name, str(place_of(self.transformer)), self.dtype)

    @property
    def kind(self) -> str:
        """Kind of model: "token", "scale", "continuous" or "student"."""
        return FAMILIES.entry(type(bare(self.transformer)).__name__).facts["kind"]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast, as every diffusers pipeline.

        Raises:
            StateError: a draw is going on, which would find its networks moved.
        """
        if self._calls:
            raise StateError(f"{len(self._calls)} draws are going on: expected to() after them")
        return super().to(*args, **kwargs)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep weights in main memory and bring each layer's for its call, see diffusers.

        diffusers names the CPU "cpu:0", which accelerate takes for another device than "cpu": on the
        way there parameters would become plain tensors, and the second call would fail.
        """
        super().enable_sequential_cpu_offload(gpu_id, cast(Any, device))
        networks = [part for part in self.components.values() if isinstance(part, torch.nn.Module)]
        for module in (module for network in networks for module in network.modules()):
            for hook in hooks_of(module):
                if torch.device(hook.execution_device or "meta").type == "cpu":
                    hook.execution_device = torch.device("cpu")

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any,
        *,
        negative_prompt: Any = None,
        image: Any = None,
        mask_image: Any = None,
        known_tokens: Any = None,
        known_scales: int | None = None,
        blend: bool = False,
        num_images_per_prompt: int = 1,
        guidance_scale: Any = None,
        guidance_schedule: Any = None,
        temperature: Schedule | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: Any = None,
        sampler: BaseSampler | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        preview_every: int | None = None,
        progress: bool | None = None,
    ) -> SampleOutput:
        """Draw images.

        Args:
            prompt: a class id, class name or caption (or caption features [T, C], or a `Prompt` with a
                negative), a mixture of classes such as {"sneaker": 0.5, "bag": 0.5} or weights
                [num_classes], None for no condition, or a list.
            negative_prompt: models that take text: what guidance leads away from, one for all prompts
                or one each.
            image: picture to edit, of the model's size: PIL, array or tensor, see
                `arvision.models.pixels.pixels_of`; one for all images, for each prompt, or for each
                image. With `mask_image`, or for scale models with `known_scales`. See `docs/editing.md`.
            mask_image: white is redrawn, black is kept; every token that white touches is drawn anew.
            known_tokens: in place of an image: tokens [n], [N] or [B, N] that are kept, -1 (in latents
                NaN) where one is drawn.
            known_scales: scale models: so many coarse scales of the image are kept whole.
            blend: paste what is redrawn into the image, whose other pixels then are its own and not
                those of its tokens.
            num_images_per_prompt: images of each prompt.
            guidance_scale: null + scale * (cond - null); None for the model's recommendation. A list has
                a number for each unit (token, scale, or iteration of latents), a list of lists one
                list for each image, of one number or one for each unit.
            guidance_schedule: how the weight changes over an image: "constant", "linear" (from 1 to the
                scale), "falling", "cosine", shares (begin, end) outside of which it is 1, or a
                function of the share drawn (0 to 1) and the scale. None for the model's own way.
            temperature: None for the sampler's own value.
            top_k: likewise.
            top_p: likewise.
            generator: source of the seed (one draw per call), or one generator per image.
            seed: an integer: image k of the call has identity (seed, k); or a list with an integer
                or a pair (seed, k) per image. Excludes `generator`. Without either, a seed is drawn
                from torch's default generator and recorded in the statistics.
            sampler: replaces the pipeline's sampler for this call.
            output_type: "pil", "np", "pt" or "latent" (tokens only).
            return_dict: false for a plain tuple `(images,)`.
            callback_on_step_end: `callback(pipe, step, timestep, kwargs)` after each pass, with
                {"finished", "total", "accepted"}; it may set `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs: names of what the callback is given; None for all.
            preview_every: passes after which the callback is also given `kwargs["preview"]`, a PIL
                picture of what is final of each image that is being drawn, see `docs/editing.md`.
            progress: show a bar; None as `set_progress_bar_config` says.

        Raises:
            InputError: any argument out of range, before the model is called.
        """
        if negative_prompt is not None:
            if self.transformer.config.get("num_classes"):
                raise InputError(
                    f"negative_prompt {shown(negative_prompt)}: this model takes classes and no text, "
                    "expected none"
                )
            prompt = as_prompts(prompt, negative_prompt)
        model, conditions = self.model, expand_prompts(prompt, num_images_per_prompt)
        edit = read_edit(
            model,
            len(conditions) // num_images_per_prompt,
            len(conditions),
            image=image,
            mask_image=mask_image,
            known_tokens=known_tokens,
            known_scales=known_scales,
            blend=blend,
        )
        return self._draw(
            model,
            conditions,
            edit=edit,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            law={"temperature": temperature, "top_k": top_k, "top_p": top_p},
            generator=generator,
            seed=seed,
            sampler=sampler,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            preview_every=preview_every,
            progress=progress,
        )


# `DiffusionPipeline.from_pretrained` looks for the class of a saved pipeline among diffusers' names.
cast(Any, diffusers).ARPipeline = ARPipeline
