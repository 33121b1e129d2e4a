"""From the name of a target and a file of prompts to a finished draft of some kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch

from ...errors import InputError, unknown_name
from ...files import write_text
from ...schema import check_fields, read_json, read_text
from .. import load_text_model
from ..drafters.heads import KINDS
from .data import Answers, answer, question_ids
from .heads import HeadTraining, train_heads
from .judge import JUDGE_FIT, read_marked, train_judge
from .pseudo import PSEUDO_FIT, PseudoTraining, train_pseudo
from .small_model import SMALL_FIT, train_small_model

ALL_KINDS = (*KINDS, "ppd", "hidden_transfer", "model", "judge")


MOST_ANSWERS = 1 << 32
"""Bytes of the target's answers, which are a run's own."""


class Kept(TypedDict):
    """What `answers.json` holds."""

    wanted: dict[str, Any]
    texts: list[list[int]]
    starts: list[int]


def read_prompts(path: Path, tokenizer: Any) -> list[list[int]]:
    """Ids of the prompts in a text file, in the tokenizer's chat template where it has one.

    Raises:
        InputError: no such file, or nothing in it.
    """
    try:
        lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    except OSError as error:
        raise InputError(f"prompts {path}: {error.strerror}") from error
    if not lines:
        raise InputError(f"prompts {path}: expected one prompt per line")
    # Lines may hold line breaks in escaped form.
    return [question_ids(line.replace("\\n", "\n"), tokenizer) for line in lines]


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


def fit_draft(
    model: str,
    prompts: Path,
    out: Path,
    kind: str,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    num_heads: int = 3,
    divergence: str = "forward_kl",
    answer_tokens: int = 96,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit a draft of a kind on a frozen target; see `arvision train-draft`.

    Returns:
        Figures of the fit.

    Raises:
        InputError: an unknown kind, or bad settings, before the model is loaded.
    """
    if kind not in ALL_KINDS:
        raise unknown_name("kind of draft", kind, ALL_KINDS)
    given = {"steps": steps, "batch_size": batch_size}
    changed = {name: value for name, value in given.items() if value is not None}
    heads = HeadTraining(
        kind=kind if kind in KINDS else "hydra", num_heads=num_heads, divergence=divergence
    )
    heads = replace(heads, fit=replace(heads.fit, **changed))
    pseudo = PseudoTraining(
        kind=kind if kind in ("ppd", "hidden_transfer") else "ppd",
        num_guesses=num_heads,
        fit=replace(PSEUDO_FIT, **changed),
    )
    marked = read_marked(prompts) if kind == "judge" else []
    network, tokenizer = load_text_model(model, device=device, dtype=dtype)
    network.requires_grad_(False)
    if kind == "judge":
        config = replace(JUDGE_FIT, **changed)
        return train_judge(network, tokenizer, marked, out, config=config, progress=progress)
    answers = answers_of(network, read_prompts(prompts, tokenizer), out, answer_tokens, progress)
    if kind in KINDS:
        return train_heads(network, answers, out, heads, progress=progress)
    if kind == "model":
        config = replace(SMALL_FIT, **changed)
        return train_small_model(
            network,
            tokenizer,
            answers,
            out,
            divergence=divergence,
            config=config,
            progress=progress,
        )
    return train_pseudo(network, answers, out, pseudo, progress=progress)
