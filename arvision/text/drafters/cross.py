"""A draft model of another vocabulary: what both vocabularies hold is drafted, on the same text.

The draft reads the target's text in its own tokens: after each round the text is encoded anew, what the
new encoding shares with the old one stays in the draft's cache, and the rest is read again. Its laws
are cut down to the tokens that both vocabularies spell alike, and named by the target's ids. So they
are laws over the target's tokens, and every rule stays exact.

Paper: Timor et al., "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for
Heterogeneous Vocabularies", 2025, section 4 (token-level intersection), and its string-level exchange
for the text that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...decoding.drafter import LARGEST_TREE
from ...decoding.tree import Topology
from ...errors import InputError

LEAST_SHARED = 16
"""Tokens that two vocabularies must spell alike for a draft to be of use."""

SAME = 0.95
"""Share of common spellings with one id from which on two tokenizers are the same."""

SPACE, BYTE_SPACE, BROKEN = "\u2581", "\u0120", "\ufffd"


def _byte_letters() -> dict[str, int]:
    """What byte-level tokenizers write for each byte: itself where it prints, else a letter from 256 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {
        chr(256 + place): byte for place, byte in enumerate(hidden)
    }


def spellings(tokenizer: Any) -> dict[bytes, int]:
    """The text of each token, as bytes, to its id; special tokens left out.

    Args:
        tokenizer: of transformers: byte-level, or with a mark for spaces and tokens `<0x0A>` for
            bytes, or plain.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    is_byte_level = any(token.startswith(BYTE_SPACE) for token in vocabulary)
    letters = _byte_letters()
    found: dict[bytes, int] = {}
    for token, number in vocabulary.items():
        if number in special or not token:
            continue
        if is_byte_level and all(letter in letters for letter in token):
            text = bytes(letters[letter] for letter in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            text = bytes.fromhex(token[3:5])
        else:
            text = token.replace(SPACE, " ").encode()
        found.setdefault(text, number)
    return found


def same_tokens(first: Any, second: Any) -> bool:
    """Whether two tokenizers number what both of them spell alike the same way."""
    if first is second:
        return True
    one, other = first.get_vocab(), second.get_vocab()
    common = one.keys() & other.keys()
    alike = sum(one[token] == other[token] for token in common)
    return alike >= SAME * min(len(one), len(other))


@dataclass(frozen=True)
class Translation:
    """Between a target's tokens and a draft's.

    Attributes:
        target: the target's tokenizer.
        draft: the draft's.
        ours: [S], the target's ids of the tokens that both spell alike, and of the end of a text.
        theirs: [S], the draft's ids of the same.
    """

    target: Any
    draft: Any
    ours: Tensor
    theirs: Tensor

    @classmethod
    def between(cls, target: Any, draft: Any) -> Translation:
        """The translation between two tokenizers.

        Raises:
            InputError: too few tokens that both spell alike.
        """
        known, other = spellings(target), spellings(draft)
        pairs = {number: other[text] for text, number in known.items() if text in other}
        if len(pairs) < LEAST_SHARED:
            raise InputError(
                f"the draft's vocabulary of {len(other):,} tokens spells {len(pairs)} of the "
                f"target's {len(known):,} alike: expected at least {LEAST_SHARED}"
            )
        ends = target.eos_token_id, draft.eos_token_id
        if None not in ends:
            pairs[ends[0]] = ends[1]
        return cls(target, draft, torch.tensor([*pairs]), torch.tensor([*pairs.values()]))

    def read(self, ids: Sequence[int]) -> list[int]:
        """The draft's ids of the target's text `ids`; the draft's own beginning before them."""
        known = self.draft.get_vocab()
        special = set(self.target.all_special_ids)
        names = self.target.convert_ids_to_tokens(list(ids))
        kept = [
            number
            for number, name in zip(ids, names, strict=True)
            if name is not None and (number not in special or name in known)
        ]
        # Behind the last whole letter bytes may wait for the rest of theirs.
        text = self.target.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
        ).rstrip(BROKEN)
        found = self.draft(text, add_special_tokens=False)["input_ids"]
        start = self.draft.bos_token_id
        begins = [start] if start is not None and found[:1] != [start] else []
        return begins + found or [0]


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


