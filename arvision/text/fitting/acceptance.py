"""The acceptance head of a draft model (SpecDec++), fitted on a target's answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ...decoding.draft_model import confidence_features
from ...decoding.logits import Shaping
from ...errors import InputError
from ...training.loop import Chance, FitConfig, Objective, fit
from ..drafters.draft_tree import in_vocabulary
from ..drafters.papers.acceptance import AcceptanceHead
from .data import Answers, hidden_states, num_held_out

ACCEPTANCE_FIT = FitConfig(
    steps=300, batch_size=256, learning_rate=2e-3, warmup=20, weight_decay=0.05
)


@dataclass(frozen=True, kw_only=True)
class AcceptanceTraining:
    """Settings of `train_acceptance`.

    Attributes:
        temperature: of the runs that the head is for; at 0 a draft is accepted if it is the target's
            most likely token, above it with probability min(1, p / q).
        share: of an answer's tokens that a round replaces by the draft's.
        rounds: of replacing, each of other places.
        rejection_weight: of rejections in the loss against acceptances. The paper takes 6 for drafts
            that are mostly accepted; 1 leaves the probabilities calibrated.
        length: tokens of a text that are read, from its start.
        fit: of the loop.

    Raises:
        InputError: a number out of range.
    """

    temperature: float = 0.0
    share: float = 0.2
    rounds: int = 2
    rejection_weight: float = 1.0
    length: int = 160
    fit: FitConfig = ACCEPTANCE_FIT

    def __post_init__(self) -> None:
        fits = 0 < self.share <= 0.5 and 1 <= self.rounds <= 1 / self.share
        if self.temperature < 0 or self.rejection_weight <= 0 or self.length < 4 or not fits:
            raise InputError(
                f"temperature {self.temperature}, share {self.share}, rounds {self.rounds}, "
                f"rejection_weight {self.rejection_weight}, length {self.length}: expected >= 0, a "
                "share of at most 0.5, rounds of at least 1 and 1 / share at most, a positive "
                "number, at least 4"
            )


@dataclass(frozen=True)
class DraftedTokens:
    """Tokens of a draft model, M of them, and whether they are accepted.

    Attributes:
        hidden: [M, C], the draft's last layer at the tokens.
        features: [M, 4], see `confidence_features`.
        accepted: [M], probabilities.
    """

    hidden: Tensor
    features: Tensor
    accepted: Tensor


@torch.no_grad()
def drafted_tokens(
    network: Any,
    draft: Any,
    answers: Answers,
    training: AcceptanceTraining,
    *,
    seed: int = 0,
    progress: bool = True,
) -> DraftedTokens:
    """What a draft says along a target's answers, of which a share of the tokens is its own.

    The paper mixes the tokens of target and draft and learns at the draft's: at its places and no
    others, so that whether a token is looked at does not depend on whether it is right.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = Shaping(temperature=training.temperature) if training.temperature else Shaping()
    size = network.get_output_embeddings().weight.shape[0]

    def laws(model: Any, text: list[int]) -> tuple[Tensor, Tensor]:
        """Hidden states [L, C] along a text, and the laws [L, V] of what follows."""
        hidden = hidden_states(model, text)
        logits = model.get_output_embeddings()(hidden)
        return hidden.float().cpu(), shape(in_vocabulary(logits.float().cpu(), size))

    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    texts = list(zip(answers.texts, answers.starts, strict=True))
    for whole, start in tqdm(texts, disable=not progress, desc="drafts"):
        text = whole[: training.length]
        if len(text) <= start:
            continue
        _, q = laws(draft, text)
        said = q.argmax(-1)
        if training.temperature:
            said = torch.multinomial(q.exp(), 1, generator=generator)[:, 0]
        order = start + torch.randperm(len(text) - start, generator=generator)
        num = max(1, round(training.share * len(order)))
        for number in range(training.rounds):
            places = order[number * num : (number + 1) * num]
            mixed = torch.tensor(text)
            mixed[places] = said[places - 1]
            hidden, q = laws(draft, mixed.tolist())
            _, p = laws(network, mixed.tolist())
            tokens, before = mixed[places], places - 1
            if training.temperature:
                ratio = p[before, tokens] - q[before, tokens]
                accepted = ratio.clamp(max=0).exp()
            else:
                accepted = (p[before].argmax(-1) == tokens).float()
            features = confidence_features(q[before], q[before], tokens)
            parts.append((hidden[places], features, accepted))
    if not parts:
        raise InputError("answers that are all empty: nothing to learn from")
    return DraftedTokens(*(torch.cat(column) for column in zip(*parts, strict=True)))


