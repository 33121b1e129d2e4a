"""A judge of drafts, fitted on answers that people (or a better model) have marked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import InputError
from ...files import write_bytes, write_json
from ...schema import check_fields, parse_json, read_text
from ...training.loop import Chance, FitConfig, Objective, fit
from ..rules.lossy import JUDGE_FIGURES, JUDGE_FILE, JudgeHead
from .data import hidden_states, question_ids

JUDGE_FIT = FitConfig(steps=400, batch_size=256, learning_rate=5e-3, warmup=20, weight_decay=0.01)


@dataclass(frozen=True)
class MarkedAnswer:
    """An answer, and what is wrong with it.

    Attributes:
        prompt: what was asked.
        answer: what was said.
        wrong: the part of the answer that is wrong, from its first place on; None if all is fine.
    """

    prompt: str
    answer: str
    wrong: str | None = None

    def __post_init__(self) -> None:
        if self.wrong is not None and (not self.wrong or self.wrong not in self.answer):
            raise InputError(f"wrong {self.wrong!r}: expected a part of the answer {self.answer!r}")


def read_marked(path: Path) -> list[MarkedAnswer]:
    """Marked answers of a file with a JSON object per line: "prompt", "answer", "wrong" (optional).

    Raises:
        InputError: no such file, or a line that is something else.
    """
    try:
        lines = read_text(path).split("\n")
    except OSError as error:
        raise InputError(f"prompts {path}: {error.strerror}") from error
    answers = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        content = check_fields(parse_json(line, name), MarkedAnswer, name, only=True)
        try:
            answers.append(MarkedAnswer(**content))
        except (ValueError, TypeError) as error:
            raise InputError(
                f'{name}: expected {{"prompt": ..., "answer": ..., "wrong": ...}}: {error}'
            ) from error
    if not answers:
        raise InputError(f"prompts {path}: expected one marked answer per line")
    return answers


@dataclass(frozen=True)
class JudgedTokens:
    """Tokens of answers, M of them.

    Attributes:
        hidden: [M, C], hidden states at the tokens.
        fine: [M] float, 1 where a token is no part of what is wrong.
    """

    hidden: Tensor
    fine: Tensor


def judged_tokens(
    network: Any, tokenizer: Any, answers: list[MarkedAnswer], *, progress: bool = True
) -> JudgedTokens:
    """What the target makes of each token of marked answers.

    A token is wrong if it shares a character with the wrong part; what follows it is left out,
    since it may be a fine continuation of an error.
    """
    hidden, fine = [], []
    for marked in tqdm(answers, disable=not progress, desc="hidden states"):
        before = question_ids(marked.prompt, tokenizer)
        begin = -1 if marked.wrong is None else marked.answer.index(marked.wrong)
        end = len(marked.answer) if marked.wrong is None else begin + len(marked.wrong)
        ids, labels = [], []
        said = ""
        for token in tokenizer(marked.answer, add_special_tokens=False)["input_ids"]:
            start, said = len(said), tokenizer.decode([*ids, token])
            if start >= end:
                break
            ids.append(token)
            labels.append(float(marked.wrong is None or len(said) <= begin))
        states = hidden_states(network, [*before, *ids])[len(before) :]
        hidden.append(states.float().cpu())
        fine.append(torch.tensor(labels))
    return JudgedTokens(torch.cat(hidden), torch.cat(fine))


class JudgeObjective(Objective):
    """Cross-entropy of the judge, either kind of token with half of the weight.

    Args:
        head: what is trained.
        tokens: to learn from.
    """

    def __init__(self, head: JudgeHead, tokens: JudgedTokens) -> None:
        super().__init__()
        self.head, self._tokens = head, tokens
        self.num_items = len(tokens.fine)
        share = float(tokens.fine.mean())
        self._weights = 0.5 / (1 - share), 0.5 / share

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Hidden states at tokens, and which of these are fine."""
        return {"hidden": self._tokens.hidden[indices], "fine": self._tokens.fine[indices]}

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Loss, and the share of tokens that the judge calls by their name."""
        fine, score = inputs["fine"], self.head(inputs["hidden"])
        weight = torch.where(fine > 0, self._weights[1], self._weights[0])
        loss = F.binary_cross_entropy_with_logits(score, fine, weight)
        return {"loss": loss, "right": ((score > 0) == (fine > 0)).float().mean()}


def train_judge(
    network: Any,
    tokenizer: Any,
    answers: list[MarkedAnswer],
    out: Path,
    *,
    config: FitConfig = JUDGE_FIT,
    held_out: float = 0.2,
    recall: float = 0.9,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit a judge on a frozen target and save it as `out/judge.safetensors`; resumes what lies there.

    Args:
        network: the target, a causal language model of transformers.
        tokenizer: its tokenizer.
        answers: marked ones, right and wrong.
        out: folder.
        config: of the loop.
        held_out: share of the answers, the last ones, that the head never sees: the first half of
            them calibrates its threshold, the figures are of the second.
        recall: share of the wrong tokens that the calibrated threshold refuses.
        progress: show bars on stderr.

    Returns:
        Figures: "tokens" learnt from, the "threshold", and on the answers held out for it
        "fine_kept", "wrong_refused" (its recall) and of how many "wrong" tokens; None for none.

    Raises:
        InputError: answers of which all are fine, or none.

    Paper: Bachmann et al., "Judge Decoding: Faster Speculative Sampling Requires Going Beyond Model
    Alignment", 2025, section 4.
    """
    torch.manual_seed(config.seed)
    num_held = max(2, round(held_out * len(answers)))
    learn = judged_tokens(network, tokenizer, answers[:-num_held], progress=progress)
    if len(learn.fine.unique()) != 2:
        raise InputError("the answers have tokens of one kind only: expected fine and wrong ones")
    head = JudgeHead(learn.hidden.shape[1])
    objective = JudgeObjective(head, learn)
    device = network.get_input_embeddings().weight.device
    log = fit(objective, config, out / "fit", device=device, progress=progress)
    half = num_held // 2
    tried, held = (
        judged_tokens(network, tokenizer, part, progress=False)
        for part in (answers[-num_held : len(answers) - half], answers[len(answers) - half :])
    )
    with torch.no_grad():
        threshold = calibrated(head(tried.hidden.to(device)).cpu(), tried.fine, recall)
        called = head(held.hidden.to(device)).cpu().sigmoid() > threshold
    figures = {
        "tokens": len(learn.fine),
        "threshold": round(threshold, 4),
        "fine_kept": _share(called, held.fine > 0),
        "wrong_refused": _share(~called, held.fine == 0),
        "wrong": int((held.fine == 0).sum()),
        "seconds": log[-1]["seconds"],
    }
    write_bytes(out / JUDGE_FILE, save({k: v.cpu() for k, v in head.state_dict().items()}))
    write_json(out / JUDGE_FIGURES, figures)
    return figures


def calibrated(scores: Tensor, fine: Tensor, recall: float) -> float:
    """The probability above which a token is fine: 0.5, or more if more wrong tokens than a share of
    1 - `recall` would pass.

    Args:
        scores: [M], logits.
        fine: [M], 1 or 0.
        recall: share of the wrong tokens to refuse.
    """
    wrong = scores[fine == 0].sigmoid().double().sort().values
    if not len(wrong):
        return 0.5
    least = wrong[min(len(wrong) - 1, max(0, math.ceil(recall * len(wrong)) - 1))]
    return float(least.clamp(0.5, 0.9999))


def _share(values: Tensor, chosen: Tensor) -> float | None:
    return round(float(values[chosen].float().mean()), 4) if bool(chosen.any()) else None
