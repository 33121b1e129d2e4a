"""Drafts of an encoder-decoder model's answers, a block in one pass (generalised Aggressive Decoding)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from ....decoding.logits import Shaping
from ....decoding.tree import TokenTree
from ....errors import InputError
from ....files import user_path
from ....schema import check_fields, read_json
from ...loading import load_text_model
from ...seq2seq import Seq2SeqLM
from ..base import TextDrafter, register

PARALLEL_FILE = "parallel.json"
"""What `arvision train-draft --kind parallel` writes beside a draft."""


class ParallelFacts(TypedDict):
    """What `parallel.json` holds: the token of unknown places, and how many were learnt."""

    mask_id: int
    num_places: int


@register("parallel", summary="a block of tokens in one pass, for encoder-decoder models (GAD)")
class ParallelDraft(TextDrafter):
    """A small encoder-decoder model that says the next tokens all at once.

    Behind what is known its decoder reads mask tokens; at each it guesses one token further, without
    knowing the other guesses. One pass of the draft makes a chain, however long.

    Args:
        folder: of `arvision train-draft --kind parallel`.
        draft: such a network that is made, instead of a folder.
        mask_id: its token of unknown places.
        num_draft: length of the chain; None for what the draft learnt.

    Raises:
        CheckpointError: a folder that cannot be read.
        InputError: neither or both; at use, a target of another kind or vocabulary.

    Papers: Xia et al., "Speculative Decoding: Exploiting Speculative Execution for Accelerating
    Seq2seq Generation", 2023; Ge et al., "Lossless Acceleration for Seq2seq Generation with
    Aggressive Decoding", 2022, section 3.2 (there the masks see each other in both directions).
    """

    branches: ClassVar[bool] = False

    def __init__(
        self,
        folder: str | Path | None = None,
        draft: Any = None,
        mask_id: int = 0,
        num_draft: int | None = None,
    ) -> None:
        if (folder is None) == (draft is None):
            raise InputError("a parallel draft is a folder or a network: expected one of the two")
        if folder is not None:
            path = user_path(folder) / PARALLEL_FILE
            facts: Any = check_fields(read_json(path), ParallelFacts, str(path))
            draft, _ = load_text_model(folder)
            mask_id, num_draft = facts["mask_id"], num_draft or facts["num_places"]
        self.draft, self.mask_id, self.num_draft = draft, mask_id, num_draft or 6
        self.shaping = Shaping()

    def begin(self, state: Any) -> None:
        """Read the prompts.

        Raises:
            InputError: a target without an encoder, or of another vocabulary.
        """
        given = self.draft
        # A draft may have been made a token model on its way here.
        model = Seq2SeqLM(getattr(given, "called", given), self.num_tokens)
        if not isinstance(state.model, Seq2SeqLM) or model.vocab_size != self.vocab_size:
            raise InputError(
                f"a parallel draft of {model.vocab_size} tokens: expected an encoder-decoder target of "
                "as many"
            )
        self._state, _ = model.start(self.histories)
        self._done = [0] * len(self.histories)

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        super().select(rows)
        self._state.select(rows)
        self._done = [self._done[row] for row in rows.tolist()]

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """A chain per row; see `arvision.decoding.loop.Drafter`."""
        self.follow(tokens, lengths)
        given = lengths.tolist()
        waiting = [length - done for length, done in zip(given, self._done, strict=True)]
        most = self._state.model.sizes.num_positions
        if most is not None:
            num = min(num, most - 1 - max(waiting) - max(self._done))
        if num < 1:
            return TokenTree(tokens[:, :0])
        fed = tokens.new_full((len(tokens), max(waiting) + num - 1), self.mask_id)
        for row, count in enumerate(waiting):
            fed[row, :count] = tokens[row, self._done[row] : given[row]]
        logits = self._state.extend(fed)
        counts = torch.tensor(waiting, device=tokens.device)
        self._state.advance(counts, waiting)
        self._done = given
        ahead = torch.arange(num, device=tokens.device)
        index = (counts - 1)[:, None] + ahead
        logits = logits.gather(1, index[..., None].expand(-1, -1, logits.shape[2]))
        scores = (self.shaping if self.shaping.temperature else Shaping())(logits)
        if self.shaping.temperature > 0:
            where = (lengths[:, None] + ahead).clamp(max=self.num_tokens - 1)
            scores = scores + self.noise.gumbel(where, scores.shape[-1], scores.dtype)
        return TokenTree(scores.argmax(-1))
