"""From the name of a target and a file of prompts to a finished draft of some kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch

from ...errors import InputError, unknown_name
from ...files import write_text
from ...prompt_files import is_plain, read_prompts
from ...schema import check_fields, read_json
from .. import load_text_model
from ..drafters.cross import same_tokens
from ..drafters.heads import KINDS
from ..seq2seq import is_encoder_decoder
from .acceptance import AcceptanceTraining, train_acceptance
from .data import Answers, answer, question_ids
from .eagle3 import Eagle3Training, train_eagle3
from .heads import HeadTraining, train_heads
from .judge import JUDGE_FIT, read_marked, train_judge
from .medusa2 import medusa2_training, train_medusa2
from .mtp import train_mtp
from .nested import NestedTraining, train_nested
from .parallel import ParallelTraining, train_parallel
from .pretrain import own_texts, text_blocks
from .pseudo import PSEUDO_FIT, PseudoTraining, train_pseudo
from .small_model import PRETRAIN_FIT, SMALL_FIT, SmallTraining, train_small_model
from .units import UNIT_FIT, UnitTraining, train_units

ALL_KINDS = (*KINDS, "medusa2", "eagle3", "mtp", "ppd", "hidden_transfer", "lud", "model", "nested")
ALL_KINDS += ("parallel", "acceptance", "judge")


UNUSED = {
    "ppd": ("divergence",),
    "hidden_transfer": ("divergence",),
    "lud": ("divergence",),
    "model": ("num_heads",),
    "nested": ("num_heads", "divergence"),
    "parallel": ("divergence",),
    "acceptance": ("num_heads", "divergence"),
    "judge": ("num_heads", "divergence", "answer_tokens"),
}
"""Settings of `fit_draft` that mean nothing to a kind of draft."""

OF_MODELS = ("pretrain", "pretrain_steps", "start", "on_policy", "temperature")
"""Further settings of the kind "model"."""

MOST_ANSWERS = 1 << 32
"""Bytes of the target's answers, which are a run's own."""


class Kept(TypedDict):
    """What `answers.json` holds."""

    wanted: dict[str, Any]
    texts: list[list[int]]
    starts: list[int]


def questions(path: Path) -> list[str]:
    """The prompts in a file.

    Raises:
        InputError: see `arvision.prompt_files.read_prompts`.
    """
    texts = [record["prompt"] for record in read_prompts(path)]
    if is_plain(path):  # lines may hold line breaks in escaped form
        texts = [text.replace("\\n", "\n") for text in texts]
    return texts


def answers_of(
    network: Any, prompts: list[list[int]], out: Path, num_tokens: int, progress: bool
) -> Answers:
    """The target's answers, remembered in `out`."""
    file = out / "answers.json"
    wanted = {"prompts": prompts, "num_tokens": num_tokens}
    if file.exists():
        kept: Any = check_fields(read_json(file, MOST_ANSWERS), Kept, str(file))
        if kept["wanted"] == wanted:
            return Answers(kept["texts"], kept["starts"])
    made = answer(network, prompts, num_tokens=num_tokens, progress=progress)
    content = {"wanted": wanted, "texts": made.texts, "starts": made.starts}
    write_text(file, json.dumps(content))
    return made


