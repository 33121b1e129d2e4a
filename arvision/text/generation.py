"""The front door for text: `arvision.generate`, the same loop that draws images, for language models."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..contracts import Stats
from ..decoding.drafter import NoDrafter
from ..decoding.fixed_step import Steps
from ..decoding.logits import Shaping, laws_of, warn_of_greedy
from ..decoding.loop import Drafter, FixedWindow, WindowPolicy, decode_tokens
from ..decoding.run import Run
from ..decoding.window import CostTable, GoodputWindow, RowGoodput
from ..errors import InputError, as_integer, check_count, shown
from ..files import user_path
from ..memory import Peak, check_memory
from . import HFCausalLM, load_text_model
from .costs import Resting, label_of, round_costs
from .drafters import DRAFTERS, DraftTree, TextDrafter, combine
from .drafters.cross import Translation, same_tokens
from .drafters.eagle3 import is_eagle3
from .drafters.mtp import MTP_FILE
from .drafters.papers.nested import is_nested
from .drafters.papers.parallel import PARALLEL_FILE
from .processors import Prefixes, own_prefixes
from .prompts import check_token_ids, encode, row_seeds
from .rules import choose_rule
from .seq2seq import Seq2SeqLM, as_generator
from .stop import TextEnd, stop_strings
from .stream import Flow, OnText, until

LEAST_COMMON = 0.75
"""Share of the larger vocabulary that the smaller one has to have to be taken for the same, padded."""

MOST_NUMBER, MOST_SIZE = 120, 10_000
"""Of candidates in a pass, and of any other size that a drafter is given."""

MOST_DRAFTS = 64
"""Candidates that `num_draft="auto"` drafts at most."""


@dataclass
class TextOutput:
    """What `generate` returns.

    Attributes:
        tokens: new ids of each prompt, an end token included.
        texts: the new text of each prompt, up to a stop string; None without a tokenizer.
        stats: `forward_passes` (after the prefill), `tokens` (all rows together), `tokens_per_pass`
            (those after the prefill's, over the passes that a row took part in), `seconds` (all),
            `seconds_per_token`, `candidates` (tokens fed), `rule`, `lossless`, `passes_per_row`, `peak_memory` (bytes on an
            accelerator, weights included; None on a CPU).
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
    compile: str | None = None,
) -> TextOutput:
    """Continue prompts with a language model, or answer them with an encoder-decoder model (T5, BART),
    several tokens per pass.

    At temperature 0 the tokens are those of `model.generate(do_sample=False)`: the model's own
    generation config acts as it does there (end tokens, stop strings, repetition penalty, forbidden
    and forced tokens, least lengths), on every candidate with the candidate's own prefix.

    Args:
        model: a causal or encoder-decoder language model of transformers, an `HFCausalLM`, or the
            name of one: a folder, a GGUF file, a hub id.
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
        stop: strings that end a text; one that is a special token ends it as that token.
        stop_token_ids: tokens that end a text, besides the model's own.
        attention_mask: [B, L], 0 where ids [B, L] are padding.
        chat: take strings for a user's message and wrap them in the model's chat template.
        num_draft: candidates per pass; None for what the drafter recommends, "auto" for what
            promises the most tokens per second, drafting included, and for plain decoding where
            drafts do not pay: rounds of the run's own size are measured once per model and drafter.
            Each row of a batch gets as many as its own acceptances so far pay for.
        drafter_options: of a drafter given by name.
        rule_options: of the rule.
        logits_hook: changes logits [..., V] before they become laws: a mask, a bias.
        stream: told row and text as they come.
        streamer: a streamer of transformers (one prompt only); it is told the end in any case.
        prepared: for `custom_generate`: takes the place of the model's generation config.
        device: for a model given by name.
        dtype: for a model given by name.
        compile: a mode of `pipe.compile`: passes of fixed shapes, compiled or captured and kept with
            the model. For plain decoding and drafters that work on the device; with drafts made on
            the host the ordinary loop runs, with a warning. `stats.step` tells what ran.

    Raises:
        InputError: bad options or prompts, before any model call.
    """
    started = time.perf_counter()
    shaping = Shaping(temperature=temperature, top_k=top_k, top_p=top_p)
    warn_of_greedy({"temperature": temperature, "top_k": top_k, "top_p": top_p})
    check_count("max_new_tokens", max_new_tokens)
    check_num_draft(num_draft, drafter)
    options = dict(drafter_options or {})
    if "draft" in options:
        given = options["draft"]
        options["draft"] = as_draft(given, max_new_tokens, device, dtype)
        if isinstance(given, str | Path) and drafter == "draft_model":
            options.setdefault("tokenizer", _load(str(given), str(device or "cpu"), dtype)[1])
    proposer = make_drafter(drafter, **options)
    if hasattr(proposer, "shaping"):
        proposer.shaping = shaping  # pyright: ignore[reportAttributeAccessIssue]
    draws = getattr(proposer, "draws", "chosen")
    branches = getattr(proposer, "branches", False)
    chosen = choose_rule(rule, draws, temperature, branches=branches, **(rule_options or {}))
    if hasattr(proposer, "rule"):
        proposer.rule = chosen.name  # pyright: ignore[reportAttributeAccessIssue]
    fitting = getattr(proposer, "rules", None)
    if fitting is None and chosen.name == "unverified":
        raise InputError(
            f"rule 'unverified' with {type(proposer).__name__}: its drafts hold no confidence to go by; "
            "expected lexical units of `arvision train-draft --kind lud`"
        )
    if fitting is not None and chosen.name not in fitting:
        raise InputError(
            f"rule {chosen.name!r} with {type(proposer).__name__}: expected one of "
            f"{', '.join(fitting)}"
        )
    model, own = open_model(model, device, dtype)
    tokenizer = tokenizer or own
    lm = as_generator(model, max_new_tokens)
    steps = None if compile is None else steps_of(lm.network, compile)
    ids = encode(prompts, tokenizer, chat, attention_mask)
    check_room(lm, ids, max_new_tokens)
    check_drafter(proposer, lm, tokenizer)
    lm.watched = proposer.watches(lm) if isinstance(proposer, TextDrafter) else ()
    if streamer is not None and len(ids) != 1:
        raise InputError(f"streamer with {len(ids)} prompts: expected one; `stream` takes several")
    seeds = row_seeds(seed, len(ids))
    strings, special = stop_strings(stop, tokenizer)
    if prepared is None:
        starts = lm.starts(len(ids)) if isinstance(lm, Seq2SeqLM) else None
        prepared = Prepared.of(lm.network, ids, max_new_tokens, starts)
        strings += prepared.strings
    decode = None if tokenizer is None else _decoder(tokenizer)
    ends = [*prepared.end_ids, *check_token_ids([*stop_token_ids, *special], lm.vocab_size)]
    end = TextEnd(len(ids), ends, strings, decode, prepared.criterion)
    flow = Flow(decode, stream, streamer, strings, ids)

    def shape(logits: Tensor) -> Tensor:
        if logits_hook is not None:
            logits = logits_hook(logits)
        return logits if chosen.wants_logits else laws_of(shaping, logits)

    def watched(run: Run) -> Callable[[Tensor], Tensor]:
        """`shape`, and a look at logits that become no laws: laws are looked at by the loop."""

        def see(logits: Tensor) -> Tensor:
            if chosen.wants_logits:
                run.watch_laws(logits.sum(-1, keepdim=True))
            return shape(logits)

        return see

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
        goodput = RowGoodput if getattr(proposer, "takes_rows", True) else GoodputWindow
        proposer = Resting(proposer)
        policy = goodput(CostTable(round_costs(lm, label, fixed, ids, MOST_DRAFTS)))
    else:
        policy = WholeTree(int(num_draft or getattr(proposer, "num_draft", 10)) + 1)
    lm.prefixes = prepared.prefixes
    try:
        on_step = flow.on_step if flow.is_wanted else None
        run = Run(len(ids), max_new_tokens, seeds, on_step, steps=steps)
        with Peak(lm.device) as peak:
            samples = decode_tokens(
                lm,
                ids,
                run,
                drafter=proposer,
                rule=chosen.rule,
                shape=watched(run),
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
        peak_memory=peak.bytes,
        step=samples.stats["step"],
        warm_up=samples.stats.get("warm_up", 0.0),
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
    def of(
        cls,
        network: Any,
        ids: Sequence[Tensor],
        max_new_tokens: int,
        starts: Sequence[Tensor] | None = None,
    ) -> Prepared:
        """What a model's own generation config asks for."""
        strings = getattr(getattr(network, "generation_config", None), "stop_strings", None) or []
        return cls(
            end_ids=end_ids(network),
            strings=[strings] if isinstance(strings, str) else list(strings),
            prefixes=own_prefixes(network, ids, max_new_tokens, starts),
        )


def as_draft(
    draft: Any, num_tokens: int, device: Any = None, dtype: torch.dtype | None = None
) -> Any:
    """A draft model as a token model: what was given, or a model of transformers, or its name."""
    if isinstance(draft, str | Path):
        draft = _load(str(draft), str(device or "cpu"), dtype)[0]
    if isinstance(draft, HFCausalLM) or hasattr(draft, "get_output_embeddings"):
        return as_generator(draft, num_tokens)
    return draft


def drafter_of(folder: str | Path) -> tuple[str, str]:
    """Which drafter a folder of `arvision train-draft` is for, and the option that takes it."""
    for file, found in (
        ("heads.json", ("heads", "heads")),
        ("pseudo.json", ("pseudo", "module")),
        (MTP_FILE, ("mtp", "folder")),
        (PARALLEL_FILE, ("parallel", "folder")),
    ):
        if (user_path(folder) / file).exists():
            return found
    if is_nested(user_path(folder)):
        return "nested_exit", "draft"
    return ("eagle3", "head") if is_eagle3(user_path(folder)) else ("draft_model", "draft")


_STEPS: WeakKeyDictionary[Any, dict[str, Steps]] = WeakKeyDictionary()


def steps_of(network: Any, mode: str) -> Steps:
    """What runs a network's passes of fixed shapes in that mode: one for all calls.

    Raises:
        InputError: an unknown mode.
    """
    known = _STEPS.setdefault(network, {})
    return known.setdefault(mode, known.get(mode) or Steps(mode))


def list_drafters() -> dict[str, str]:
    """Names of drafters that `generate` makes by itself, and a line on each."""
    return {entry.name: entry.facts["summary"] for entry in DRAFTERS}


def make_drafter(drafter: str | Drafter | None, **options: Any) -> Drafter:
    """A drafter from its name (or two joined by "+"), or the drafter that was given.

    Raises:
        InputError: an unknown name or option, or options of none.
    """
    if drafter is None:
        if options:
            raise InputError(f"{min(options)} without a drafter: it would have no effect")
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
    check_sizes(options)
    try:
        return DRAFTERS[drafter](**options)
    except TypeError as error:
        raise InputError(f"drafter {drafter!r}: {error}") from error


def check_sizes(options: dict[str, Any]) -> None:
    """Refuse sizes of a drafter that no draft needs and that trees of candidates could not have.

    Raises:
        InputError: an integer above `MOST_SIZE`; numbers of candidates or paths above `MOST_NUMBER`.
    """
    for name, value in options.items():
        number = as_integer(value)
        most = MOST_NUMBER if name.startswith("num_") else MOST_SIZE
        if number is not None and number > most and name != "seed":
            raise InputError(f"{name} {shown(value)}: expected at most {most:,}")


def check_drafter(drafter: Any, model: HFCausalLM | Seq2SeqLM, tokenizer: Any = None) -> None:
    """Refuse a drafter of another vocabulary; one that is padded to another size is the same.

    A draft model with a tokenizer of its own gets a translation, if it is not the target's.

    Raises:
        InputError: see above.
    """
    if isinstance(model, Seq2SeqLM) and getattr(drafter, "branches", False):
        raise InputError(
            f"{type(drafter).__name__} drafts trees, and {type(model.network).__name__} takes chains: "
            "expected input_copy, parallel, prompt_lookup with max_branches 1, or draft_model with "
            "expansion 'chain'"
        )
    if isinstance(drafter, DraftTree):
        own, drafter.translation = drafter.tokenizer, None
        drafter.text_tokenizer = tokenizer
        if own is not None and tokenizer is not None and not same_tokens(tokenizer, own):
            drafter.translation = Translation.between(tokenizer, own)
            return
    theirs = getattr(drafter, "draft_vocab_size", None)
    if theirs is None:
        return
    sizes = sorted((theirs, model.vocab_size))
    if sizes[0] < LEAST_COMMON * sizes[1]:
        raise InputError(
            f"the drafter has a vocabulary of {theirs} tokens: expected {model.vocab_size}, as the "
            "model has, or a draft model and both tokenizers"
        )


def check_room(model: HFCausalLM | Seq2SeqLM, ids: Sequence[Tensor], max_new_tokens: int) -> None:
    """Refuse prompts that leave no room for `max_new_tokens`, in the model or in the memory.

    Raises:
        InputError: see above.
    """
    longest = max(map(len, ids), default=0)
    if isinstance(model, Seq2SeqLM):
        source, room = model.sizes.num_source, model.sizes.num_positions
        if (source and longest > source) or (room and max_new_tokens >= room):
            raise InputError(
                f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens}: the model has "
                f"{source} positions for the one and {room} for the other and its start"
            )
        return
    most = model.sizes.num_positions
    if longest + max_new_tokens > most:
        raise InputError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens}: the model has "
            f"{most} positions"
        )
    sizes, weight = model.sizes, model.network.get_input_embeddings().weight
    width = sizes.num_kv_heads * (sizes.head_dim + sizes.value_dim)
    per_token = sizes.num_layers * width * weight.element_size()
    check_memory(
        f"{len(ids):,} prompts of up to {longest + max_new_tokens:,} tokens",
        len(ids) * (longest + max_new_tokens) * per_token,
        "max_new_tokens, or give fewer prompts at once",
        weight.device,
    )


