"""`model.generate(..., custom_generate=arvision.custom_generate)`: our loop behind transformers' call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..contracts import Stats
from ..errors import InputError
from .generation import Prepared, generate
from .processors import Criteria, Prefixes, check_usable
from .seq2seq import is_encoder_decoder

WARPERS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")
"""What transformers makes of a generation config's temperature, top_k and top_p, in this order. Where
nothing else is asked for, one fused shaping does the same."""

READ = {
    "attention_mask",
    "use_cache",
    "logits_to_keep",
    "cache",
    "past_key_values",
    "position_ids",
    "cache_position",
}
"""What transformers hands to every loop."""


def custom_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    drafter: Any = "prompt_lookup+token_recycling",
    rule: str = "lossless",
    num_draft: int | str | None = None,
    drafter_options: dict[str, Any] | None = None,
    rule_options: dict[str, Any] | None = None,
    seed: int | None = None,
    text_streamer: Any = None,
    record: Callable[[Stats], None] | None = None,
    **model_kwargs: Any,
) -> Any:
    """Continue prompts with several tokens per pass: an entry for transformers' `generate`.

    `model.generate(**inputs, custom_generate=arvision.custom_generate)` is all it takes; greedy
    answers are those of plain `generate`. The arguments from `drafter` on can be given to `generate`
    as well.

    Args:
        model: the causal language model whose `generate` was called.
        input_ids: [B, L], padded on the left.
        logits_processor: each acts on every candidate, with the candidate's own prefix.
        stopping_criteria: asked after every token.
        generation_config: as transformers prepared it.
        drafter: see `arvision.generate`; None drafts nothing. An `assistant_model` of `generate`
            takes its place.
        rule: see `arvision.generate`.
        num_draft: see `arvision.generate`.
        drafter_options: see `arvision.generate`.
        rule_options: see `arvision.generate`.
        seed: of the draws; None takes one from torch's generator, so that `torch.manual_seed` counts.
        text_streamer: a streamer that was not told the prompt; `streamer` of `generate` works as well.
        record: takes the statistics of the run.
        **model_kwargs: what transformers hands to its loops; `attention_mask` tells the padding.

    Returns:
        Ids [B, L + new], padded on the right; an object with `sequences` where the generation config
        asks for one.

    Raises:
        InputError: what cannot act here, by its name: beams or several answers per prompt, scores,
            inputs besides ids (such as the pixels of vision models), a filled cache, processors and
            criteria that need more than ids and logits.
    """
    config = generation_config
    if is_encoder_decoder(model):
        raise InputError(
            f"{type(model).__name__} has an encoder: expected arvision.generate(model, prompts), which "
            "takes the encoder's ids"
        )
    asked = _arguments_of_generate()
    _check_config(config)
    _check_inputs(model_kwargs, input_ids)
    check_usable("logits processor", logits_processor)
    assistant, streamer = asked.get("assistant_model"), asked.get("streamer")
    if assistant is not None:
        drafter, drafter_options = "draft_model", {**(drafter_options or {}), "draft": assistant}
    if (streamer or text_streamer) is not None and len(input_ids) > 1:
        raise InputError(f"streamer with {len(input_ids)} prompts: expected one")
    shaping, processors = _split(list(logits_processor or ()), bool(config.do_sample))
    if config.do_sample and seed is None:
        seed = int(torch.randint(1 << 31, ()))
    criteria = Criteria(stopping_criteria or (), input_ids)
    ends = getattr(config, "_eos_token_tensor", None)
    prepared = Prepared(
        end_ids=[] if ends is None else ends.flatten().tolist(),
        prefixes=_prefixes(processors, input_ids),
        criterion=criteria,
    )
    out = generate(
        model,
        input_ids,
        attention_mask=model_kwargs.get("attention_mask"),
        drafter=drafter,
        rule=rule,
        max_new_tokens=int(config.max_length) - input_ids.shape[1],
        seed=seed or 0,
        num_draft=num_draft,
        drafter_options=drafter_options,
        rule_options=rule_options,
        streamer=text_streamer if streamer is None else _Greeted(streamer),
        prepared=prepared,
        **shaping,
    )
    if record is not None:
        record(out.stats)
    # Rows that end together may have run ahead of the last one to meet a criterion.
    found = [tokens[: criteria.end] for tokens in out.tokens]
    longest = max(map(len, found))
    pad = getattr(config, "_pad_token_tensor", None)
    fill = input_ids.new_full((len(input_ids), longest), 0 if pad is None else int(pad))
    for row, tokens in zip(fill, found, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    sequences = torch.cat([input_ids, fill], dim=1)
    if not getattr(config, "return_dict_in_generate", False):
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)  # pyright: ignore[reportArgumentType]


def _arguments_of_generate() -> Mapping[str, Any]:
    """The arguments of the `generate` that called us.

    transformers hands a custom loop neither `assistant_model` nor `streamer`, and a user who passed
    them would not learn that they were dropped. So they are read where they stand.
    """
    from transformers import GenerationMixin

    call: Any = GenerationMixin.generate  # pyright: ignore[reportAttributeAccessIssue]
    code = inspect.unwrap(call).__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code:
            return frame.f_locals
        frame = frame.f_back
    return {}


def _check_config(config: Any) -> None:
    for name, usual in (("num_beams", 1), ("num_return_sequences", 1)):
        found = getattr(config, name, None) or usual
        if found != usual:
            raise InputError(f"{name} {found}: expected {usual} with custom_generate")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise InputError(f"{name}: not kept by speculative decoding, expected False")
    for name in (
        "penalty_alpha",
        "dola_layers",
        "prompt_lookup_num_tokens",
        "assistant_early_exit",
    ):
        if getattr(config, name, None):
            raise InputError(f"{name}: another way of decoding, choose a drafter instead")


def _check_inputs(given: Mapping[str, Any], input_ids: Tensor) -> None:
    """Refuse inputs that a pass of ours would not read."""
    names = sorted(
        name
        for name, value in given.items()
        if name not in READ
        and name != "mm_encoder_outputs"
        and value is not None
        and value is not False
    )
    names += [f"mm_encoder_outputs[{name!r}]" for name in given.get("mm_encoder_outputs") or ()]
    if names:
        raise InputError(
            f"{', '.join(names)}: custom_generate reads text alone, expected input_ids and "
            "attention_mask"
        )
    cache = given.get("cache", given.get("past_key_values"))
    if cache is not None and cache.get_seq_length() > 0:
        raise InputError("a cache that holds tokens: expected an empty one with custom_generate")
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if positions is not None:
        kept = torch.ones_like(input_ids) if mask is None else mask
        usual = (kept.cumsum(1) - 1).to(positions)
        if positions.shape != usual.shape or bool(((positions != usual) & kept.bool()).any()):
            raise InputError("position_ids: expected 0, 1, 2, ... behind the padding")


def _split(processors: list[Any], draws: bool) -> tuple[dict[str, Any], list[Any]]:
    """Temperature, top-k and top-p for our own shaping, and the processors that act by themselves.

    Shaping stands behind all processors and draws in one order, so it takes over only where the list
    is made of transformers' own warpers, in that order.
    """
    if not draws:
        return {"temperature": 0.0}, processors
    from transformers.generation import logits_process

    kinds = [getattr(logits_process, name) for name in WARPERS]
    own = [kinds.index(type(one)) if type(one) in kinds else -1 for one in processors]
    plain = [
        getattr(one, "filter_value", None) in (None, -float("inf"))
        and getattr(one, "min_tokens_to_keep", 1) == 1
        for one in processors
    ]
    if -1 in own or sorted(set(own)) != own or not all(plain):
        return {"temperature": 1.0}, processors
    found: dict[str, Any] = {"temperature": 1.0}
    for kind, one in zip(own, processors, strict=True):
        name = ("temperature", "top_k", "top_p")[kind]
        found[name] = getattr(one, name)
    return found, []


def _prefixes(processors: list[Any], input_ids: Tensor) -> Prefixes | None:
    if not processors:
        return None
    from transformers import LogitsProcessorList

    rows = len(input_ids)
    return Prefixes([LogitsProcessorList(processors)] * rows, input_ids.tolist(), rows)


class _Greeted:
    """A streamer that was told the prompt by transformers already."""

    def __init__(self, streamer: Any) -> None:
        self._streamer, self._is_prompt = streamer, True

    def put(self, value: Tensor) -> None:
        """Hand new tokens on."""
        if not self._is_prompt:
            self._streamer.put(value)
        self._is_prompt = False

    def end(self) -> None:
        """Hand the end on."""
        self._streamer.end()