def small_training(
    kind: str, divergence: str, fit: dict[str, Any], given: dict[str, Any]
) -> tuple[SmallTraining, list[str]]:
    """Settings of a draft model, and the texts that it is pre-trained on.

    Args:
        kind: of draft.
        divergence: which other kinds check for themselves.
        fit: settings of the loop that differ from `SMALL_FIT`'s.
        given: `OF_MODELS`; None for a default.

    Raises:
        InputError: a bad setting, or one that means nothing to the kind.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if kind == "acceptance":
        given.pop("temperature", None)
    for name in given:
        if name not in OF_MODELS:
            raise unknown_name("setting of a draft", name, OF_MODELS)
        if kind != "model":
            raise InputError(f"{name} with kind {kind!r}: it would have no effect")
    if kind != "model":
        return SmallTraining(), []
    pretrain, steps = given.pop("pretrain", None), given.pop("pretrain_steps", None)
    if pretrain is not None:
        given.setdefault("start", "fresh")
    if steps is not None:
        given["pretrain_fit"] = replace(PRETRAIN_FIT, steps=steps)
    training = SmallTraining(divergence=divergence, fit=replace(SMALL_FIT, **fit), **given)
    return training, [] if pretrain is None else own_texts(pretrain)


def fit_draft(
    model: str,
    prompts: Path,
    out: Path,
    kind: str,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    num_heads: int | None = None,
    divergence: str | None = None,
    answer_tokens: int | None = None,
    num_ensemble: int | None = None,
    draft: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    progress: bool = True,
    **of_models: Any,
) -> dict[str, Any]:
    """Fit a draft of a kind on a frozen target; see `arvision train-draft`.

    What is None takes its default: 3 heads, "forward_kl", answers of 96 tokens, one member of each
    prompt token (`num_ensemble`, of the kind "ppd"). The kind "acceptance" wants a `draft` model,
    and takes the `temperature` of the runs that it is for. The kind "model" takes `OF_MODELS`
    besides: `pretrain`, a file or folder of texts to learn from first, with which it starts "fresh",
    for `pretrain_steps`; and what `SmallTraining` has of these names.

    Returns:
        Figures of the fit.

    Raises:
        InputError: an unknown kind, bad settings, or some that mean nothing to the kind, before the
            model is loaded.
    """
    if kind not in ALL_KINDS:
        raise unknown_name("kind of draft", kind, ALL_KINDS)
    settings = {"num_heads": num_heads, "divergence": divergence, "answer_tokens": answer_tokens}
    for name in UNUSED.get(kind, ()):
        if settings[name] is not None:
            raise InputError(
                f"{name} {settings[name]!r} with kind {kind!r}: it would have no effect"
            )
    if num_ensemble is not None and (kind != "ppd" or num_ensemble < 1):
        raise InputError(
            f"num_ensemble {num_ensemble} with kind {kind!r}: expected kind 'ppd', >= 1"
        )
    parallel = ParallelTraining(num_places=num_heads or 6)
    if (draft is None) == (kind == "acceptance"):
        wanted = "a draft model" if kind == "acceptance" else "none, it would have no effect"
        raise InputError(f"draft {draft!r} with kind {kind!r}: expected {wanted}")
    num_heads, divergence = num_heads or 3, divergence or "forward_kl"
    sizes = {"steps": steps, "batch_size": batch_size}
    changed = {name: value for name, value in sizes.items() if value is not None}
    small, own = small_training(kind, divergence, changed, of_models)
    # Only a draft model can choose among divergences.
    divergence = "forward_kl" if kind == "model" else divergence
    heads = HeadTraining(
        kind=kind if kind in KINDS else "medusa", num_heads=num_heads, divergence=divergence
    )
    of_heads = dict(changed)
    if kind == "medusa2":  # whose batches are texts, and those of its heads alone are places
        of_heads.pop("batch_size", None)
    heads = replace(heads, fit=replace(heads.config, **of_heads))
    pseudo = PseudoTraining(
        kind=kind if kind in ("ppd", "hidden_transfer") else "ppd",
        num_guesses=num_heads,
        num_ensemble=num_ensemble or 1,
        fit=replace(PSEUDO_FIT, **changed),
    )
    eagle3 = Eagle3Training(num_steps=num_heads, divergence=divergence)
    eagle3 = replace(eagle3, fit=replace(eagle3.fit, **changed))
    head = AcceptanceTraining()
    if kind == "acceptance":
        temperature = of_models.get("temperature") or 0.0
        head = AcceptanceTraining(temperature=temperature, fit=replace(head.fit, **changed))
    marked = read_marked(prompts) if kind == "judge" else []
    texts = [] if kind == "judge" else questions(prompts)
    network, tokenizer = load_text_model(model, device=device, dtype=dtype)
    network.requires_grad_(False)
    if is_encoder_decoder(network) != (kind == "parallel"):
        wanted = "an encoder-decoder model" if kind == "parallel" else "a causal language model"
        raise InputError(f"kind {kind!r} with {type(network).__name__}: expected {wanted}")
    if kind == "judge":
        config = replace(JUDGE_FIT, **changed)
        return train_judge(network, tokenizer, marked, out, config=config, progress=progress)
    ids = [question_ids(text, tokenizer) for text in texts]
    answers = answers_of(network, ids, out, answer_tokens or 96, progress)
    if kind == "parallel":
        parallel = replace(parallel, fit=replace(parallel.fit, **changed))
        return train_parallel(network, tokenizer, answers, out, parallel, progress=progress)
    if kind in KINDS:
        return train_heads(network, answers, out, heads, progress=progress)
    if kind == "acceptance":
        drafting, its_own = load_text_model(str(draft), device=device, dtype=dtype)
        if not same_tokens(tokenizer, its_own):
            raise InputError(f"draft {draft!r}: expected one with the target's tokenizer")
        drafting.requires_grad_(False)
        return train_acceptance(network, drafting, answers, out, head, progress=progress)
    if kind == "medusa2":
        joint = medusa2_training(heads, steps, batch_size)
        return train_medusa2(network, tokenizer, answers, out, joint, progress=progress)
    if kind in ("eagle3", "mtp"):
        train = train_eagle3 if kind == "eagle3" else train_mtp
        return train(network, answers, out, eagle3, progress=progress)
    if kind == "model":
        blocks = text_blocks(own, tokenizer) if own else None
        return train_small_model(
            network, tokenizer, answers, out, small, blocks=blocks, progress=progress
        )
    if kind == "nested":
        nested = NestedTraining(fit=replace(SMALL_FIT, **changed))
        return train_nested(network, tokenizer, [answers], out, nested, progress=progress)
    if kind == "lud":
        units = UnitTraining(num_guesses=num_heads, fit=replace(UNIT_FIT, **changed))
        return train_units(network, tokenizer, answers, out, units, progress=progress)
    return train_pseudo(network, answers, out, pseudo, progress=progress)
