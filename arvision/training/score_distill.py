"""One-step score distillation: a student learns its teacher's law from the teacher's scores, without pairs.

Behind given tokens the teacher's law of the next code is a finite mixture, so the denoised mean of a
noisy code under it is known in closed form. A second network, the guidance network, learns the
same for the student's own codes; the student moves to where the two agree.

Paper: Liu et al., "Distilled Decoding 2: One-step Sampling of Image Auto-regressive Models with
Conditional Score Distillation", 2025, sections 3-4; the loss is that of Zhou et al., "Score identity
Distillation", 2024, with alpha 1. Its code is unpublished. As there the guidance network is a copy of
the teacher, trained as a whole, with a small head in the place of its last layer; here it can also be
that head alone on features that stay the teacher's. The student starts from a trained one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..contracts import ScaleModel
from ..decoding.logits import Shaping
from ..decoding.student import nearest_code
from ..decoding.teacher_forcing import teacher_forced
from ..models.latent_head import HeadNetwork
from ..networks import bare
from .distill_objective import Described
from .loop import Chance, Objective, full_precision
from .pairs import pair_noise


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Settings of `ScoreObjective`.

    Attributes:
        warmup: first steps, in which the guidance network learns the teacher's own scores and the
            student rests; `arvision distill` takes a quarter of the steps at most.
        guidance_updates: updates of the guidance network for one of the student (5 in the paper).
        student_rate: learning rate of the student, as a share of the guidance network's.
        width, depth: of the guidance network's blocks.
        trains_features: whether a copy of the teacher learns along beneath the head, as in the paper;
            false for a head on the teacher's own features, which costs a third less.
        feature_rate: learning rate of that copy, as a share of the head's.
    """

    warmup: int = 200
    guidance_updates: int = 5
    student_rate: float = 0.1
    width: int = 256
    depth: int = 3
    trains_features: bool = True
    feature_rate: float = 0.1


