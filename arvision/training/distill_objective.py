"""Distilled Decoding: a student learns what its teacher would make of the noise.

Paper: Liu et al., "Distilled Decoding 1: One-step Sampling of Image Auto-regressive Models with Flow
Matching", 2024, section 3.3. Its training code, loss weights and optimiser are unpublished; those here
are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loop import Chance, Objective, full_precision
from .pairs import Pairs, pair_noise


class PictureLoss:
    """Distance of two sets of vectors once they are decoded: of pixels, and of features of these.

    Args:
        decode: differentiable, vectors [B, N, D] to pixels [B, 3, H, W] in [-1, 1].
        features: pixels to features [B, F], frozen; None for pixels alone.
        num_images: of a batch that are decoded, the first ones; decoding is dear.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        features: Callable[[Tensor], Tensor] | None = None,
        num_images: int = 8,
    ) -> None:
        self.decode, self.features, self.num_images = decode, features, num_images

    def __call__(self, found: Tensor, goal: Tensor) -> Tensor:
        """Scalar distance of vectors [B, N, D] from those they should be."""
        pictures = self.decode(found[: self.num_images])
        with torch.no_grad():
            wanted = self.decode(goal[: self.num_images])
        loss = F.mse_loss(pictures, wanted)
        if self.features is not None:
            ours, theirs = self.features(pictures), self.features(wanted).detach()
            loss = loss + F.mse_loss(ours, theirs) / theirs.square().mean().clamp_min(1e-6)
        return loss


class Described:
    """What a student is told of numbered conditions.

    Args:
        model: a student, see `arvision.models.student.Student.describe`.
        conditions: classes or captions.
    """

    def __init__(self, model: Any, conditions: Sequence[Any]) -> None:
        self.model, self.conditions = model, conditions
        captions = getattr(model, "captions", None)
        self.beside = () if captions is None else (captions.text_encoder,)

    def __call__(self, labels: Tensor) -> tuple[Tensor, ...]:
        """Of the conditions with these numbers [B]."""
        with full_precision(labels.device):
            return self.model.describe(self.of(labels))

    def of(self, labels: Tensor) -> list[Any]:
        """The conditions with these numbers [B]."""
        return [self.conditions[label] for label in labels.tolist()]


class DistillObjective(Objective):
    """Cross-entropy on the teacher's tokens, from all noise and from the codes of the first ones.

    For each sample one of the student's timesteps is drawn.

    Args:
        model: a student in training, see `arvision.contracts.StudentModel`; its `transformer` takes
            `(condition, vectors [B, N, D], known units [B])` to logits and vectors.
        pairs: of the teacher.
        conditions: of the pairs.
        seed: of the pairs' noise.
        vector_weight: of the squared error of the predicted vectors, per number, in units of the
            codebook's variance.
        picture: a further loss through the decoder.
        picture_weight: of it.
    """

    def __init__(
        self,
        model: Any,
        pairs: Pairs,
        conditions: Sequence[Any],
        seed: int,
        vector_weight: float = 0.1,
        picture: PictureLoss | None = None,
        picture_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.student: nn.Module = model.transformer
        self.pairs, self.seed = pairs, seed
        self.described = Described(model, conditions)
        self.beside = self.described.beside
        self.num_items = len(pairs.tokens)
        self.timesteps = torch.tensor(model.timesteps)
        self.ends = torch.tensor((0, *model.unit_ends))
        self.vector_weight, self.picture, self.picture_weight = (
            vector_weight,
            picture,
            picture_weight,
        )
        self.codes = model.codebook.float().cpu()
        self.variance = float(self.codes.var(0, correction=0).mean())

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """What the student is given, and what it should make of it."""
        tokens = self.pairs.tokens[indices]
        noise = pair_noise(self.seed, indices, tokens.shape[1], self.codes.shape[1])
        chosen = torch.randint(len(self.timesteps), (len(indices),), generator=generator)
        known = self.timesteps[chosen]
        codes = self.codes[tokens]
        is_known = torch.arange(tokens.shape[1]) < self.ends[known][:, None]
        given = torch.where(is_known[..., None], codes, noise)
        asked = {"labels": self.pairs.labels[indices], "given": given, "known": known}
        return asked | {"tokens": tokens, "codes": codes, "is_known": is_known}

    def loss(self, inputs: dict[str, Any], chance: Chance) -> dict[str, Tensor]:
        """Loss, and the share of tokens that are the teacher's."""
        tokens, codes, is_known = (inputs[name] for name in ("tokens", "codes", "is_known"))
        known = inputs["known"]
        condition, *mask = self.described(inputs["labels"])
        logits, vectors = self.student(condition, inputs["given"], known, *mask)
        right = (logits.argmax(-1) == tokens).float()
        error = (vectors - codes)[~is_known].square().mean() / self.variance
        loss = F.cross_entropy(logits[~is_known], tokens[~is_known]) + self.vector_weight * error
        from_noise = (known == 0)[:, None].expand_as(is_known)
        figures = {
            "agreement": _mean(right, from_noise),
            "agreement_known": _mean(right, ~from_noise & ~is_known),
            "error": error,
        }
        if self.picture is not None:
            mixed = torch.where(is_known[..., None], codes, vectors)
            figures["picture"] = self.picture(mixed, codes)
            loss = loss + self.picture_weight * figures["picture"]
        return {"loss": loss, **figures}


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return values[chosen].mean() if bool(chosen.any()) else values.new_tensor(float("nan"))


@torch.no_grad()
def agreement(
    model: Any,
    pairs: Pairs,
    conditions: Sequence[Any],
    images: Tensor,
    seed: int,
    known: int = 0,
    batch_size: int = 250,
) -> Tensor:
    """Share of images [N] (float64, by position) whose token is the teacher's for the same noise.

    Args:
        model: a student.
        pairs: of the teacher.
        conditions: of the pairs.
        images: [M] int64, which pairs to look at; those that no student was trained on.
        seed: of the pairs' noise.
        known: units taken from the teacher; these count as equal.
        batch_size: images per pass.
    """
    total = torch.zeros(pairs.tokens.shape[1], dtype=torch.float64)
    codes = model.codebook.float().cpu()
    end = (0, *model.unit_ends)[known]
    for part in images.split(batch_size):
        tokens, asked = pairs.tokens[part], [conditions[k] for k in pairs.labels[part].tolist()]
        vectors = pair_noise(seed, part, tokens.shape[1], codes.shape[1])
        vectors[:, :end] = codes[tokens[:, :end]]
        logits, _ = model.predict(asked, vectors.to(model.device), known)
        guess = logits.argmax(-1).cpu()
        guess[:, :end] = tokens[:, :end]
        total += (guess == tokens).double().sum(0)
    return total / len(images)
