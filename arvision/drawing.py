"""How a pipeline draws: checks, parts that fit into memory, progress, and pictures out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from diffusers.utils.outputs import BaseOutput
from torch import Tensor
from tqdm.auto import tqdm

from .batches import draw_parts, image_memory, split
from .contracts import Conditions, Samples, Stats, StepCallback, device_of
from .decoding.guidance import Guidance, read_guidance
from .editing import Edit, check_parts
from .errors import InputError, unknown_name
from .inputs import check_numbers, check_weights, resolve_seeds
from .models.pixels import written
from .networks import place_of
from .previews import check_preview, preview
from .samplers import SAMPLERS, BaseSampler
from .threads import THREADS

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class SampleOutput(BaseOutput):
    """What a pipeline returns.

    Attributes:
        images: PIL images, or [B, H, W, 3] float array ("np") or [B, 3, H, W] float tensor ("pt")
            in [0, 1], or the tokens ("latent").
        tokens: [B, N] int64 (token and scale models; [B, N, d] where tokens are bits), [B, N, D]
            float (continuous models).
        stats: a dict that can also be read by attribute: `forward_passes` (model calls on image
            tokens; prefill not counted), `tokens` (per image), `tokens_per_pass`, `seconds` (whole
            call), `seconds_per_image`, `seeds`, and what the sampler adds.
    """

    images: Any
    tokens: Tensor
    stats: Stats


class Draws:
    """Mixin of pipelines: one image for each condition, with a model and a sampler.

    The pipeline has `sampler`, `tokenizer`, `transformer`, `config` and `kind`, and is `Interruptible`.
    """

    kind: str
    sampler: Any
    tokenizer: Any
    transformer: Any
    config: Any
    bind: Callable[..., BaseSampler]
    maybe_free_model_hooks: Callable[[], None]
    _call: Callable[[], Any]
    _calls: list[Any]
    _steps: Any
    _quantized: Any
    _callback_tensor_inputs: Sequence[str]

    def check_sampler(self, sampler: BaseSampler) -> None:
        """Refuse a sampler for another kind of model.

        Raises:
            InputError: names the samplers that fit.
        """
        kind = self.kind
        drives = SAMPLERS.entry(sampler.name).facts["drives"]
        if kind not in drives:
            fitting = ", ".join(e.name for e in SAMPLERS if kind in e.facts["drives"])
            raise InputError(
                f"sampler {sampler.name!r} drives {drives} models, this is a {kind} "
                f"model: expected one of {fitting}"
            )

    def _draw(
        self,
        model: Any,
        conditions: Conditions,
        *,
        guidance_scale: Any = None,
        guidance_schedule: Any = None,
        law: dict[str, Any],
        edit: Edit | None = None,
        generator: Any = None,
        seed: Any = None,
        sampler: BaseSampler | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        preview_every: int | None = None,
        progress: bool | None = None,
        render: Callable[..., Any] | None = None,
    ) -> SampleOutput:
        """Draw one image per condition with a model; the other arguments are those of a call.

        Args:
            model: satisfies the contract of this pipeline's kind.
            conditions: one per image.
            law: temperature, top_k and top_p; None for the sampler's own value.
            edit: what is given of the pictures; None for nothing.
            render: conditions, tokens and identities to what `output_type` names; None for the
                model's `decode`.
        """
        self._check_output(model, output_type)
        wanted_inputs = self._callback_inputs(callback_on_step_end_tensor_inputs)
        every = check_preview(preview_every, model, callback_on_step_end)
        if every is not None:
            self._check_output(model, "pil")
        seeds = resolve_seeds(seed, generator, len(conditions))
        chosen: BaseSampler = self.sampler if sampler is None else sampler
        self.check_sampler(chosen)
        changes = {
            name: check_numbers(name, value, is_whole=name == "top_k", is_one=name == "top_p")
            for name, value in law.items()
            if value is not None
        }
        if changes:
            chosen = chosen.with_options(**changes)
        self._check_effect(chosen, model, law | {"guidance_scale": guidance_scale})
        scale = self.config["guidance_scale"] if guidance_scale is None else guidance_scale
        scale = check_weights(scale)
        scale = read_guidance(scale, guidance_schedule, self.kind, len(conditions))
        chosen = self.bind(chosen, model)
        started = time.perf_counter()
        is_guided = scale not in (0, 1)
        memory = image_memory(model, getattr(self, "tokenizer", None), is_guided, output_type)
        parts = split(len(conditions), memory, device_of(model))
        parts = check_parts(edit, model, self.kind, parts)
        total = len(conditions) * model.num_tokens
        with self._call() as call, self._threads(), self._bar(total, progress) as bar:

            def on_step(step: int, figures: dict[str, Any]) -> bool:
                bar.update(figures["finished"] - bar.n)
                if callback_on_step_end is not None:
                    given = {n: v for n, v in figures.items() if n in wanted_inputs}
                    if every is not None and step % every == 0:
                        begun = time.perf_counter()
                        given["preview"] = preview(model, *figures["drawn"]())
                        given["preview_seconds"] = time.perf_counter() - begun
                    callback_on_step_end(self, step, step, given)
                return call.is_interrupted

            more: dict[str, Any] = {} if self._steps is None else {"steps": self._steps}

            def draw(part: slice, tell: StepCallback) -> Samples:
                weight = scale.part(part) if isinstance(scale, Guidance) else scale
                own: dict[str, Any] = {"seeds": seeds[part], "guidance_scale": weight}
                if edit is not None:
                    own["given"] = edit.given.select(part)
                return chosen(model, conditions[part], **own, on_step=tell, **more)

            def finish(part: slice, samples: Samples) -> Any:
                if output_type == "latent":
                    return samples.tokens
                decoded = samples.tokens if samples.embeddings is None else samples.embeddings
                if render is not None:
                    return render(conditions[part], decoded, seeds[part])
                pixels = model.decode(decoded)
                return written(pixels if edit is None else edit.paste(pixels, part), output_type)

            samples, images = draw_parts(parts, draw, finish, on_step)
        if output_type == "pil":
            _mark_incomplete(images, samples.stats)
        seconds = time.perf_counter() - started
        samples.stats.update(
            seconds=seconds, seconds_per_image=seconds / len(conditions), seeds=seeds
        )
        if self._quantized is not None:
            samples.stats["quantized"] = self._quantized
        if not self._calls:  # another draw needs its networks where they are
            self.maybe_free_model_hooks()
        if not return_dict:
            return cast(Any, (images,))
        return SampleOutput(images=images, tokens=samples.tokens, stats=samples.stats)

    @staticmethod
    def _check_effect(sampler: BaseSampler, model: Any, given: dict[str, Any]) -> None:
        """Refuse arguments of the call that change nothing in this draw (`InputError`)."""
        for name, neutral in sampler.without_effect(model).items():
            value = given.get(name)
            if value is not None and value != neutral:
                raise InputError(
                    f"{name} {value!r}: {sampler.name} with {sampler.plan_in_words} does not look at "
                    f"it, expected {neutral!r} or none"
                )

    def _check_output(self, model: Any, output_type: str) -> None:
        """Refuse an output that is none, or that this pipeline cannot make (`InputError`)."""
        if output_type not in OUTPUT_TYPES:
            raise InputError(
                f"output_type {output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}"
            )
        if output_type != "latent" and self.tokenizer is None:
            raise InputError(
                f"output_type {output_type!r}: this pipeline has no tokenizer to make pictures, "
                'expected "latent"'
            )

    def _callback_inputs(self, names: Sequence[str] | None) -> Sequence[str]:
        """What a callback is given.

        Raises:
            InputError: a name of something else.
        """
        for name in names or ():
            if name not in self._callback_tensor_inputs:
                raise unknown_name("input of a callback", name, self._callback_tensor_inputs)
        return self._callback_tensor_inputs if names is None else names

    def _bar(self, total: int, progress: bool | None) -> Any:
        """A bar over the tokens, as `set_progress_bar_config` says unless the call does."""
        settings = dict(getattr(self, "_progress_bar_config", {}))
        if progress is not None:
            settings["disable"] = not progress
        return tqdm(total=total, **settings)

    def _threads(self) -> contextlib.AbstractContextManager[None]:
        """Run on the recommended number of CPU threads."""
        wanted = self.config["num_threads"]
        if wanted is None or place_of(self.transformer).type != "cpu":
            return contextlib.nullcontext()
        return THREADS.at_most(wanted)


def _mark_incomplete(images: Sequence[Any], stats: Stats) -> None:
    """Say in the `info` of PIL images how far an interrupted run came with them."""
    for image, is_complete, length in zip(images, stats["complete"], stats["lengths"], strict=True):
        if not is_complete:
            image.info["incomplete"] = f"{length} of {stats['tokens']} tokens drawn"