def end_ids(network: Any) -> list[int]:
    """Tokens that end a text, as the model's generation config says."""
    config = getattr(network, "generation_config", None) or network.config
    ids = getattr(config, "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def open_model(model: Any, device: Any, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """A model and its tokenizer where it was given by name; else what was given, and None."""
    if isinstance(model, str | Path):
        return _load(str(model), str(device or "cpu"), dtype)
    return model, None


@lru_cache(maxsize=2)
def _load(name: str, device: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    return load_text_model(name, device=device, dtype=dtype)


def check_num_draft(num_draft: Any, drafter: Any) -> None:
    """Refuse what is no number of candidates, or one without a drafter.

    Raises:
        InputError: see above.
    """
    if num_draft is None:
        return
    if drafter is None:
        raise InputError(f"num_draft {num_draft!r} without a drafter: it would have no effect")
    if num_draft != "auto" and as_integer(num_draft) not in range(1, MOST_NUMBER + 1):
        raise InputError(
            f'num_draft {num_draft!r}: expected an integer in 1..{MOST_NUMBER} or "auto"'
        )


class WholeTree(FixedWindow):
    """As many candidates to the very end of a text.

    A tree cut to what is left of the longest row would be another tree than the one that a shorter
    row gets alone, and with it the row's draws. The state has room for candidates past the end.
    """

    def next(self, num_rows: int, most: int) -> int:
        """The window."""
        return self.window
