"""Logits processors and stopping criteria of transformers, applied to every candidate of a tree.

A processor changes the logits of a place by what stands before it. In a tree each candidate has a
prefix of its own: prompt, committed tokens and the path to it, so each is asked for alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decoding.tree import Topology
from ..errors import InputError

REFUSED = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "it runs the model itself",
    "SynthIDTextWatermarkLogitsProcessor": "it counts its own calls",
    "AlternatingCodebooksLogitsProcessor": "it belongs to speech",
    "ConfidenceCriteria": "it asks for scores, which are not kept",
}
"""Classes of transformers that need more than a prefix and its logits, and why."""


def check_usable(noun: str, given: Iterable[Any] | None) -> None:
    """Refuse what cannot act on a prefix alone.

    Raises:
        InputError: names the class and the reason.
    """
    for entry in given or ():
        name = type(entry).__name__
        if name in REFUSED:
            raise InputError(f"{noun} {name} cannot act in trees of candidates: {REFUSED[name]}")


@dataclass
class Prefixes:
    """What stands before the candidates of each row, and the processors that read it.

    Attributes:
        processors: for each row, what is called with ids [1 or R, L] and scores [1 or R, V].
        texts: ids of each row, prompt and committed tokens, padding of the prompt included: a list,
            and from the first pass on a tensor where the candidates are.
        batch: R, the rows that a processor was made for: those of transformers may hold something
            for each row of their batch, so it is shown R copies and its own row is taken.
        rows: which of these rows are still going.
    """

    processors: Sequence[Callable[..., Any]]
    texts: list[Any]
    batch: int = 1
    rows: list[int] | None = None

    def __call__(self, logits: Tensor, tokens: Tensor, tree: Topology | None) -> Tensor:
        """Processed logits [B, T, V] of candidates [B, T]; with T = 0, logits [B, 1, V] of what
        follows the texts."""
        chain = tuple(range(-1, tokens.shape[1] - 1))
        parents = chain if tree is None else tree.parents
        changed = []
        for row, own in enumerate(tokens):
            text = self._text(row, logits.device)
            above: Any = parents if tree is None or tree.is_shared else parents[row]
            paths: list[Tensor] = []
            for place, parent in enumerate(above):
                before = text if parent < 0 else paths[parent]
                paths.append(torch.cat([before, own[place : place + 1]]))
            changed.append(
                torch.stack(
                    [
                        self._process(row, ids, logits[row, place])
                        for place, ids in enumerate(paths or [text])
                    ]
                )
            )
        return torch.stack(changed)

    def _text(self, row: int, device: torch.device) -> Tensor:
        """What stands before the candidates of a row; it stays where these are."""
        text = self.texts[row]
        if not isinstance(text, Tensor):
            text = self.texts[row] = torch.tensor(text, dtype=torch.int64, device=device)
        return text

    def _process(self, row: int, ids: Tensor, logits: Tensor) -> Tensor:
        number = row if self.rows is None else self.rows[row]
        copies = ids.expand(self.batch, -1)
        # transformers hands processors float32, whatever the model computes in.
        scores = logits.float().expand(self.batch, -1).clone()
        return self.processors[number](copies, scores)[number if self.batch > 1 else 0]

    def commit(self, tokens: Tensor, kept: Tensor, given: Sequence[int]) -> None:
        """Candidates `kept[b, :given[b]]` of `tokens` [B, T] become final."""
        for row, count in enumerate(given):
            text = self._text(row, tokens.device)
            self.texts[row] = torch.cat([text, tokens[row, kept[row, :count]]])

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        keep = rows.tolist()
        known = list(range(len(self.texts))) if self.rows is None else self.rows
        self.rows = [known[row] for row in keep]
        self.texts = [self.texts[row] for row in keep]


def own_prefixes(
    network: Any,
    ids: Sequence[Tensor],
    max_new_tokens: int,
    starts: Sequence[Tensor] | None = None,
) -> Prefixes | None:
    """What a model's own generation config asks for, besides temperature, top-k and top-p.

    Args:
        network: a model of transformers.
        ids: prompts [L].
        max_new_tokens: of the run.
        starts: what stands before the new tokens, where that is not the prompts.

    Returns:
        None where it asks for nothing.
    """
    config = getattr(network, "generation_config", None)
    if config is None or not hasattr(network, "_get_logits_processor"):
        return None
    made, starts = [], ids if starts is None else starts
    for row, source in zip(starts, ids, strict=True):
        own = type(config)(**{**config.to_dict(), "do_sample": False, "num_beams": 1})
        own.max_length = len(row) + max_new_tokens
        if own.min_length is not None and own.min_new_tokens is not None:
            own.min_length = len(row) + own.min_new_tokens
        network._prepare_special_tokens(own, True, device=row.device)
        found = network._get_logits_processor(
            generation_config=own,
            input_ids_seq_length=len(row),
            encoder_input_ids=source[None],
            prefix_allowed_tokens_fn=None,
            logits_processor=[],
            device=row.device,
            model_kwargs={},
        )
        check_usable("the model's generation config: logits processor", found)
        made.append(found)
    if not any(made):
        return None
    return Prefixes(made, [row.tolist() for row in starts])


class Criteria:
    """Stopping criteria of transformers, asked about one row's ids after every token.

    As in transformers, rows that meet a criterion go on until all rows have met one, unless end
    tokens are among the criteria: then each row ends alone.

    Args:
        criteria: each is called with ids [R, L] and None, and tells for each row whether it ends.
        prompts: ids [R, L] as transformers was given them.

    Attributes:
        end: new tokens of the run, where rows end together and have done so; None else.
    """

    def __init__(self, criteria: Sequence[Any], prompts: Tensor) -> None:
        check_usable("stopping criterion", criteria)
        self._criteria, self._prompts = list(criteria), prompts
        self._ends_alone = any(type(one).__name__ == "EosTokenCriteria" for one in criteria)
        self._met: dict[int, int] = {}
        self.end: int | None = None

    def __call__(self, row: int, drawn: Sequence[int]) -> bool:
        """Whether row `row` ends behind the new tokens `drawn`."""
        if row not in self._met and self._meets(row, drawn):
            self._met[row] = len(drawn)
            if not self._ends_alone and len(self._met) == len(self._prompts):
                self.end = max(self._met.values())
        if self._ends_alone:
            return row in self._met
        return self.end is not None and len(drawn) >= self.end

    def _meets(self, row: int, drawn: Sequence[int]) -> bool:
        new = torch.tensor(list(drawn), device=self._prompts.device)
        ids = torch.cat([self._prompts[row], new]).expand(len(self._prompts), -1)
        for criterion in self._criteria:
            told = criterion(ids, None)
            if bool(told[row] if isinstance(told, Tensor) and told.dim() else told):
                return True
        return False
