"""Pseudo tokens fitted: through a frozen target (PPD, hidden transfer), or with it (lexical units)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...decoding.transformers_cache import TextSizes
from ...decoding.tree import topology
from ...errors import InputError
from ...training.loop import Chance, FitConfig, Objective, fit
from ..drafters.papers.guess_tree import with_pseudo
from ..drafters.papers.pseudo import NUM_RANKS, PseudoTokens, make_pseudo, save_pseudo
from ..layers import edited, find_layers
from .data import Answers, num_held_out

PSEUDO_FIT = FitConfig(
    steps=120, batch_size=2, learning_rate=1e-2, warmup=10, mixed_precision="no", log_every=10
)

Texts = list[tuple[list[int], int]]
"""Texts, cut to the tokens that a step reads, and where the answer of each begins."""


@dataclass(frozen=True, kw_only=True)
class PseudoTraining:
    """Settings of `train_pseudo`.

    Attributes:
        kind: "ppd" or "hidden_transfer".
        num_guesses: K.
        num_ensemble: members of a pseudo token (PPD).
        num_places: places of a text behind which pseudo tokens stand in one step.
        length: tokens of a text that a step reads.
        layers: shares of the layers below the first and the last one whose input hidden transfer
            replaces; those of the other guesses lie evenly between.
        decay: weight of each guess in the loss, of that of the one before it.
        fit: settings of the loop.
    """

    kind: str = "ppd"
    num_guesses: int = 3
    num_ensemble: int = 1
    num_places: int = 12
    length: int = 96
    layers: tuple[float, float] = (0.5, 0.7)
    decay: float = 0.8
    fit: FitConfig = PSEUDO_FIT

    def make(self, sizes: TextSizes) -> PseudoTokens:
        """Fresh pseudo tokens for a target."""
        more: dict[str, Any] = {"num_ensemble": self.num_ensemble}
        if self.kind == "hidden_transfer":
            shares = torch.linspace(*self.layers, self.num_guesses)
            more = {"layers": (shares * sizes.num_layers).round().long().tolist()}
        return make_pseudo(self.kind, sizes.hidden_size, self.num_guesses, **more)


def long_enough(answers: Answers, num_guesses: int, length: int) -> Texts:
    """The texts whose answers leave room for guesses among the first `length` tokens.

    Raises:
        InputError: there are none.
    """
    need = num_guesses + 3
    texts = [
        (text[:length], start)
        for text, start in zip(answers.texts, answers.starts, strict=True)
        if min(len(text), length) - start >= need
    ]
    if not texts:
        raise InputError(
            f"no answer has {need} tokens among the first {length} of its text: expected shorter "
            "prompts or longer answers"
        )
    return texts


def guess(
    network: Any, module: PseudoTokens, text: Tensor, chosen: list[int]
) -> tuple[Tensor, Tensor]:
    """One pass over a text with pseudo tokens behind some of its places.

    Args:
        network: the target.
        module: pseudo tokens.
        text: [1, L].
        chosen: P places.

    Returns:
        What the target says at the text's tokens, [L, V], and what it guesses at the pseudo tokens,
        the mean over members, [P, K, V]; logits both.
    """
    num, most, members = text.shape[1], module.num_guesses, module.num_ensemble
    carried = [0] * num
    for place in chosen:
        carried[place] = most
    # The first token stands where the decoding loop has the last known one.
    tree = with_pseudo(range(-1, num - 2), carried, members, most)
    parents = [-1, *(parent + 1 for parent in tree.parents)]
    embedding = network.get_input_embeddings()
    device, dtype = embedding.weight.device, embedding.weight.dtype
    shape = topology(tuple(parents), device)
    owners, numbers = (torch.tensor([part], device=device) for part in (tree.owners, tree.numbers))
    which = numbers[0, num:] * members + torch.tensor(tree.members[num:], device=device)
    extra = module.vectors().to(dtype)[which]
    bars = torch.zeros(1, 1, len(parents), len(parents), device=device, dtype=dtype)
    bars.masked_fill_(~shape.ancestors, torch.finfo(dtype).min)
    with edited(network, module.edit(owners, numbers) or {}):
        logits = network(
            inputs_embeds=torch.cat([embedding(text), extra[None]], dim=1),
            attention_mask=bars,
            position_ids=shape.depths[None],
            use_cache=False,
        ).logits[0]
    return logits[:num], logits[torch.from_numpy(tree.speakers)[chosen].to(device)].mean(2)


class PseudoObjective(Objective):
    """Divergence of what the target says at pseudo tokens from what it says at the tokens later.

    Args:
        module: pseudo tokens.
        network: the target, frozen.
        texts: of its answers.
        training: settings.
    """

    def __init__(
        self, module: PseudoTokens, network: Any, texts: Texts, training: PseudoTraining
    ) -> None:
        super().__init__()
        self.module, self._settings, self._texts = module, training, texts
        # In a tuple, so that the target's weights are no part of what is trained and saved.
        self._frozen = (network,)
        self.num_items = len(texts)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Texts, and a draw of places of each."""
        texts, places = [], []
        for index in indices.tolist():
            text, start = self._texts[index]
            room = torch.arange(start - 1, len(text) - self._settings.num_guesses - 1)
            order = torch.randperm(len(room), generator=generator)
            texts.append(torch.tensor([text]))
            places.append(room[order[: self._settings.num_places]])
        return {"texts": texts, "places": places}

    def loss(self, inputs: dict[str, Any], chance: Chance) -> dict[str, Tensor]:
        """Mean forward divergence over texts, and the agreement of the first guess."""
        pairs = zip(inputs["texts"], inputs["places"], strict=True)
        losses, right = zip(*(self.text_loss(text, places) for text, places in pairs), strict=True)
        return {"loss": torch.stack(losses).mean(), "agreement": torch.stack(right).mean()}

    def text_loss(self, text: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and agreement on one text [1, L], pseudo tokens behind places [P]."""
        said, guesses = guess(self._frozen[0], self.module, text, chosen.tolist())
        order = torch.arange(self.module.num_guesses, device=said.device)
        later = chosen.to(said.device)[:, None] + 1 + order
        teacher = said.detach()[later].float().log_softmax(-1)
        each = (teacher.exp() * (teacher - guesses.float().log_softmax(-1))).sum(-1)
        weights = self._settings.decay**order
        right = teacher[:, 0].argmax(-1) == guesses[:, 0].argmax(-1)
        return (each.mean(0) * weights).sum() / weights.sum(), right.float().mean().detach()


@torch.no_grad()
def measure_ranks(network: Any, module: PseudoTokens, texts: Texts, piece: int = 12) -> Tensor:
    """How often guess r of pseudo token k is what the target says later, [K, NUM_RANKS].

    Args:
        network: the target.
        module: pseudo tokens.
        texts: that the fit has not seen.
        piece: places of a text that carry pseudo tokens in one pass.
    """
    most = module.num_guesses
    hits, total = torch.zeros(most, NUM_RANKS, device=module.ranks.device), 0
    for text, start in texts:
        places = list(range(start - 1, len(text) - most - 1))
        for first in range(0, len(places), piece):
            some = places[first : first + piece]
            said, guesses = guess(network, module, torch.tensor([text]).to(hits.device), some)
            later = torch.tensor(some)[:, None] + 1 + torch.arange(most)
            goal = said.argmax(-1)[later.to(said.device)]
            best = guesses.topk(min(NUM_RANKS, guesses.shape[-1]), dim=-1).indices
            found = (best == goal[..., None]).sum(0)
            hits[:, : found.shape[-1]] += found
            total += len(some)
    return hits / max(1, total)


def train_pseudo(
    network: Any,
    answers: Answers,
    out: Path,
    training: PseudoTraining | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit pseudo tokens on a frozen target and save them in `out`; resumes what lies there.

    Returns:
        Figures: "agreement" of the first guess and "loss" of the last logged step, "ranks" (how often
        each guess is right on answers that the fit did not see), "parameters", "seconds".

    Raises:
        InputError: answers that are too short, or a network without a list of layers.
    """
    training = training or PseudoTraining()
    torch.manual_seed(training.fit.seed)
    find_layers(network)
    module = training.make(TextSizes.of(network))
    device = network.get_input_embeddings().weight.device
    module.to(device)
    texts = long_enough(answers, training.num_guesses, training.length)
    held = num_held_out(len(texts))
    objective = PseudoObjective(module, network, texts[:-held] or texts, training)
    log = fit(objective, training.fit, out / "fit", device=device, progress=progress)
    module.ranks = measure_ranks(network, module, texts[-held:], training.num_places)
    figures = {
        "agreement": log[-1]["agreement"],
        "loss": log[-1]["loss"],
        "ranks": [[round(rate, 3) for rate in row] for row in module.ranks.tolist()],
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "seconds": log[-1]["seconds"],
    }
    save_pseudo(module, out, figures=figures)
    return figures
