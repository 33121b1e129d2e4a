"""`model.generate(..., custom_generate=arvision.custom_generate)`: our loop behind transformers' call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..contracts import Stats
from ..errors import InputError
from .generation import generate

WARPERS = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"}
"""What transformers makes of a generation config's temperature, top_k and top_p, which we apply."""

CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria", "StopStringCriteria"}
"""Criteria whose meaning we take from the generation config."""

TEXT_INPUTS = {"attention_mask", "position_ids", "cache_position"}
"""Tensors that transformers hands to its loops for any text."""


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
    text_tokenizer: Any = None,
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
        logits_processor: temperature, top-k and top-p; others are refused.
        stopping_criteria: length, end tokens and stop strings; others are refused.
        generation_config: as transformers prepared it.
        drafter: see `arvision.generate`; None drafts nothing.
        rule: see `arvision.generate`.
        num_draft: see `arvision.generate`.
        drafter_options: see `arvision.generate`.
        rule_options: see `arvision.generate`.
        seed: of the draws; None takes one from torch's generator, so that `torch.manual_seed` counts.
        text_tokenizer: for stop strings.
        text_streamer: a streamer of transformers, for one prompt; generate keeps its own `streamer`
            from every custom loop.
        record: takes the statistics of the run.
        **model_kwargs: what transformers hands to its loops; `attention_mask` tells the padding.

    Returns:
        Ids [B, L + new], padded on the right; an object with `sequences` where the generation config
        asks for one.

    Raises:
        InputError: beams or several answers per prompt, scores, a logits processor or a criterion
            that has no counterpart here; inputs besides the text, such as images.
    """
    config = generation_config
    _refuse("logits processor", logits_processor, WARPERS)
    _refuse("stopping criterion", stopping_criteria, CRITERIA)
    for name, usual in (("num_beams", 1), ("num_return_sequences", 1)):
        found = getattr(config, name, None) or usual
        if found != usual:
            raise InputError(f"{name} {found}: expected {usual} with custom_generate")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise InputError(f"{name}: not kept by speculative decoding, expected False")
    _refuse_inputs(model_kwargs)
    mask = model_kwargs.get("attention_mask")
    kept = torch.ones_like(input_ids) if mask is None else mask
    rows = [row[own.bool()].cpu() for row, own in zip(input_ids, kept, strict=True)]
    law: dict[str, Any] = {"temperature": 0.0}
    if config.do_sample:
        shares = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        law = {k: neutral[k] if v is None else v for k, v in shares.items()}
        seed = int(torch.randint(1 << 31, ())) if seed is None else seed
    out = generate(
        model,
        rows,
        tokenizer=text_tokenizer,
        drafter=drafter,
        rule=rule,
        max_new_tokens=int(config.max_length) - input_ids.shape[1],
        seed=seed or 0,
        stop=_stop_strings(config, text_tokenizer),
        num_draft=num_draft,
        drafter_options=drafter_options,
        rule_options=rule_options,
        streamer=text_streamer,
        **law,
    )
    if record is not None:
        record(out.stats)
    longest = max(map(len, out.tokens))
    pad = getattr(config, "pad_token_id", None)
    fill = input_ids.new_full((len(rows), longest), 0 if pad is None else int(pad))
    for row, tokens in zip(fill, out.tokens, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    sequences = torch.cat([input_ids, fill], dim=1)
    if not getattr(config, "return_dict_in_generate", False):
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)  # pyright: ignore[reportArgumentType]


def _refuse(noun: str, given: Iterable[Any] | None, known: set[str]) -> None:
    for entry in given or ():
        name = type(entry).__name__
        if name not in known:
            raise InputError(f"{noun} {name}: expected one of {', '.join(sorted(known))}")


def _refuse_inputs(given: dict[str, Any]) -> None:
    """Refuse inputs besides the text, which would be dropped in silence."""
    names = [name for name, value in given.items() if isinstance(value, Tensor) and value.dim() > 0]
    names = sorted(set(names) - TEXT_INPUTS)
    names += [f"mm_encoder_outputs[{name!r}]" for name in given.get("mm_encoder_outputs") or ()]
    if names:
        raise InputError(
            f"{', '.join(names)}: custom_generate reads text alone, expected input_ids and "
            "attention_mask"
        )


def _stop_strings(config: Any, tokenizer: Any) -> Any:
    strings = getattr(config, "stop_strings", None)
    if strings and tokenizer is None:
        raise InputError("stop_strings: pass text_tokenizer=..., the tokenizer to read them with")
    return strings
