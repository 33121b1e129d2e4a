"""Drafts that go on learning while they serve: where the target disagreed, it is listened to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...decoding.verify import Round, Verdict
from ...errors import InputError, check_count

CONTEXT = 128
"""Tokens that a draft reads, when it learns, before the first place where it was wrong."""


class Replay:
    """Examples of a draft's mistakes, of which the newest are kept, and the steps on them.

    Once there are `every` new examples there is one step: on the `every` newest, and on as many older
    ones drawn from those that are kept, so that what was learned from earlier texts stays.

    Args:
        parameters: what is trained.
        rate: of AdamW.
        every: new examples before a step.
        capacity: examples that are kept.

    Attributes:
        num_updates: steps so far.

    Raises:
        InputError: a value out of range, or weights of less than single precision, in which small
            steps are lost.

    Paper: Liu et al., "Online Speculative Decoding", 2023, section 4 (the buffer of what was
    rejected, with the target's laws; periodic updates).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], rate: float, every: int, capacity: int
    ) -> None:
        check_count("every", every)
        check_count("capacity", capacity)
        weights = list(parameters)
        kinds = {weight.dtype for weight in weights}
        if not 0 < rate < 1 or not kinds <= {torch.float32, torch.float64}:
            raise InputError(
                f"online {rate} on weights of {', '.join(map(str, sorted(kinds, key=str)))}: "
                "expected a rate in (0, 1), and float32"
            )
        self._optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        self._weights, self.every = weights, every
        self._kept: deque[Any] = deque(maxlen=capacity)
        self._num_new = 0
        self._generator = torch.Generator().manual_seed(0)
        self.num_updates = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, example: Any) -> None:
        """Keep one more; the oldest one goes where there is no room."""
        self._kept.append(example)
        self._num_new += 1

    @torch.enable_grad()
    def learn(self, loss: Callable[[Sequence[Any]], Tensor]) -> None:
        """A step on what `loss` says about examples, once there are enough new ones."""
        if self._num_new < self.every:
            return
        kept, self._num_new = list(self._kept), 0
        old = max(0, len(kept) - self.every)
        drawn = torch.randperm(old, generator=self._generator)[: self.every].tolist()
        self._optimizer.zero_grad()
        loss([*(kept[place] for place in drawn), *kept[old:]]).backward()
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self.num_updates += 1


class DraftLearner:
    """A draft model that learns from where its drafts ended.

    Args:
        network: a causal language model of transformers; all of its weights are trained but those of
            embeddings and output layer.
        rate: see `Replay`, like the others.
        every: places where drafts ended before a step.
        capacity: such places that are kept.
    """

    def __init__(self, network: Any, rate: float, every: int, capacity: int) -> None:
        self._network = network.requires_grad_(True)
        for layer in (network.get_input_embeddings(), network.get_output_embeddings()):
            layer.requires_grad_(False)
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        self.replay = Replay(weights, rate, every, capacity)

    def hear(self, texts: Sequence[list[int]], batch: Round, verdict: Verdict) -> None:
        """Note where the drafts of a pass ended, and the target's laws there.

        Args:
            texts: of the rows, up to the root of the pass; they go on growing as tokens become final.
            batch: the pass.
            verdict: on it.
        """
        rows = torch.arange(len(texts), device=verdict.counts.device)
        laws = batch.target_logp[rows, ended(verdict)].float().log_softmax(-1).to(torch.float16)
        num_levels = batch.drafts.shape[1] if batch.topology is None else batch.topology.num_levels
        for text, law, count in zip(texts, laws, verdict.given or (), strict=True):
            if count <= num_levels:
                self.replay.add((text, len(text) + count - 1, law))

    def learn(self) -> None:
        """A step, if it is due."""
        self.replay.learn(self._loss)

    def _loss(self, examples: Sequence[tuple[list[int], int, Tensor]]) -> Tensor:
        """Mean cross-entropy from the target's laws; a text is read once for all of its places."""
        device, losses = self._network.get_input_embeddings().weight.device, []
        for text in {id(text): text for text, *_ in examples}.values():
            # Where nobody tells what became final, the last tokens of a finished text are not known.
            own = [(place, law) for of, place, law in examples if of is text and place <= len(text)]
            if not own:
                continue
            places = torch.tensor([place for place, _ in own], device=device)
            start = max(0, int(places.min()) - CONTEXT)
            ids = torch.tensor([text[start : int(places.max())]], device=device)
            logits = self._network(ids, use_cache=False).logits[0, places - 1 - start]
            size = min(logits.shape[1], len(own[0][1]))
            laws = torch.stack([law[:size] for _, law in own])
            losses.append(cross_entropy(laws, logits[:, :size]))
        return torch.cat(losses).mean()


def ended(verdict: Verdict) -> Tensor:
    """Which of the target's laws [B, m + 1] of a pass drew each row's last token, [B]."""
    last = verdict.counts - 1
    if verdict.path is None:
        return last
    rows = torch.arange(len(last), device=last.device)
    node = verdict.path[rows, (last - 1).clamp(min=0)] + 1
    return torch.where(last > 0, node, 0)


def cross_entropy(logp: Tensor, logits: Tensor) -> Tensor:
    """Of a draft's logits [N, W] from the target's laws [N, W], which need not be whole.

    Where the draft knows only part of the target's tokens, an example weighs what that part does.
    """
    laws = logp.float().exp().to(logits.device)
    return -(laws * logits.float().log_softmax(-1)).sum(-1)
