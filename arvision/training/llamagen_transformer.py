"""Training objectives of a LlamaGen transformer on the codes of a data set."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decoding.logits import Shaping
from ..models.llamagen.transformer import LlamaGenTransformer
from .loop import Chance, Objective


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

    def describe(self, indices: Tensor, generator: torch.Generator) -> Any:
        """What samples are described by, on the CPU: classes [B] here, captions in a subclass."""
        return self.labels[indices]

    def encode(self, described: Any) -> tuple[Tensor, Tensor | None]:
        """What a transformer embeds as conditions, and the mask of rows that count (or None).

        Classes [B] here; a subclass may give features [B, P, C'] and a mask [B, P].
        """
        return described, None

    @staticmethod
    def rows(transformer: LlamaGenTransformer, described: Tensor, null: Tensor) -> Tensor:
        """Conditioning rows [B, P, C] of a transformer, the null ones where `null` [B] is true."""
        num_classes = transformer.config["num_classes"]
        return transformer.cls_embedding(described.masked_fill(null, num_classes))

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Tokens, what describes them, and which are trained with the null condition."""
        described = self.describe(indices, generator)
        null = torch.rand(len(indices), generator=generator) < self.condition_dropout
        return {"tokens": self.tokens[indices], "described": described, "null": null}

    def loss(self, inputs: dict[str, Any], chance: Chance) -> dict[str, Tensor]:
        """Mean loss in nats per token."""
        tokens = inputs["tokens"]
        encoded, valid = self.encode(inputs["described"])
        rows = self.rows(self.transformer, encoded, inputs["null"])
        context = tokens
        if self.context_noise > 0:
            with torch.no_grad():
                logits = self.transformer.teacher_forced(rows, tokens, valid)
            context = with_draws(tokens, logits, self.context_noise, chance)
        logits = self.transformer.teacher_forced(rows, context, valid)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), tokens.flatten())}


def with_draws(tokens: Tensor, logits: Tensor, context_noise: float, chance: Chance) -> Tensor:
    """Tokens [B, N] of which a share, another one for each sample, is drawn from `logits`.

    Args:
        tokens: [B, N].
        logits: [B, N, V].
        context_noise: mean share, at most 0.5.
        chance: of the draws.
    """
    draws = chance.pick(logits.softmax(-1))
    share = 2 * context_noise * chance.rand(len(tokens), 1)
    return torch.where(chance.rand(*tokens.shape) < share, draws, tokens)


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

    def describe(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Ids and mask [B, P] of freshly written captions."""
        batch = self.text_tokenizer(
            [self.write_caption(index, generator) for index in indices.tolist()],
            max_length=self.transformer.config["caption_length"],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def encode(self, described: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Features [B, P, C'] of captions, padded on the left, and their mask [B, P] bool."""
        mask = described["attention_mask"]
        features = self.text_encoder(**described).last_hidden_state
        return pad_left(features * mask[..., None].to(features.dtype), mask.bool())

    @staticmethod
    def rows(transformer: LlamaGenTransformer, described: Tensor, null: Tensor) -> Tensor:
        """Conditioning rows [B, P, C] of a transformer, the null ones where `null` [B] is true."""
        uncond = transformer.cls_embedding.uncond_embedding.expand_as(described)
        features = torch.where(null[:, None, None], uncond.to(described.dtype), described)
        return transformer.cls_embedding(features)


class ConsistencyObjective(Objective):
    """Keep a model's guided law, and give the same law when some context tokens are wrong.

    KL(teacher given the true tokens || model given the true tokens), plus the same with a share of
    the context drawn from the teacher. The teacher is the model as it was when the stage began, and
    both laws are the guided ones that samplers draw from. A speculative sampler judges each guess
    by a law whose context contains guesses, so the less a law depends on a single token of its
    context, the more guesses stay.

    Args:
        base: data and conditions; its transformer is trained, a text encoder is not.
        guidance_scale: of both laws.
        context_noise: mean share of context tokens that the teacher draws.
    """

    def __init__(
        self, base: ClassObjective, guidance_scale: float, context_noise: float = 0.3
    ) -> None:
        super().__init__()
        self.base, self.num_items = base, base.num_items
        self.guidance_scale, self.context_noise = guidance_scale, context_noise
        self.teacher = copy.deepcopy(base.transformer).requires_grad_(False)
        for name, part in base.named_children():
            part.requires_grad_(name == "transformer")

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Tokens, and what describes them."""
        described = self.base.describe(indices, generator)
        return {"tokens": self.base.tokens[indices], "described": described}

    def loss(self, inputs: dict[str, Any], chance: Chance) -> dict[str, Tensor]:
        """Mean divergences in nats per token, and their total variation.

        "variation" is that between the model's laws with and without wrong tokens: one minus it is
        the chance that a guess stays under maximal coupling.
        """
        tokens = inputs["tokens"]
        with torch.no_grad():
            described, valid = self.base.encode(inputs["described"])
            goal = self._law(self.teacher, described, valid, tokens)
            noisy = with_draws(tokens, goal, self.context_noise, chance)
        clean_law = self._law(self.base.transformer, described, valid, tokens)
        noisy_law = self._law(self.base.transformer, described, valid, noisy)
        clean, wrong = (
            (goal.exp() * (goal - law)).sum(-1).mean() for law in (clean_law, noisy_law)
        )
        variation = 0.5 * (clean_law.exp() - noisy_law.exp()).abs().sum(-1).mean()
        return {"loss": clean + wrong, "clean": clean, "noisy": wrong, "variation": variation}

    def _law(
        self, network: LlamaGenTransformer, described: Tensor, valid: Tensor | None, tokens: Tensor
    ) -> Tensor:
        """Guided log-probabilities [B, N, V] of the tokens, teacher forced."""
        twice = torch.cat([described, described])
        is_null = torch.arange(len(twice), device=twice.device) >= len(described)
        mask = None if valid is None else torch.cat([valid, valid])
        rows = self.base.rows(network, twice, is_null)
        logits = network.teacher_forced(rows, torch.cat([tokens, tokens]), mask)
        conditional, null = logits.chunk(2)
        return Shaping()(conditional, null, self.guidance_scale)


def pad_left(features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Move the valid rows of right-padded [B, L, C] features to the right end."""
    shift = valid.shape[1] - valid.sum(1)
    index = (torch.arange(valid.shape[1], device=valid.device) - shift[:, None]) % valid.shape[1]
    return features.gather(1, index[..., None].expand_as(features)), valid.gather(1, index)