class TranslatedState:
    """A draft's state kept where the target's text is, in the draft's own tokens.

    Args:
        draft: the draft, an `HFCausalLM` with room for its own tokens.
        translation: between the vocabularies.
        prompts: the target's ids of each row.
        shape: logits [..., V] of the target's vocabulary to log-probabilities.
        vocab_size: V.
    """

    def __init__(
        self,
        draft: Any,
        translation: Translation,
        prompts: Sequence[Sequence[int]],
        shape: Callable[[Tensor], Tensor],
        vocab_size: int,
    ) -> None:
        self._translation, self._shape, self._vocab_size = translation, shape, vocab_size
        self._texts = [list(prompt) for prompt in prompts]
        self._seen = [0] * len(prompts)
        self._read = [translation.read(text) for text in self._texts]
        self._state, _ = draft.start(self._read)
        device = self._state.lengths.device
        self._root = torch.empty(len(prompts), 0, device=device)
        self._ours, self._theirs = translation.ours.to(device), translation.theirs.to(device)
        self._names = torch.zeros(vocab_size, dtype=torch.int64, device=device)
        self._names[self._ours] = self._theirs

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        keep = rows.tolist()
        self._state.select(rows)
        self._texts = [self._texts[row] for row in keep]
        self._seen = [self._seen[row] for row in keep]
        self._read = [self._read[row] for row in keep]
        self._root = self._root[rows]

    def follow(self, tokens: Tensor, lengths: Tensor, given: Sequence[int] = ()) -> Tensor | None:
        """Read what is new in the rows' texts, and give the law [B, V] after each.

        Returns:
            None where the draft has no room for a text.
        """
        wanted, kept = [], []
        for row, length in enumerate(lengths.tolist()):
            self._texts[row] += tokens[row, self._seen[row] : length].tolist()
            self._seen[row] = length
            wanted.append(self._translation.read(self._texts[row]))
            # The last token is read again in any case: its law is asked for.
            kept.append(_num_common(self._read[row], wanted[row][:-1]))
        fresh = [text[start:] for text, start in zip(wanted, kept, strict=True)]
        num = max(map(len, fresh))
        if max(kept) + num + LARGEST_TREE > self._state.cache.capacity:
            return None
        self._state.rewind_to(kept)
        device = tokens.device
        fed = torch.tensor([text + text[-1:] * (num - len(text)) for text in fresh], device=device)
        counts = torch.tensor([len(text) for text in fresh], device=device)
        law = self._law(self._state.extend(fed))
        order = torch.arange(num, device=device).expand(len(fresh), num)
        self._state.commit(order, counts)
        self._read = wanted
        self._root = law.gather(1, (counts - 1)[:, None, None].expand(-1, 1, law.shape[2]))
        return self._root[:, 0]

    def extend(self, fed: Tensor, tree: Topology | None = None) -> Tensor:
        """Laws [B, 1 + T, V] after the last known token and the candidates behind it.

        Args:
            fed: [B, 1 + T], the target's ids, the last known token first.
            tree: of these; None for a chain.
        """
        nodes = self._names[fed[:, 1:]]
        # A law of candidate 0, the last known token, has number 1.
        found = self._state.extend(nodes, None if tree is None else tree.laws[..., 1:] - 2)
        return torch.cat([self._root, self._law(found)], dim=1)

    def _law(self, logits: Tensor) -> Tensor:
        whole = logits.new_full((*logits.shape[:-1], self._vocab_size), float("-inf"))
        whole[..., self._ours] = logits[..., self._theirs]
        return self._shape(whole)
