"""The `generate` of transformers' image networks, drawn by our samplers."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..contracts import Samples, Seeds, Stats
from ..errors import InputError
from ..models import GlmImage, ImagePrompt, Janus
from ..models.transformers_image.emu3 import Emu3Sequence
from ..models.transformers_image.forced import Forced, probe
from ..samplers import get_sampler
from ..text.custom_generate import WARPERS

Note = Callable[[Stats], None]

CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria", "StopStringCriteria"}
"""Stopping criteria that change nothing in a picture of known size."""

UNKEPT = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class Plan:
    """How images are drawn.

    Attributes:
        sampler: its name.
        options: of the sampler.
        seeds: one per image; None for one draw from torch's generator per call.
    """

    sampler: str
    options: dict[str, Any]
    seeds: Seeds | None = None

    def draw(
        self,
        model: Any,
        conditions: Sequence[Any],
        config: Any,
        scale: float,
        streamer: Any = None,
    ) -> Samples:
        """Draw one image per condition under the law of a generation configuration."""
        law: dict[str, Any] = {"temperature": 0.0}
        if config.do_sample:
            neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
            found = {name: getattr(config, name, None) for name in neutral}
            law = {name: neutral[name] if v is None else v for name, v in found.items()}
        chosen = get_sampler(self.sampler, **self.options, **law)
        seeds = self.seeds
        if seeds is None:
            seed = int(torch.randint(2**62, ())) if config.do_sample else 0
            seeds = [(seed, image) for image in range(len(conditions))]
        started = time.perf_counter()
        samples = chosen(
            model,
            conditions,
            seeds=seeds,
            guidance_scale=scale,
            on_step=None if streamer is None else _feed(model, streamer),
        )
        seconds = time.perf_counter() - started
        samples.stats.update(
            seconds=seconds, seconds_per_image=seconds / len(conditions), seeds=list(seeds)
        )
        return samples


def _feed(model: Any, streamer: Any) -> Callable[[int, dict[str, Any]], bool]:
    """A callback that gives a streamer every id that is final in all rows."""
    done = 0

    def on_step(_: int, figures: dict[str, Any]) -> bool:
        nonlocal done
        ready = int(figures["lengths"].min())
        ids = model.sequence(figures["tokens"])
        places = int(model.layout.places_before(ready))
        for place in range(done, places):
            streamer.put(ids[:, place].cpu())
        done = max(done, places)
        return False

    return on_step


def refuse(noun: str, given: Iterable[Any] | None, known: set[str]) -> None:
    """Refuse what cannot be kept, by its class.

    Raises:
        InputError: see above.
    """
    for entry in given or ():
        name = type(entry).__name__
        if name not in known:
            raise InputError(
                f"{noun} {name}: it cannot be kept, expected one of {', '.join(sorted(known))}"
            )


def check_config(config: Any, num_answers: int | None = 1) -> None:
    """Refuse beams, several answers per prompt and records of the passes.

    Raises:
        InputError: see above.
    """
    for name, usual in (("num_beams", 1), ("num_return_sequences", num_answers)):
        found = getattr(config, name, None) or 1
        if usual is not None and found != usual:
            raise InputError(f"{name} {found}: an accelerated generate takes {usual}")
    for name in UNKEPT:
        if getattr(config, name, None):
            raise InputError(f"{name}: an accelerated generate does not keep it, expected False")


def _result(config: Any, sequences: Tensor) -> Any:
    if not getattr(config, "return_dict_in_generate", False):
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)  # pyright: ignore[reportArgumentType]


def _rows(input_ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The prompts without their padding."""
    if mask is None:
        return list(input_ids)
    return [row[own.bool()] for row, own in zip(input_ids, mask, strict=True)]


def _sequences(input_ids: Tensor, drawn: Tensor, config: Any, streamer: Any, given: int) -> Any:
    """Prompts and what follows, no longer than the call allows; the streamer's rest.

    Args:
        input_ids: [B, L].
        drawn: [B, M], drawn and forced ids.
        config: of the call.
        streamer: or None.
        given: ids that the streamer has.
    """
    drawn = drawn[:, : int(config.max_length) - input_ids.shape[1]]
    if streamer is not None:
        for place in range(given, drawn.shape[1]):
            streamer.put(drawn[:, place].cpu())
        streamer.end()
    return _result(config, torch.cat([input_ids, drawn.to(input_ids)], dim=1))


def _through_generate(network: Any, entry: Callable[..., Any], named: dict[str, Any]) -> Any:
    """Let the class's own generate prepare everything and call `entry` as its loop."""
    for name in ("assistant_model", "custom_generate", "synced_gpus"):
        if named.get(name):
            raise InputError(f"{name}: an accelerated generate has a loop of its own")
    return type(network).generate(network, **named, custom_generate=entry)


