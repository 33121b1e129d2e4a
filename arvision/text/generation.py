"""The front door for text: `arvision.generate`, the same loop that draws images, for language models."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..contracts import Stats
from ..decoding.logits import Shaping
from ..decoding.loop import Drafter, FixedWindow, NoDrafter, WindowPolicy, decode_tokens
from ..decoding.noise import parse_seeds
from ..decoding.run import Run
from ..decoding.window import CostTable, GoodputWindow
from ..errors import InputError, check_count
from . import HFCausalLM, load_text_model
from .chat import chat_ids
from .costs import Resting, label_of, round_costs
from .drafters import DRAFTERS, TextDrafter, combine
from .model import as_text_model
from .processors import Prefixes, own_prefixes
from .rules import choose_rule
from .stop import TextEnd

MOST_DRAFTS = 64
"""Candidates that `num_draft="auto"` drafts at most."""

OnText = Callable[[int, str], Any]
"""Told the row and the text that was added to it."""


@dataclass
class TextOutput:
    """What `generate` returns.

    Attributes:
        tokens: new ids of each prompt, an end token included.
        texts: the new text of each prompt, up to a stop string; None without a tokenizer.
        stats: `forward_passes` (after the prefill), `tokens` (all rows together), `tokens_per_pass`
            (those after the prefill's, over the passes that a row took part in), `seconds` (all),
            `seconds_per_token`, `candidates` (tokens fed), `rule`, `lossless`, `passes_per_row`.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    stats: Stats


def generate(
    model: Any,
    prompts: Any,
    *,
    tokenizer: Any = None,
    drafter: str | Drafter | None = None,
    rule: str = "lossless",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: Any = 0,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] = (),
    attention_mask: Any = None,
    chat: bool = False,
    num_draft: int | str | None = None,
    drafter_options: dict[str, Any] | None = None,
    rule_options: dict[str, Any] | None = None,
    logits_hook: Callable[[Tensor], Tensor] | None = None,
    stream: OnText | None = None,
    streamer: Any = None,
    prepared: Prepared | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> TextOutput:
    """Continue prompts with a causal language model, several tokens per pass.

    At temperature 0 the tokens are those of `model.generate(do_sample=False)`: the model's own
    generation config acts as it does there (end tokens, stop strings, repetition penalty, forbidden
    and forced tokens, least lengths), on every candidate with the candidate's own prefix.

    Args:
        model: a causal language model of transformers, an `HFCausalLM`, or the name of one: a
            folder, a GGUF file, a hub id.
        prompts: a string, a list of strings, a list of messages (dicts with "role" and "content"),
            a list of such lists, or ids: [B, L] or [L], lists of them, arrays, or what a tokenizer
            of transformers returns.
        tokenizer: for strings; a model given by name brings its own.
        drafter: what proposes tokens: None for plain decoding, a name of `list_drafters()`, two
            names joined by "+", or a drafter.
        rule: "lossless" (the model's own law whatever is drafted; greedy decoding at temperature
            0), or a name in `arvision.text.rules.RULES`.
        max_new_tokens: per prompt.
        temperature: divides the logits; 0 is greedy.
        top_k: tokens kept, 0 for all.
        top_p: mass kept, 1 for all.
        seed: of the draws; row k has noise of its own, (seed, k). Or one seed or pair per row.
        stop: strings that end a text.
        stop_token_ids: tokens that end a text, besides the model's own.
        attention_mask: [B, L], 0 where ids [B, L] are padding.
        chat: take strings for a user's message and wrap them in the model's chat template.
        num_draft: candidates per pass; None for what the drafter recommends, "auto" for what
            promises the most tokens per second, drafting included, and for plain decoding where
            drafts do not pay: rounds of the run's own size are measured once per model and drafter.
        drafter_options: of a drafter given by name.
        rule_options: of the rule.
        logits_hook: changes logits [..., V] before they become laws: a mask, a bias.
        stream: told row and text as they come.
        streamer: a streamer of transformers (one prompt only); it is told the end in any case.
        prepared: for `custom_generate`: takes the place of the model's generation config.
        device: for a model given by name.
        dtype: for a model given by name.

    Raises:
        InputError: bad options or prompts, before any model call.
    """
    started = time.perf_counter()
    shaping = Shaping(temperature=temperature, top_k=top_k, top_p=top_p)
    check_count("max_new_tokens", max_new_tokens)
    options = dict(drafter_options or {})
    if "draft" in options:
        options["draft"] = as_draft(options["draft"], max_new_tokens, device, dtype)
    proposer = make_drafter(drafter, **options)
    if hasattr(proposer, "shaping"):
        proposer.shaping = shaping  # pyright: ignore[reportAttributeAccessIssue]
    draws = getattr(proposer, "draws", "chosen")
    branches = getattr(proposer, "branches", False)
    chosen = choose_rule(rule, draws, temperature, branches=branches, **(rule_options or {}))
    fitting = getattr(proposer, "rules", None)
    if fitting is not None and chosen.name not in fitting:
        raise InputError(
            f"rule {chosen.name!r} with {type(proposer).__name__}: expected one of "
            f"{', '.join(fitting)}"
        )
    if isinstance(model, str | Path):
        model, own = _load(str(model), str(device or "cpu"), dtype)
        tokenizer = tokenizer or own
    lm = as_text_model(model, max_new_tokens)
    ids = encode(prompts, tokenizer, chat, attention_mask)
    check_room(lm, ids, max_new_tokens)
    check_drafter(proposer, lm)
    if streamer is not None and len(ids) != 1:
        raise InputError(f"streamer with {len(ids)} prompts: expected one; `stream` takes several")
    seeds = row_seeds(seed, len(ids))
    check_num_draft(num_draft)
    strings = [stop] if isinstance(stop, str) else list(stop or ())
    if prepared is None:
        prepared = Prepared.of(lm.network, ids, max_new_tokens)
        strings += prepared.strings
    decode = None if tokenizer is None else _decoder(tokenizer)
    ends = [*prepared.end_ids, *check_token_ids(stop_token_ids, lm.vocab_size)]
    end = TextEnd(len(ids), ends, strings, decode, prepared.criterion)
    flow = _Flow(decode, stream, streamer, strings, ids)

    def shape(logits: Tensor) -> Tensor:
        if logits_hook is not None:
            logits = logits_hook(logits)
        return logits if chosen.wants_logits else shaping(logits)

    def fixed(window: int) -> Any:
        """A run with that many candidates in every pass, to measure."""
        return lambda model, conditions, *, seeds, guidance_scale, on_step: decode_tokens(
            model,
            conditions,
            Run(len(conditions), max_new_tokens, seeds, on_step),
            drafter=proposer,
            rule=chosen.rule,
            shape=shape,
            policy=FixedWindow(window),
        )

    policy: WindowPolicy
    if isinstance(proposer, NoDrafter):
        policy = FixedWindow(1)
    elif num_draft == "auto":
        label = f"{label_of(proposer)} {chosen.name}"
        proposer = Resting(proposer)
        policy = GoodputWindow(CostTable(round_costs(lm, label, fixed, ids, MOST_DRAFTS)))
    else:
        policy = WholeTree((num_draft or getattr(proposer, "num_draft", 10)) + 1)
    lm.prefixes = prepared.prefixes
    try:
        samples = decode_tokens(
            lm,
            ids,
            Run(len(ids), max_new_tokens, seeds, flow.on_step if flow.is_wanted else None),
            drafter=proposer,
            rule=chosen.rule,
            shape=shape,
            policy=policy,
            stop=end if end.is_needed else None,
        )
        lengths = samples.stats["lengths"]
        tokens = [row[:num] for row, num in zip(samples.tokens.tolist(), lengths, strict=True)]
        flow.tell_rest(tokens)
    finally:
        # Whoever reads along in another thread waits for the end, also for that of a failed run.
        flow.end()
    texts = None if decode is None else [until(decode(row), strings) for row in tokens]
    seconds = time.perf_counter() - started
    total = sum(lengths)
    passes = samples.stats["passes_per_image"]
    stats = Stats(
        forward_passes=samples.stats["forward_passes"],
        tokens=total,
        tokens_per_pass=(total - len(ids)) / max(1, sum(passes)),
        passes_per_row=passes,
        candidates=samples.stats["candidates"],
        windows=samples.stats["windows"],
        seconds=seconds,
        seconds_per_token=seconds / max(1, total),
        rule=chosen.name,
        lossless=chosen.lossless,
    )
    return TextOutput(tokens, texts, stats)


@dataclass
class Prepared:
    """What acts on a run besides its arguments.

    Attributes:
        end_ids: tokens that end a text.
        strings: texts that end it.
        prefixes: logits processors; None for none.
        criterion: see `TextEnd`.
    """

    end_ids: list[int]
    strings: list[str] = field(default_factory=list)
    prefixes: Prefixes | None = None
    criterion: Callable[[int, list[int]], bool] | None = None

    @classmethod
    def of(cls, network: Any, ids: Sequence[Tensor], max_new_tokens: int) -> Prepared:
        """What a model's own generation config asks for."""
        strings = getattr(getattr(network, "generation_config", None), "stop_strings", None) or []
        return cls(
            end_ids=end_ids(network),
            strings=[strings] if isinstance(strings, str) else list(strings),
            prefixes=own_prefixes(network, ids, max_new_tokens),
        )


def row_seeds(seed: Any, num: int) -> list[Any]:
    """A seed or pair (seed, image) for each of `num` rows.

    Raises:
        InputError: another number of seeds than of rows; or entries that are no seeds.
    """
    if isinstance(seed, Sequence | Tensor | np.ndarray) and np.ndim(seed) > 0:
        seeds = [tuple(one) if np.ndim(one) else one for one in np.asarray(seed).tolist()]
        if len(seeds) != num:
            raise InputError(f"{len(seeds)} seeds for {num} prompts: expected one each")
        return list(parse_seeds(seeds))
    value = seed.item() if isinstance(seed, np.generic | np.ndarray | Tensor) else seed
    parse_seeds([value])
    return [(value, row) for row in range(num)]


def check_token_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Tokens that end a text, as integers.

    Raises:
        InputError: an entry that is no token of the model.
    """
    found = torch.as_tensor(ids).flatten().tolist()
    for token in found:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InputError(f"stop_token_ids {token!r}: expected integers in 0..{vocab_size - 1}")
    return found


def as_draft(
    draft: Any, num_tokens: int, device: Any = None, dtype: torch.dtype | None = None
) -> Any:
    """A draft model as a token model: what was given, or a model of transformers, or its name."""
    if isinstance(draft, str | Path):
        draft = _load(str(draft), str(device or "cpu"), dtype)[0]
    if isinstance(draft, HFCausalLM) or hasattr(draft, "get_output_embeddings"):
        return as_text_model(draft, num_tokens)
    return draft


def drafter_of(folder: str | Path) -> tuple[str, str]:
    """Which drafter a folder of `arvision train-draft` is for, and the option that takes it."""
    for file, found in (
        ("heads.json", ("heads", "heads")),
        ("pseudo.json", ("pseudo", "module")),
    ):
        if (Path(folder) / file).exists():
            return found
    return "draft_model", "draft"


def list_drafters() -> dict[str, str]:
    """Names of drafters that `generate` makes by itself, and a line on each."""
    return {entry.name: entry.facts["summary"] for entry in DRAFTERS}


def make_drafter(drafter: str | Drafter | None, **options: Any) -> Drafter:
    """A drafter from its name (or two joined by "+"), or the drafter that was given.

    Raises:
        InputError: an unknown name or option.
    """
    if drafter is None:
        return NoDrafter()
    if not isinstance(drafter, str):
        if options:
            raise InputError("drafter_options with a drafter that is made: expected a name")
        return drafter
    if "+" in drafter:
        first, second = drafter.split("+", 1)
        parts = make_drafter(first.strip()), make_drafter(second.strip())
        assert all(isinstance(part, TextDrafter) for part in parts)
        return combine(*parts, **options)  # pyright: ignore[reportArgumentType]
    try:
        return DRAFTERS[drafter](**options)
    except TypeError as error:
        raise InputError(f"drafter {drafter!r}: {error}") from error


def check_drafter(drafter: Any, model: HFCausalLM) -> None:
    """Refuse a drafter of another vocabulary.

    Raises:
        InputError: see above.
    """
    theirs = getattr(drafter, "draft_vocab_size", None)
    if theirs is not None and theirs != model.vocab_size:
        raise InputError(
            f"the drafter has a vocabulary of {theirs} tokens: expected {model.vocab_size}, as the "
            "model has"
        )


def check_room(model: HFCausalLM, ids: Sequence[Tensor], max_new_tokens: int) -> None:
    """Refuse prompts that leave no room for `max_new_tokens`.

    Raises:
        InputError: see above.
    """
    longest = max(map(len, ids), default=0)
    most = model.sizes.num_positions
    if longest + max_new_tokens > most:
        raise InputError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens}: the model has "
            f"{most} positions"
        )


def encode(
    prompts: Any, tokenizer: Any, chat: bool = False, attention_mask: Any = None
) -> list[Tensor]:
    """Prompts as id tensors [L]; see `generate`.

    Raises:
        InputError: no prompt, strings without a tokenizer, a mask that does not fit, or something
            else than text or ids.
    """
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        found = prompts.get("attention_mask")
        attention_mask = found if attention_mask is None else attention_mask
        prompts = prompts["input_ids"]
    if isinstance(prompts, np.ndarray | Tensor):
        prompts = prompts.tolist()
    if isinstance(prompts, list | tuple) and prompts and not _is_text(prompts[0]):
        rows = [prompts] if isinstance(prompts[0], int | np.integer) else prompts
        try:
            ids = [torch.as_tensor(np.asarray(row)) for row in rows]
        except (TypeError, ValueError) as error:
            raise InputError("prompts: expected ids [B, L] or a list of id lists") from error
        if any(row.dim() != 1 or (len(row) and row.is_floating_point()) for row in ids):
            raise InputError("prompts: expected ids [B, L] or a list of id lists")
        return _without_padding([row.to(torch.int64) for row in ids], attention_mask)
    if attention_mask is not None:
        raise InputError("attention_mask with prompts that are text: expected ids [B, L]")
    single = isinstance(prompts, str) or (
        isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], dict)
    )
    rows = [prompts] if single else list(prompts)
    if not rows:
        raise InputError("no prompt: expected at least one")
    if tokenizer is None:
        raise InputError("prompts are text: pass tokenizer=..., or ids [B, L]")
    return [torch.tensor(_encode_one(row, tokenizer, chat), dtype=torch.int64) for row in rows]


def _is_text(entry: Any) -> bool:
    """Whether an entry of a list of prompts is a string, a message, or a list of messages."""
    return isinstance(entry, str | dict) or (
        isinstance(entry, list | tuple) and len(entry) > 0 and isinstance(entry[0], dict)
    )


def _without_padding(ids: list[Tensor], attention_mask: Any) -> list[Tensor]:
    """Prompts [L] without the places where the mask is 0."""
    if attention_mask is None:
        return ids
    mask = torch.as_tensor(np.asarray(attention_mask))
    mask = mask[None] if mask.dim() == 1 else mask
    if mask.dim() != 2 or [mask.shape[1]] * len(mask) != [len(row) for row in ids]:
        raise InputError(
            f"attention_mask {tuple(mask.shape)}: expected [{len(ids)}, {len(ids[0])}], as the ids"
        )
    return [row[own.bool()] for row, own in zip(ids, mask, strict=True)]


def _encode_one(prompt: Any, tokenizer: Any, chat: bool) -> list[int]:
    if isinstance(prompt, str) and not chat:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not all(isinstance(part, dict) for part in messages):
        raise InputError(f"prompt {prompt!r}: expected a string, messages, or ids")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("chat: the tokenizer has no chat template")
    return chat_ids(messages, tokenizer)


def end_ids(network: Any) -> list[int]:
    """Tokens that end a text, as the model's generation config says."""
    config = getattr(network, "generation_config", None) or network.config
    ids = getattr(config, "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def until(text: str, strings: Sequence[str]) -> str:
    """`text` up to the first of some stop strings."""
    places = [text.find(string) for string in strings]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


@lru_cache(maxsize=2)
def _load(name: str, device: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    return load_text_model(name, device=device, dtype=dtype)


def check_num_draft(num_draft: Any) -> None:
    """Refuse what is no number of candidates.

    Raises:
        InputError: see above.
    """
    if num_draft is None or num_draft == "auto":
        return
    if isinstance(num_draft, str | bool) or not 1 <= num_draft <= 120:
        raise InputError(f'num_draft {num_draft!r}: expected an integer in 1..120 or "auto"')


class WholeTree(FixedWindow):
    """As many candidates to the very end of a text.

    A tree cut to what is left of the longest row would be another tree than the one that a shorter
    row gets alone, and with it the row's draws. The state has room for candidates past the end.
    """

    def next(self, num_rows: int, most: int) -> int:
        """The window."""
        return self.window


class _Flow:
    """Hands new text to those who asked for it."""

    def __init__(
        self,
        decode: Callable[[list[int]], str] | None,
        stream: OnText | None,
        streamer: Any,
        strings: Sequence[str],
        ids: Sequence[Tensor],
    ) -> None:
        if stream is not None and decode is None:
            raise InputError("stream needs a tokenizer: pass tokenizer=...")
        self._decode, self._stream, self._streamer = decode, stream, streamer
        self._strings = strings
        self._told = [0] * len(ids)
        self._texts = [""] * len(ids)
        if streamer is not None:
            streamer.put(ids[0][None])

    @property
    def is_wanted(self) -> bool:
        """Whether anybody asked."""
        return self._stream is not None or self._streamer is not None

    def on_step(self, number: int, progress: dict[str, Any]) -> None:
        """After a pass."""
        lengths = progress["lengths"].tolist()
        if lengths != self._told:
            self._tell(
                [row[:num] for row, num in zip(progress["tokens"].tolist(), lengths, strict=True)],
                is_last=False,
            )

    def tell_rest(self, tokens: list[list[int]]) -> None:
        """All tokens are there."""
        if self.is_wanted:
            self._tell(tokens, is_last=True)

    def end(self) -> None:
        """The run is over."""
        if self._streamer is not None:
            self._streamer.end()

    def _tell(self, tokens: list[list[int]], is_last: bool) -> None:
        for row, ids in enumerate(tokens):
            if self._streamer is not None and len(ids) > self._told[row]:
                self._streamer.put(torch.tensor(ids[self._told[row] :]))
            self._told[row] = len(ids)
            if self._stream is None or self._decode is None:
                continue
            text = until(self._decode(ids), self._strings)
            # The bytes of a character, or the start of a stop string, may still be under way.
            if not is_last:
                held = max([0, *(len(string) - 1 for string in self._strings)])
                text = text[: len(text) - held] if held else text
                if text.endswith("\N{REPLACEMENT CHARACTER}"):
                    continue
            if len(text) > len(self._texts[row]):
                self._stream(row, text[len(self._texts[row]) :])
                self._texts[row] = text
