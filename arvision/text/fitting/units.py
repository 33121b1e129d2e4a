"""Lexical units: a target fine-tuned to say several tokens at once where it is sure of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...decoding.transformers_cache import TextSizes
from ...errors import InputError
from ...training.loop import Chance, FitConfig, Objective, fit
from ..drafters.papers.pseudo import PseudoTokens, make_pseudo, save_pseudo
from .data import Answers, num_held_out
from .pseudo import Texts, guess, long_enough, measure_ranks

UNIT_FIT = FitConfig(
    steps=100, batch_size=2, learning_rate=5e-5, warmup=10, mixed_precision="no", log_every=10
)


@dataclass(frozen=True, kw_only=True)
class UnitTraining:
    """Settings of `train_units`.

    Attributes:
        num_guesses: most tokens of a unit but one.
        threshold: least probability, in the target as it was, of all tokens of a unit but its first.
        num_places: places of a text at which units begin in one step.
        length: tokens of a text that a step reads.
        num_texts: texts that are read at most; each is read once before the fit, to find its units.
        fit: settings of the loop.

    Raises:
        InputError: a threshold that is no probability.
    """

    num_guesses: int = 3
    threshold: float = 0.8
    num_places: int = 12
    length: int = 96
    num_texts: int = 160
    fit: FitConfig = UNIT_FIT

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold {self.threshold}: expected a probability")


@torch.no_grad()
def confidences(network: Any, texts: Texts) -> list[Tensor]:
    """Probability of each token of each text, [L], given those before it; 1 for the first."""
    found = []
    device = network.get_input_embeddings().weight.device
    for text, _ in texts:
        ids = torch.tensor([text], device=device)
        logp = network(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        told = logp.gather(-1, ids[0, 1:, None])[:, 0].exp()
        found.append(torch.cat([told.new_ones(1), told]).cpu())
    return found


class UnitObjective(Objective):
    """Cross-entropy of the answers token by token, as before, and of units at pad tokens.

    Behind a place stand K pad tokens, which are to say what follows the next token, as long as the
    target as it was is sure of all of it; and the token that ends the unit, so that what is said of
    it there has an honest confidence, too.

    Args:
        network: the target, which is trained.
        module: pad tokens.
        texts: of the target's answers.
        sure: see `confidences`, of the target as it was.
        training: settings.
    """

    def __init__(
        self,
        network: Any,
        module: PseudoTokens,
        texts: Texts,
        sure: list[Tensor],
        training: UnitTraining,
    ) -> None:
        super().__init__()
        self.network, self.module, self._training = network, module, training
        self._texts, self._sure = texts, sure
        self.num_items = len(texts)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Texts, where their answers begin, a draw of places of each, and what is learnt there."""
        most, rows = self._training.num_guesses, []
        for index in indices.tolist():
            text, start = self._texts[index]
            room = torch.arange(start - 1, len(text) - most - 1)
            order = torch.randperm(len(room), generator=generator)
            places = room[order[: self._training.num_places]]
            later = places[:, None] + 2 + torch.arange(most)
            is_sure = (self._sure[index] >= self._training.threshold)[later]
            counts = torch.cat([torch.ones_like(is_sure[:, :1]), is_sure[:, :-1]], dim=1)
            wanted = torch.tensor(text)[later].where(counts.cumprod(1) > 0, -100)
            rows.append((torch.tensor([text]), start, places, wanted))
        names = ("texts", "starts", "places", "wanted")
        return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))

    def loss(self, inputs: dict[str, Any], chance: Chance) -> dict[str, Tensor]:
        """Mean loss of texts, and how many of the tokens of units are right."""
        losses, right = [], []
        for text, start, places, wanted in zip(*inputs.values(), strict=True):
            said, guesses = guess(self.network, self.module, text, places.tolist())
            plain = cross_entropy(said[start - 1 : -1].float(), text[0, start:])
            units = cross_entropy(
                guesses.float().flatten(0, 1), wanted.flatten(), ignore_index=-100
            )
            losses.append(plain + units)
            is_told = wanted >= 0
            right.append((guesses.argmax(-1) == wanted)[is_told].float().mean().detach())
        return {"loss": torch.stack(losses).mean(), "agreement": torch.stack(right).mean()}


def train_units(
    network: Any,
    tokenizer: Any,
    answers: Answers,
    out: Path,
    training: UnitTraining | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Fine-tune a target for lexical units, and save it and its pad tokens in `out`; resumes.

    The target itself is changed: its weights are trained in place, in float32.

    Returns:
        Figures: "agreement" of pad tokens and "loss" of the last logged step, "ranks" on answers that
        the fit did not see, "unit" (tokens of a unit in the answers, on average), "seconds".

    Raises:
        InputError: answers that are too short.

    Paper: Sun et al., "Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical
    Units for LLMs", 2024, section 3.
    """
    training = training or UnitTraining()
    torch.manual_seed(training.fit.seed)
    sizes, dtype = TextSizes.of(network), network.dtype
    module = make_pseudo(
        "lud", sizes.hidden_size, training.num_guesses, threshold=training.threshold
    )
    texts = long_enough(answers, training.num_guesses, training.length)
    step = max(1, len(texts) // training.num_texts)
    texts = texts[::step][: training.num_texts]
    sure = confidences(network, texts)
    embedding = network.get_input_embeddings().weight
    pad = getattr(network.generation_config, "pad_token_id", None) or 0
    module.embedding.data.copy_(embedding[pad].float())
    module.to(embedding.device)
    network.float().requires_grad_(True)
    held = num_held_out(len(texts))
    objective = UnitObjective(network, module, texts[:-held] or texts, sure, training)
    log = fit(objective, training.fit, out / "fit", device=embedding.device, progress=progress)
    network.requires_grad_(False).eval()
    module.ranks = measure_ranks(network, module, texts[-held:], training.num_places)
    follows = torch.cat([s[start + 1 :] for s, (_, start) in zip(sure, texts, strict=True)])
    figures = {
        "agreement": log[-1]["agreement"],
        "loss": log[-1]["loss"],
        "ranks": [[round(rate, 3) for rate in row] for row in module.ranks.tolist()],
        "unit": 1 / max(1e-9, (follows < training.threshold).float().mean().item()),
        "seconds": log[-1]["seconds"],
    }
    network.to(dtype).save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    save_pseudo(module, out, figures=figures)
    return figures