class TeacherScores:
    """A teacher's laws and features behind given tokens.

    Args:
        model: a token or scale model with a codebook.
        shaping: from guided logits to laws.
        guidance_scale: of the teacher.
        conditions: classes or captions, which are told by their numbers.
    """

    def __init__(
        self, model: Any, shaping: Shaping, guidance_scale: float, conditions: Sequence[Any]
    ) -> None:
        self.model, self.shaping, self.guidance_scale = model, shaping, guidance_scale
        self.conditions = conditions
        network = model.transformer
        self._output: nn.Module = network.output if hasattr(network, "output") else network.head
        self.feature_dim: int = network.config["hidden_size"]

    @torch.no_grad()
    def __call__(self, labels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, N, V] of each token behind the ones before, features [B, N, C]."""
        seen: list[Tensor] = []
        hook = self._output.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            logits = self._logits([self.conditions[k] for k in labels.tolist()], tokens)
        finally:
            hook.remove()
        features = torch.cat([part.view(len(part), -1, part.shape[-1]) for part in seen], dim=1)
        return self.shaping(logits.float()), features[: len(labels)].float()

    def _logits(self, conditions: list[Any], tokens: Tensor) -> Tensor:
        if not isinstance(self.model, ScaleModel):
            return teacher_forced(self.model, conditions, tokens, self.guidance_scale)
        scales: Any = self.model.start(conditions, self.guidance_scale)
        parts, begin = [], 0
        while begin < tokens.shape[1]:
            parts.append(scales.next())
            end = begin + parts[-1].shape[1]
            scales.feed(tokens[:, begin:end])
            begin = end
        return torch.cat(parts, dim=1)


class TrainedFeatures(nn.Module):
    """A copy of the teacher's network that learns along; features behind given tokens.

    Args:
        model: the teacher, a token or scale model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.network = copy.deepcopy(bare(model.transformer)).float().requires_grad_(True)
        self._output: nn.Module = (
            self.network.output if hasattr(self.network, "output") else self.network.head
        ).requires_grad_(False)
        is_scale = isinstance(model, ScaleModel)
        tokenizer: Any = getattr(model, "tokenizer", None)
        self._views = tokenizer.views if is_scale else None

    def forward(self, tokens: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features [B, N, C] of tokens [B, N]; `condition` and `mask` are what a student is told."""
        seen: list[Tensor] = []
        hook = self._output.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            if self._views is not None:
                self.network.teacher_forced(condition, self._views(tokens))
            else:
                self.network.teacher_forced(self.network.cls_embedding(condition), tokens, mask)
        finally:
            hook.remove()
        return seen[0]


def denoised_mean(logp: Tensor, codes: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """E[c | x] [..., D] for x = (1 - t) c + t e, e standard normal, c a code with law `logp`.

    Args:
        logp: [..., V]; -inf for codes that never come.
        codes: [V, D].
        x: [..., D].
        t: [...] in (0, 1).
    """
    keep = (1 - t)[..., None]
    exponent = keep * (x @ codes.T) - 0.5 * keep.square() * codes.square().sum(-1)
    return (logp + exponent / t[..., None].square()).softmax(-1) @ codes


class ScoreObjective(Objective):
    """Losses of the guidance network and, every so often, of the student.

    Args:
        student: `(condition, noise [B, N, D], known [B], ...)` to logits and vectors [B, N, D].
        scores: `(labels, tokens)` to laws and features, see `TeacherScores`.
        codes: [V, D].
        sizes: numbers of tokens, conditions and features.
        settings: see `ScoreSettings`.
        seed: of the student's noise; image k has the identity (seed, k).
        described: what the student is told of the labels; None for the labels themselves.
        trunk: learns along beneath the guidance network's head; None for the features of `scores`.
    """

    uses_all = False

    codes: Tensor
    steps_done: Tensor
    num_items = 1 << 17
    """Identities; the noise of each is computed, none is stored."""

    def __init__(
        self,
        student: nn.Module,
        scores: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        codes: Tensor,
        sizes: tuple[int, int, int],
        settings: ScoreSettings,
        seed: int = 1,
        described: Described | None = None,
        trunk: TrainedFeatures | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.student, self.scores, self.settings, self.seed = student, scores, settings, seed
        self.num_tokens, self.num_conditions, feature_dim = sizes
        self.described = described
        self.beside = () if described is None else described.beside
        self.register_buffer("codes", codes.float(), persistent=False)
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))
        self.guidance = HeadNetwork(codes.shape[1], feature_dim, settings.width, settings.depth)
        self._spread = float(codes.float().var(0, correction=0).mean().sqrt())

    def rate_share(self, name: str) -> float:
        """Learning rate of a parameter, as a share of the run's."""
        shares = {"student": self.settings.student_rate, "trunk": self.settings.feature_rate}
        return shares.get(name.split(".")[0], 1.0)

    def after_step(self, step: int) -> None:
        """Remember how far the run is."""
        self.steps_done.fill_(step + 1)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """A condition and noise of its own for each image."""
        noise = pair_noise(self.seed, indices, self.num_tokens, self.codes.shape[1])
        return {"labels": indices % self.num_conditions, "noise": noise}

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Losses of the guidance network and, where it is its turn, of the student."""
        step, settings = int(self.steps_done), self.settings
        is_warm = step >= settings.warmup
        moves = is_warm and step % settings.guidance_updates == 0
        labels, noise = inputs["labels"], inputs["noise"]
        with torch.set_grad_enabled(moves):
            condition, *mask = (labels,) if self.described is None else self.described(labels)
            vectors = self.student(condition, noise, torch.zeros_like(labels), *mask)[1].float()
        tokens = nearest_code(vectors.detach(), self.codes)
        logp, features = self.scores(labels, tokens)
        if self.trunk is not None:
            features = self.trunk(tokens, condition, *mask).float()
        with full_precision(vectors.device):
            x, t = self._noisy(vectors.detach(), chance)
            goal = vectors.detach()
            if not is_warm:
                goal = denoised_mean(logp, self.codes, x, t)
            # In units of the velocity: small times do not count more than others.
            error = (self._guess(x, t, features) - goal) / t[..., None]
            loss = error.square().mean()
            figures = {"guidance": loss, "log_likelihood": log_likelihood(logp, tokens)}
            if moves:
                figures["student"] = self._student_loss(vectors, logp, features.detach(), chance)
                loss = loss + figures["student"]
        return {"loss": loss, **figures}

    def _student_loss(
        self, vectors: Tensor, logp: Tensor, features: Tensor, chance: Chance
    ) -> Tensor:
        """Score identity loss with alpha 1: (f_teacher - f_student) . (f_student - x)."""
        self.guidance.requires_grad_(False)
        x, t = self._noisy(vectors, chance)
        theirs = denoised_mean(logp, self.codes, x, t)
        ours = self._guess(x, t, features)
        self.guidance.requires_grad_(True)
        size = (theirs - vectors).detach().abs().mean(-1).clamp_min(1e-4)
        return (((theirs - ours) * (ours - vectors)).sum(-1) / size).mean()

    def _noisy(self, vectors: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
        """Vectors with noise, and how much: times spread evenly between code and noise."""
        share = chance.rand(*vectors.shape[:-1]).to(vectors).clamp(0.02, 0.98)
        t = share * self._spread / (share * self._spread + 1 - share)
        e = chance.randn(*vectors.shape).to(vectors)
        return (1 - t)[..., None] * vectors + t[..., None] * e, t

    def _guess(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """The guidance network's denoised mean, from the velocity e - c that it estimates."""
        flat = self.guidance(x.flatten(0, 1), 1000 * t.flatten(), features.flatten(0, 1))
        velocity = flat.view(*x.shape[:-1], -1)[..., : x.shape[-1]]
        return x - t[..., None] * velocity


def log_likelihood(logp: Tensor, tokens: Tensor) -> Tensor:
    """Mean over tokens [B, N] under a teacher's laws; what it never says counts as -20."""
    return logp.gather(-1, tokens[..., None])[..., 0].clamp_min(-20).mean()