class AcceptanceObjective(Objective):
    """Cross-entropy of the head.

    Args:
        head: what is trained.
        drafted: to learn from.
        rejection_weight: see `AcceptanceTraining`.
    """

    def __init__(
        self, head: AcceptanceHead, drafted: DraftedTokens, rejection_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.head, self._drafted, self._weight = head, drafted, rejection_weight
        self.num_items = len(drafted.accepted)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What the draft made of tokens, and whether these are accepted."""
        drafted = self._drafted
        return {
            "hidden": drafted.hidden[indices],
            "features": drafted.features[indices],
            "accepted": drafted.accepted[indices],
        }

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Loss."""
        accepted = inputs["accepted"]
        logits = self.head.logits(inputs["hidden"], inputs["features"])
        weight = accepted + self._weight * (1 - accepted)
        return {"loss": F.binary_cross_entropy_with_logits(logits, accepted, weight)}


@torch.no_grad()
def acceptance_figures(head: AcceptanceHead, drafted: DraftedTokens) -> dict[str, float]:
    """How well a head tells: nats of its predictions and of the constant best one ("blind"), and the
    chance that it ranks an accepted draft above a rejected one ("ranking")."""
    device = head.score.weight.device
    logits = head.logits(drafted.hidden.to(device), drafted.features.to(device)).cpu()
    accepted = drafted.accepted
    base = accepted.mean().clamp(1e-6, 1 - 1e-6)
    blind = F.binary_cross_entropy(base.expand_as(accepted), accepted)
    above = (logits[:, None] - logits).sign() / 2 + 0.5
    pairs = accepted[:, None] * (1 - accepted)
    return {
        "acceptance": float(accepted.mean()),
        "nats": float(F.binary_cross_entropy_with_logits(logits, accepted)),
        "blind": float(blind),
        "ranking": float((pairs * above).sum() / pairs.sum().clamp(min=1e-9)),
    }


def train_acceptance(
    network: Any,
    draft: Any,
    answers: Answers,
    out: Path,
    training: AcceptanceTraining | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit an acceptance head on a frozen draft and save it in `out`; resumes what lies there.

    Args:
        network: the target, a causal language model of transformers.
        draft: of the target's vocabulary, another one.
        answers: of the target.
        out: folder.
        training: settings.
        progress: show bars on stderr.

    Returns:
        Figures of `acceptance_figures` on answers that were held out, "tokens" learnt from, "seconds".

    Raises:
        InputError: answers that are empty, or of fewer than two prompts.
    """
    training = training or AcceptanceTraining()
    if len(answers.texts) < 2:
        raise InputError("answers to one prompt: expected two or more, of which some are held out")
    num = num_held_out(len(answers.texts))
    learned = Answers(answers.texts[:-num], answers.starts[:-num])
    held = Answers(answers.texts[-num:], answers.starts[-num:])
    torch.manual_seed(training.fit.seed)
    drafted = drafted_tokens(network, draft, learned, training, progress=progress)
    head = AcceptanceHead(drafted.hidden.shape[1])
    objective = AcceptanceObjective(head, drafted, training.rejection_weight)
    device = draft.get_input_embeddings().weight.device
    log = fit(objective, training.fit, out / "fit", device=device, progress=progress)
    unseen = drafted_tokens(network, draft, held, training, seed=1, progress=False)
    figures = acceptance_figures(head.eval(), unseen)
    facts = {name: round(value, 4) for name, value in figures.items()}
    facts |= {"tokens": len(drafted.accepted), "seconds": log[-1]["seconds"]}
    head.save(out, temperature=training.temperature, **facts)
    return facts
