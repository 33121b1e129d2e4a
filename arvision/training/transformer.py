"""Training objective of a LlamaGen transformer on the codes of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.llamagen.transformer import LlamaGenTransformer
from .loop import Objective


class ClassObjective(Objective):
    """Next-token cross-entropy given a class.

    Args:
        transformer: a class-conditional model.
        tokens: [M, N] codes of the training images.
        labels: [M] classes.
        condition_dropout: share of samples trained with the null class, for guidance.
        context_noise: mean share of context tokens that are replaced by the model's own draws. It
            teaches the model not to lean on a single token, so that speculative samplers, whose
            guesses are such draws, are right more often.
    """

    def __init__(
        self,
        transformer: LlamaGenTransformer,
        tokens: Tensor,
        labels: Tensor,
        condition_dropout: float = 0.1,
        context_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.transformer, self.tokens, self.labels = transformer, tokens, labels
        self.num_items = len(tokens)
        self.condition_dropout, self.context_noise = condition_dropout, context_noise

    def conditions(
        self, indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Conditioning rows [B, P, C] and the mask of the ones that count [B, P] (or None)."""
        labels = self.labels[indices]
        null = torch.rand(len(labels), generator=generator) < self.condition_dropout
        num_classes = self.transformer.config["num_classes"]
        return self.transformer.cls_embedding(labels.masked_fill(null, num_classes)), None

    def forward(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Mean loss in nats per token of the samples `indices`."""
        tokens = self.tokens[indices]
        rows, valid = self.conditions(indices, generator)
        context = tokens
        if self.context_noise > 0:
            context = self._with_own_draws(tokens, rows, valid, generator)
        logits = self.transformer.teacher_forced(rows, context, valid)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), tokens.flatten())}

    @torch.no_grad()
    def _with_own_draws(
        self, tokens: Tensor, rows: Tensor, valid: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """Tokens [B, N] of which a share, another one for each sample, is drawn by the model."""
        laws = self.transformer.teacher_forced(rows, tokens, valid).softmax(-1)
        draws = torch.multinomial(laws.flatten(0, 1), 1, generator=generator).view_as(tokens)
        share = 2 * self.context_noise * torch.rand(len(tokens), 1, generator=generator)
        replaced = torch.rand(tokens.shape, generator=generator) < share
        return torch.where(replaced, draws, tokens)


class CaptionObjective(ClassObjective):
    """Next-token cross-entropy given a caption; trains the text encoder along with the model.

    Args:
        transformer: a text-conditional model.
        tokens: [M, N] codes of the training images.
        write_caption: (index of an image, generator) to a caption.
        text_encoder: T5-style encoder, token ids and mask to `last_hidden_state`.
        text_tokenizer: of the encoder.
        condition_dropout: share of samples trained with the null caption.
    """

    def __init__(
        self,
        transformer: LlamaGenTransformer,
        tokens: Tensor,
        write_caption: Any,
        text_encoder: nn.Module,
        text_tokenizer: Any,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__(transformer, tokens, torch.empty(0), condition_dropout)
        self.write_caption = write_caption
        self.text_encoder, self.text_tokenizer = text_encoder, text_tokenizer

    def conditions(
        self, indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Conditioning rows of freshly written captions, padded on the left."""
        captions = [self.write_caption(index, generator) for index in indices.tolist()]
        features, valid = encode_captions(
            captions,
            self.text_encoder,
            self.text_tokenizer,
            self.transformer.config["caption_length"],
        )
        null = torch.rand(len(captions), generator=generator) < self.condition_dropout
        uncond = self.transformer.cls_embedding.uncond_embedding.expand_as(features)
        features = torch.where(null[:, None, None], uncond.to(features.dtype), features)
        return self.transformer.cls_embedding(features), valid


def encode_captions(
    captions: Sequence[str], text_encoder: nn.Module, text_tokenizer: Any, length: int
) -> tuple[Tensor, Tensor]:
    """Captions to left-padded features [B, length, C] and their mask [B, length] bool."""
    batch = text_tokenizer(
        list(captions),
        max_length=length,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    mask = batch["attention_mask"]
    features = text_encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    return pad_left(features * mask[..., None].to(features.dtype), mask.bool())


def pad_left(features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Move the valid rows of right-padded [B, L, C] features to the right end."""
    shift = valid.shape[1] - valid.sum(1)
    index = (torch.arange(valid.shape[1], device=valid.device) - shift[:, None]) % valid.shape[1]
    return features.gather(1, index[..., None].expand_as(features)), valid.gather(1, index)
