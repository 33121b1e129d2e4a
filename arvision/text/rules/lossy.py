"""Acceptance that is lossy on purpose: typical tokens, a learned judge, the draft's knowledge."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict, shape_of
from ...decoding.verify import (
    Round,
    Rule,
    Verdict,
    coupled_draw,
    deepest,
    draft_laws,
    independent_redraw,
)
from ...errors import InputError
from ...files import user_path
from ...schema import check_fields, read_json

JUDGE_FILE, JUDGE_FIGURES = "judge.safetensors", "judge.json"
"""What `arvision train-draft --kind judge` writes into its folder."""


class JudgeFigures(TypedDict, total=False):
    """What the rule reads of `JUDGE_FIGURES`."""

    threshold: float


def _after_parent(batch: Round, values: Tensor) -> Tensor:
    """Values [B, m + 1, ...] of the laws that judge the drafts, [B, m, ...]."""
    if batch.topology is None:
        return values[:, :-1]
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, batch.topology.laws]


def _choose(batch: Round, logp: Tensor, is_greedy: bool) -> Tensor:
    return logp.argmax(-1) if is_greedy else coupled_draw(batch, logp)


def typical(epsilon: float = 0.09, delta: float = 0.3, *, is_greedy: bool = False) -> Rule:
    """Accept x where p(x) > min(epsilon, delta exp(-H(p))); the longest path that passes stays.

    Lossy: what passes is kept although the law may ask for another token. The token behind the path
    is an exact draw, or the most likely one.

    Args:
        epsilon: no token needs more than this probability; it binds where the law is sure of itself.
        delta: share of exp(-entropy) that is enough; it binds where many tokens are likely.
        is_greedy: put the most likely token behind the path instead of a draw.

    Raises:
        InputError: a value out of range.

    Paper: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding
    Heads", 2024, section 2.3.1; the defaults are those of the authors' code (posterior threshold
        and alpha).
    """
    if not 0 < epsilon <= 1 or delta <= 0:
        raise InputError(f"epsilon {epsilon}, delta {delta}: expected 0 < epsilon <= 1, delta > 0")

    def rule(batch: Round) -> Verdict:
        logp = batch.target_logp.log_softmax(-1)
        entropy = -(logp.exp() * logp).nan_to_num(nan=0.0).sum(-1)
        least = (delta * (-entropy).exp()).clamp(max=epsilon)
        choice = _choose(batch, logp, is_greedy)
        index = batch.drafts.clamp(min=0)[..., None]
        probability = _after_parent(batch, logp).gather(-1, index)[..., 0].exp()
        return deepest(batch, probability > _after_parent(batch, least), choice)

    return rule


def transfer(strength: float = 10.0, *, is_greedy: bool = False) -> Rule:
    """Speculative sampling from the target enriched with what the draft knows.

    p' = softmax(log p + strength (q - p)): a gradient step of the target's logits towards the draft's
    law q, which was read on other text. Lossy for p, exact for p': a draft is accepted with
    probability min(1, p' / q) and else recovered from (p' - q)+. Where nothing was drafted p' is p.

    Args:
        strength: of the step; 0 is the target's own law. RAPID's eta; the default is ours.
        is_greedy: refused by the drafts that it judges, which are drawn.

    Raises:
        InputError: a negative strength.

    Paper: Chen et al., "Long-Context Inference with Retrieval-Augmented Speculative Decoding", 2025
    (RAPID), section 3.2.
    """
    if not strength >= 0:
        raise InputError(f"strength {strength}: expected a number >= 0")

    def rule(batch: Round) -> Verdict:
        laws = draft_laws(batch)
        logp = batch.target_logp
        step = strength * (laws.exp() - logp[:, :-1].exp())
        step = step * (batch.drafts >= 0)[..., None]
        richer = (logp[:, :-1] + step).log_softmax(-1)
        enriched = torch.cat([richer, logp[:, -1:]], dim=1)
        return independent_redraw(replace(batch, target=enriched))

    return rule


def unverified(*, is_greedy: bool = False) -> Rule:
    """Accept every draft unseen; only what drafts by its own confidence may be trusted so far.

    Lossy. The token behind the drafts is an exact draw, or the most likely one.

    Args:
        is_greedy: put the most likely token behind the drafts instead of a draw.

    Paper: Sun et al., "Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical
    Units for LLMs", 2024 (LUD), section 3.
    """

    def rule(batch: Round) -> Verdict:
        choice = _choose(batch, batch.target_logp.log_softmax(-1), is_greedy)
        # Pseudo tokens are no text.
        return deepest(batch, batch.drafts < batch.target_logp.shape[-1], choice)

    return rule


class JudgeHead(nn.Module):
    """Says of a draft, from what the target's last layer makes of it, that it is fine.

    Args:
        hidden_size: C.

    Attributes:
        threshold: probability above which a draft is fine, as it was calibrated when the head was
            fitted.

    Paper: Bachmann et al., "Judge Decoding: Faster Speculative Sampling Requires Going Beyond Model
    Alignment", 2025, section 4 (a linear head on the embedding of the drafted token).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, 1)
        self.threshold = 0.5

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [...] that drafts are fine, from hidden states [..., C] at the drafts."""
        return self.score(hidden.float())[..., 0]

    @classmethod
    def load(cls, path: str | Path) -> JudgeHead:
        """A head saved by `arvision train-draft --kind judge`: its folder or its file.

        Raises:
            CheckpointError: a file that cannot be read or does not fit.
        """
        path = user_path(path)
        path = path / JUDGE_FILE if path.is_dir() else path
        weights = read_state_dict(path, ())
        sizes = {"hidden_size": shape_of(weights, "score.weight", 2, str(path))[1]}
        head = load_strictly(cls, sizes, weights, str(path)).requires_grad_(False)
        file = path.with_name(JUDGE_FIGURES)
        if file.exists():  # earlier releases calibrated nothing
            found: Any = check_fields(read_json(file), JudgeFigures, str(file))
            head.threshold = check_threshold(found.get("threshold", 0.5))
        return head


def check_threshold(threshold: Any) -> float:
    """A probability that divides.

    Raises:
        InputError: 0, 1, or something else.
    """
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not is_number or not 0 < threshold < 1:
        raise InputError(f"threshold {threshold!r}: expected 0 < threshold < 1")
    return float(threshold)


def judge(
    head: JudgeHead | str | Path, threshold: float | None = None, *, is_greedy: bool = False
) -> Rule:
    """Accept a draft that the target would choose itself, or that the judge calls fine.

    Lossy. The token behind the path is an exact draw.

    Args:
        head: trained on answers that were marked as right or wrong; or where it was saved. It goes to
            the model's device.
        threshold: probability above which a draft is fine; None for the head's own.
        is_greedy: put the most likely token behind the path instead of a draw.

    Raises:
        InputError: a threshold out of range; at use, a model that does not tell its hidden states.
    """
    judging = head if isinstance(head, JudgeHead) else JudgeHead.load(head)
    share = check_threshold(judging.threshold if threshold is None else threshold)
    least = math.log(share / (1 - share))

    def rule(batch: Round) -> Verdict:
        if batch.hidden is None:
            raise InputError("the judge looks at hidden states, and this model tells none")
        choice = _choose(batch, batch.target_logp.log_softmax(-1), is_greedy)
        fine = judging.to(batch.hidden.device)(batch.hidden[:, 1:]) > least
        same = batch.drafts == _after_parent(batch, choice)
        return deepest(batch, same | fine, choice)

    rule.needs_hidden = True  # pyright: ignore[reportFunctionMemberAccess]
    return rule