def _by_name(network: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of generate, by name."""
    names = list(inspect.signature(type(network).generate).parameters)[1:]
    given = {**dict(zip(names, arguments, strict=False)), **named}
    if given.get("inputs") is None:
        given.pop("inputs", None)
    return given


def glm_entry(network: Any, plan: Plan, note: Note, *arguments: Any, **named: Any) -> Any:
    """`GlmImageForConditionalGeneration.generate`."""
    given = _by_name(network, arguments, named)
    ids = given.get("inputs", given.get("input_ids"))
    grids = given.get("image_grid_thw")
    start = network.config.image_start_token_id
    if grids is None or ids is None or not bool((ids[:, -1] == start).all()):
        return type(network).generate(network, **given)
    streamer = given.pop("streamer", None)
    num_answers = given.get("num_return_sequences") or 1
    if num_answers != 1:
        raise InputError(
            f"num_return_sequences {num_answers}: an accelerated generate takes 1 (the class would "
            "repeat the grids in another order than the prompts)"
        )

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        config = generation_config
        check_config(config)
        if getattr(config, "guidance_scale", None) not in (None, 1):
            raise InputError(f"guidance_scale {config.guidance_scale}: GLM-Image takes 1 only")
        refuse("logits processor", logits_processor, {*WARPERS, "SuppressTokensLogitsProcessor"})
        refuse("stopping criterion", stopping_criteria, CRITERIA)
        check_suppressed(config, range(model.config.vq_config.num_embeddings))
        conditions, drawn_grids = _glm_conditions(model, input_ids, model_kwargs)
        token_model = GlmImage(model, grids=drawn_grids)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        samples = plan.draw(token_model, conditions, config, 1.0, streamer)
        note(samples.stats)
        end = samples.tokens.new_full((len(input_ids), 1), model.config.image_end_token_id)
        whole = torch.cat([samples.tokens, end], dim=1)
        given_ids = _given(token_model, samples)
        return _sequences(input_ids, whole, config, streamer, given_ids)

    return _through_generate(network, loop, given)


def _given(model: Any, samples: Samples) -> int:
    """Ids that `_feed` gave a streamer."""
    return model.layout.num_places if samples.stats.get("forward_passes") else 0


def check_suppressed(config: Any, codes: Iterable[int]) -> None:
    """Refuse suppressed ids that are codes; others cannot be drawn anyway.

    Raises:
        InputError: see above.
    """
    wrong = set(getattr(config, "suppress_tokens", None) or ()) & set(codes)
    if wrong:
        raise InputError(
            f"suppress_tokens holds the image code {min(wrong)}: an accelerated generate draws all "
            "codes"
        )


def _glm_conditions(
    network: Any, input_ids: Tensor, kwargs: dict[str, Any]
) -> tuple[list[ImagePrompt], list[tuple[int, int]]]:
    """Prompts with their sources' codes, and the grids that are drawn, in drawing order."""
    grids, per_sample = kwargs["image_grid_thw"], kwargs.get("images_per_sample")
    rows = _rows(input_ids, kwargs.get("attention_mask"))
    if per_sample is not None:
        of_rows = [part.tolist() for part in torch.split(grids, per_sample.tolist())]
    else:
        of_rows = [grids.tolist()] * len(rows)
    encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    codes: list[Tensor] = []
    if encoded is not None:
        features = list(encoded.pooler_output)
        codes = [network.get_image_tokens([one]).view(one.shape[-2:]) for one in features]
    conditions, drawn = [], []
    for row, own in zip(rows, of_rows, strict=True):
        num = int((row == network.config.image_end_token_id).sum())
        sources, codes = codes[:num], codes[num:]
        if not sources and num:
            raise InputError(
                f"a prompt with {num} source images and no pixel_values: expected both or neither"
            )
        conditions.append(ImagePrompt(row, images=sources))
        drawn.append([(h, w) for _, h, w in reversed(own[num:])])
    if any(one != drawn[0] for one in drawn):
        raise InputError(f"prompts that draw {drawn[0]} and others: expected one size per batch")
    return conditions, drawn[0]


def emu3_entry(network: Any, plan: Plan, note: Note, *arguments: Any, **named: Any) -> Any:
    """`Emu3ForConditionalGeneration.generate`; without a prefix function it writes text."""
    given = _by_name(network, arguments, named)
    allowed = given.get("prefix_allowed_tokens_fn")
    if allowed is None:
        return type(network).generate(network, **given)
    streamer = given.pop("streamer", None)
    known = {
        *WARPERS,
        "SuppressTokensLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    }

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        config = generation_config
        check_config(config)
        refuse("logits processor", logits_processor, known)
        refuse("stopping criterion", stopping_criteria, CRITERIA)
        if (model_kwargs.get("mm_encoder_outputs") or {}).get("image") is not None:
            raise InputError("source images: Emu3 draws from text alone")
        codes = Emu3Sequence.codes_of(model)
        check_suppressed(config, codes)
        forced = probe(
            allowed,
            input_ids,
            codes,
            int(config.max_length) - input_ids.shape[1],
            _ends(config),
        )
        scale, negatives = _guidance(logits_processor)
        rows = _rows(input_ids, model_kwargs.get("attention_mask"))
        token_model = Emu3Sequence(model, None, forced.layout, forced.grid)
        conditions = _emu3_conditions(rows, negatives, forced, scale)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        samples = plan.draw(token_model, conditions, config, scale, streamer)
        note(samples.stats)
        head = samples.tokens.new_tensor(forced.head).expand(len(rows), -1)
        drawn = token_model.sequence(samples.tokens)
        whole = torch.cat([head, drawn], dim=1)
        return _sequences(input_ids, whole, config, streamer, _given(token_model, samples))

    return _through_generate(network, loop, given)


def _ends(config: Any) -> set[int]:
    ends = config.eos_token_id
    return set() if ends is None else set(ends if isinstance(ends, (list, tuple)) else [ends])


def _guidance(processors: Any) -> tuple[float, list[Tensor] | None]:
    """Scale and null prompts of the unbatched guidance among the processors."""
    for one in processors or ():
        if type(one).__name__ == "UnbatchedClassifierFreeGuidanceLogitsProcessor":
            context = one.unconditional_context
            ids, mask = context["input_ids"], context["attention_mask"]
            return float(one.guidance_scale), None if ids is None else _rows(ids, mask)
    return 1.0, None


def _emu3_conditions(
    rows: Sequence[Tensor], negatives: list[Tensor] | None, forced: Forced, scale: float
) -> list[ImagePrompt]:
    """Prompts and null prompts, each with what is forced before the first code."""
    if negatives is not None and len(negatives) not in (1, len(rows)):
        raise InputError(f"{len(negatives)} negative prompts for {len(rows)}: expected one each")
    prompts = []
    for place, row in enumerate(rows):
        null = row[-1:] if negatives is None else negatives[place % len(negatives)]
        head = row.new_tensor(forced.head)
        negative = None if scale == 1 else torch.cat([null.to(row), head])
        prompts.append(ImagePrompt(torch.cat([row, head]), negative))
    return prompts


def janus_images(network: Any, plan: Plan, note: Note, *arguments: Any, **named: Any) -> Any:
    """`JanusForConditionalGeneration.generate`; without `generation_mode="image"` it writes text."""
    given = _by_name(network, arguments, named)
    if given.get("generation_mode", "text") != "image":
        return type(network).generate(network, **given)
    given.pop("generation_mode")
    streamer, processors = given.pop("streamer", None), given.pop("logits_processor", None)
    mask, ids = given.pop("attention_mask", None), given.pop("inputs", None)
    for name in ("assistant_model", "custom_generate", "prefix_allowed_tokens_fn"):
        if given.pop(name, None):
            raise InputError(f"{name}: not kept where Janus draws an image")
    # The class writes into the configuration that it is given.
    settings = copy.deepcopy(given.pop("generation_config", None))
    config, kwargs = network._prepare_generation_config(settings, **given)
    ids = kwargs.pop("input_ids", None) if ids is None else ids
    if ids is None or ids.dim() != 2:
        raise InputError("Janus draws from input_ids [B, L]: none were given")
    check_config(config, num_answers=None)
    refuse("logits processor", processors, {*WARPERS})
    scale = 5.0 if config.guidance_scale is None else float(config.guidance_scale)
    plain = copy.deepcopy(config)
    plain.guidance_scale = None
    made = network._get_logits_processor(
        generation_config=plain, input_ids_seq_length=ids.shape[1], device=ids.device
    )
    refuse("logits processor", made, {*WARPERS})
    boi = (getattr(config, "generation_kwargs", None) or {}).get("boi_token_id")
    names = {"bos": config.bos_token_id, "pad": config.pad_token_id, "image_start": boi}
    model = Janus(network, ids={name: int(v) for name, v in names.items() if v is not None})
    rows = [row for row in _rows(ids, mask) for _ in range(config.num_return_sequences or 1)]
    if streamer is not None:
        streamer.put(ids.cpu())
    # Up to a scale of 1 the class guides nothing.
    samples = plan.draw(model, rows, config, max(scale, 1.0), streamer)
    note(samples.stats)
    if streamer is not None:
        streamer.end()
    return _result(config, samples.tokens)


def with_seeds(plan: Plan, seeds: Seeds | None) -> Plan:
    """The plan with seeds of the caller's own."""
    return replace(plan, seeds=seeds)
