"""Encoder-decoder models of transformers (T5, BART and their kin) behind the token model contract.

The prompt goes into the encoder; what is drawn are the decoder's tokens behind its start token. Rows keep
caches of transformers' own, one after another: such decoders count positions from the cache, so that
rows of different lengths and siblings of a tree cannot share a pass. Candidates are chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import Conditions
from ..decoding.tree import check_path
from ..errors import InputError, StateError
from ..networks import CallsNetwork, bare
from .model import HFCausalLM, as_text_model
from .processors import Prefixes
from .state import check_numbers


def is_encoder_decoder(network: Any) -> bool:
    """Whether a network is an encoder-decoder model of transformers."""
    config = getattr(bare(network), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def decoder_start(network: Any) -> int:
    """The token that the decoder begins with.

    Raises:
        InputError: neither the generation config nor the config tells.
    """
    for config in (getattr(network, "generation_config", None), network.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            found = getattr(config, name, None)
            if isinstance(found, int):
                return found
    raise InputError(f"{type(network).__name__} has no decoder_start_token_id: expected one")


@dataclass(frozen=True)
class Seq2SeqSizes:
    """What a run has to know of an encoder-decoder model.

    Attributes:
        num_positions: of the decoder, its start token included; None where they are relative.
        num_source: positions of the encoder; None likewise.
        num_layers: of the decoder.
        hidden_size: of the decoder.
    """

    num_positions: int | None
    num_source: int | None
    num_layers: int
    hidden_size: int


class Seq2SeqLM(CallsNetwork):
    """An encoder-decoder model as a token model: conditions are the encoder's ids.

    Args:
        network: an encoder-decoder model of transformers with an output layer.
        num_tokens: new tokens that a state has room for.

    Raises:
        InputError: another network, or one without a start token for its decoder.
    """

    grid: tuple[int, int] | None = None
    takes_trees = False

    def __init__(self, network: Any, num_tokens: int) -> None:
        self.called = network
        if not is_encoder_decoder(network) or self.network.get_output_embeddings() is None:
            raise InputError(
                f"{type(self.network).__name__}: expected an encoder-decoder language model of "
                "transformers"
            )
        self.start_id = decoder_start(self.network)
        self.vocab_size: int = self.network.get_output_embeddings().weight.shape[0]
        self.num_tokens = num_tokens
        config = self.network.config
        # T5, whose positions are relative, has no such number.
        most = getattr(config, "max_position_embeddings", None)
        self.sizes = Seq2SeqSizes(most, most, config.num_hidden_layers, config.hidden_size)
        self.prefixes: Prefixes | None = None
        self.watched: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.get_output_embeddings().weight.device

    @property
    def cost_key(self) -> str:
        """What the cost of a pass depends on, apart from the machine."""
        return f"{type(self.network).__name__} {self.vocab_size} {self.network.dtype} {self.device}"

    def starts(self, num: int) -> list[Tensor]:
        """What stands before the first drawn token of each row, ids [1]."""
        return [torch.tensor([self.start_id], device=self.device)] * num

    def start(
        self, conditions: Conditions, guidance_scale: float = 1.0
    ) -> tuple[Seq2SeqState, Tensor]:
        """Read the prompts.

        Args:
            conditions: one per row, ids [L] of the encoder.
            guidance_scale: 1; such a model has no null condition.

        Returns:
            The state, and the logits [B, V] of the first new token.

        Raises:
            InputError: an empty prompt, an id out of range, or guidance.
        """
        if guidance_scale != 1.0:
            raise InputError(f"guidance_scale {guidance_scale}: a language model takes 1 only")
        prompts = []
        for row, condition in enumerate(conditions):
            ids = torch.as_tensor(condition, dtype=torch.int64, device=self.device)
            if ids.dim() != 1 or len(ids) == 0 or int(ids.min()) < 0:
                raise InputError(f"prompt {row} {tuple(ids.shape)}: expected at least one token id")
            if int(ids.max()) >= self.vocab_size:
                raise InputError(
                    f"prompt {row} holds the id {int(ids.max())}: expected 0..{self.vocab_size - 1}"
                )
            prompts.append(ids)
        state = Seq2SeqState(self, prompts)
        return state, state.first()

    def decode(self, tokens: Tensor) -> Tensor:
        """There are no images in a language model's tokens.

        Raises:
            InputError: always; decode the text with the tokenizer.
        """
        raise InputError("a language model's tokens are text: decode them with its tokenizer")


class Seq2SeqState:
    """Encoded prompts and committed tokens of B rows, and the candidates of the last call.

    Attributes:
        lengths: [B] int64, committed new tokens.
    """

    def __init__(self, model: Seq2SeqLM, prompts: Sequence[Tensor]) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        self.model = model
        self.allows_overrun = model.sizes.num_positions is None
        with torch.no_grad():
            encoder = model.network.get_encoder()
            self._encoded = [
                encoder(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]))
                for ids in prompts
            ]
        self._caches = [EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in prompts]
        self.lengths = torch.zeros(len(prompts), dtype=torch.int64, device=model.device)
        self._prefixes = model.prefixes
        self._fed: Tensor | None = None

    @torch.no_grad()
    def first(self) -> Tensor:
        """Logits [B, V] behind the start token, which is committed."""
        starts = torch.stack(self.model.starts(len(self._caches)))
        logits = torch.stack([self._run(row, ids) for row, ids in enumerate(starts)])
        check_numbers(logits)
        if self._prefixes is not None:
            logits = self._prefixes(logits, starts[:, :0], None)
        return logits[:, 0]

    def _run(self, row: int, tokens: Tensor) -> Tensor:
        """Logits [T, V] behind tokens [T] of a row, which its cache takes in."""
        encoded = self._encoded[row]
        source = encoded.last_hidden_state
        return self.model.called(
            encoder_outputs=encoded,
            attention_mask=source.new_ones(source.shape[:2], dtype=torch.int64),
            decoder_input_ids=tokens[None],
            cache=self._caches[row],
            use_cache=True,
        ).logits[0]

    @torch.no_grad()
    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of what follows each candidate of a chain.

        Candidates of an earlier call that were not kept are forgotten.

        Raises:
            InputError: candidates that branch, or logits that are not numbers.
        """
        chain = torch.arange(-1, tokens.shape[1] - 1)
        if parents is not None and not bool((parents.cpu() == chain).all()):
            raise InputError(
                "an encoder-decoder model takes chains of candidates, and these branch: expected "
                "parents -1, 0, 1, ... or None"
            )
        self._drop([0] * len(self._caches))
        logits = torch.stack([self._run(row, ids) for row, ids in enumerate(tokens)])
        check_numbers(logits)
        self._fed = tokens
        return logits if self._prefixes is None else self._prefixes(logits, tokens, None)

    def _drop(self, kept: Sequence[int]) -> None:
        """Forget all candidates of each row but the first ones."""
        if self._fed is not None:
            for cache, count in zip(self._caches, kept, strict=True):
                cache.crop(count - self._fed.shape[1])
        self._fed = None

    def commit(self, kept: Tensor, counts: Tensor) -> None:
        """Keep the first `counts` [B] candidates of each row, which `kept` [B, K] must name.

        Raises:
            StateError: no candidates are pending, or others than the first ones.
        """
        if self._fed is None:
            raise StateError("commit without candidates: call extend first")
        check_path(kept, counts, None, self._fed.shape[1], len(self.lengths))
        self.advance(counts, counts.tolist())

    def advance(self, counts: Tensor, given: Sequence[int]) -> None:
        """Keep the first candidates of each row of a chain; see `arvision.contracts.Advances`."""
        if self._fed is None:
            raise StateError("advance without candidates: call extend first")
        if self._prefixes is not None:
            every = torch.arange(self._fed.shape[1], device=counts.device)
            self._prefixes.commit(self._fed, every.expand_as(self._fed), given)
        self._drop(given)
        self.lengths = self.lengths + counts

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows` [B'] and drop the others."""
        keep = rows.tolist()
        self._encoded = [self._encoded[row] for row in keep]
        self._caches = [self._caches[row] for row in keep]
        self.lengths = self.lengths[rows]
        self._fed = None if self._fed is None else self._fed[rows]
        if self._prefixes is not None:
            self._prefixes.select(rows)


def as_generator(model: Any, num_tokens: int) -> Any:
    """`model` with room for `num_tokens`: causal, or an encoder with a decoder."""
    network = model.called if isinstance(model, HFCausalLM | Seq2SeqLM) else model
    if is_encoder_decoder(network):
        return Seq2SeqLM(network, num_tokens)
    return as_text_model(model, num_tokens)
