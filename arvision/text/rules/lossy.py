"""Acceptance that is lossy on purpose, for trees and chains: typical tokens, and a learned judge."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict, shape_of
from ...decoding.verify import Round, Rule, Verdict, coupled_draw, deepest
from ...errors import InputError
from ...files import user_path

JUDGE_FILE = "judge.safetensors"
"""What `arvision train-draft --kind judge` writes into its folder."""


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


class JudgeHead(nn.Module):
    """Says of a draft, from what the target's last layer makes of it, that it is fine.

    Args:
        hidden_size: C.

    Paper: Bachmann et al., "Judge Decoding: Faster Speculative Sampling Requires Going Beyond Model
    Alignment", 2025, section 4 (a linear head on the embedding of the drafted token).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, 1)

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
        return load_strictly(cls, sizes, weights, str(path))


def judge(head: JudgeHead | str | Path, threshold: float = 0.5, *, is_greedy: bool = False) -> Rule:
    """Accept a draft that the target would choose itself, or that the judge calls fine.

    Lossy. The token behind the path is an exact draw.

    Args:
        head: trained on answers that were marked as right or wrong; or where it was saved.
        threshold: probability above which a draft is fine.
        is_greedy: put the most likely token behind the path instead of a draw.

    Raises:
        InputError: a threshold out of range; at use, a model that does not tell its hidden states.
    """
    if not 0 < threshold < 1:
        raise InputError(f"threshold {threshold}: expected 0 < threshold < 1")
    judging = head if isinstance(head, JudgeHead) else JudgeHead.load(head)
    least = torch.tensor(threshold).logit()

    def rule(batch: Round) -> Verdict:
        if batch.hidden is None:
            raise InputError("the judge looks at hidden states, and this model tells none")
        choice = _choose(batch, batch.target_logp.log_softmax(-1), is_greedy)
        fine = judging(batch.hidden[:, 1:]) > least.to(batch.hidden.device)
        same = batch.drafts == _after_parent(batch, choice)
        return deepest(batch, same | fine, choice)

    rule.needs_hidden = True  # pyright: ignore[reportFunctionMemberAccess]
    return rule
