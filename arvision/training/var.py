"""Training objectives of VAR: its multi-scale tokenizer, and its transformer on a data set."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..models.var.tokenizer import VARTokenizer
from ..models.var.transformer import VARTransformer
from .data import pixel_loss, to_pixels
from .llamagen_tokenizer import CodebookObjective
from .loop import Chance, Objective, full_precision


class VARTokenizerObjective(CodebookObjective):
    """Reconstruction through residual codes of every scale, with a codebook that follows them.

    Arguments as `CodebookObjective`, of a `VARTokenizer`; `commitment` weighs the features' distance
    to the canvas. The first `unquantised_steps` train a plain autoencoder; then the codebook is set
    to features seen at all scales and follows the residuals it is asked to code. The smoothing
    convolutions are trained by the distance between canvas and features after each scale, as in the
    paper.

    Paper: Tian et al., "Visual Autoregressive Modeling", 2024, algorithm 1 and equation 5; van den
    Oord et al., "Neural Discrete Representation Learning", 2017, appendix A.1 (averages).
    """

    uses_all = False  # the convolutions wait for the codebook

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Loss, PSNR in dB and code usage."""
        pixels = to_pixels(inputs["images"])
        features = self.tokenizer.pre_quant(pixels).float()
        step = int(self.steps_done)
        if step == self.unquantised_steps:
            self._initialise(features.detach(), chance)
        distance = features.new_zeros(())
        fed = features
        if step >= self.unquantised_steps:
            with full_precision(features.device):
                canvas, distance = self._quantise(features)
            fed = features + (canvas - features).detach()
        out = self.tokenizer.paint(fed)
        loss, error = pixel_loss(out.float(), pixels, inputs["images"])
        loss = loss + distance
        return {
            "loss": loss,
            "psnr": 10 * torch.log10(4.0 / error.detach()),
            "codes_used": (self.uses > 0.5).sum(),
        }

    def _quantise(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The canvas [B, D, P, P], and the mean over scales of its distance to the features."""
        quantize = self.tokenizer.quantize
        painter, still = quantize.painter(), features.detach()
        canvas = painter.blank(len(features))
        distance = features.new_zeros(())
        asked, given = [], []
        for scale in range(len(quantize.scales)):
            rest = painter.view(still - canvas.detach(), scale)
            chosen = quantize.nearest(rest)
            canvas = painter.paint(canvas, painter.codes[chosen], scale)
            distance = distance + F.mse_loss(canvas, still)
            distance = distance + self.commitment * F.mse_loss(canvas.detach(), features)
            asked.append(rest.flatten(0, 1))
            given.append(chosen.flatten())
        self._last = torch.cat(asked), torch.cat(given)
        return canvas, distance / len(quantize.scales)

    @torch.no_grad()
    def _initialise(self, features: Tensor, chance: Chance) -> None:
        """Set the codes to random features of random scales, shrunk towards zero at random.

        Residuals are smaller than features, hence the shrinking.
        """
        quantize = self.tokenizer.quantize
        painter = quantize.painter()
        seen = torch.cat(
            [painter.view(features, k).flatten(0, 1) for k in range(len(quantize.scales))]
        )
        size = len(self.uses)
        picks, shrink = chance.randint(len(seen), size), chance.rand(size, 1)
        self._begin(seen[picks] * shrink, torch.ones(size))


class VARClassObjective(Objective):
    """Cross-entropy of every token given its class and all coarser scales.

    Args:
        transformer: a class-conditional model.
        tokenizer: gives the views of the canvas; it is not trained.
        tokens: [M, L] codes of the training images.
        labels: [M] classes.
        condition_dropout: share of samples trained with the null class, for guidance.
    """

    def __init__(
        self,
        transformer: VARTransformer,
        tokenizer: VARTokenizer,
        tokens: Tensor,
        labels: Tensor,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.transformer, self.tokens, self.labels = transformer, tokens, labels
        self.num_items = len(tokens)
        self.condition_dropout = condition_dropout
        self.beside = (tokenizer.eval(),)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Tokens, and classes of which some are the null one."""
        labels = self.labels[indices]
        null = torch.rand(len(labels), generator=generator) < self.condition_dropout
        labels = labels.masked_fill(null, self.transformer.config["num_classes"])
        return {"tokens": self.tokens[indices], "labels": labels}

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Mean loss in nats per token, and that of the finest scale."""
        tokens, labels = inputs["tokens"], inputs["labels"]
        with full_precision(tokens.device):
            tokenizer: Any = self.beside[0]
            views = tokenizer.views(tokens)
        # The plain form trains faster on a CPU than the fused one, whose backward pass is slow.
        with sdpa_kernel(SDPBackend.MATH):
            logits = self.transformer.teacher_forced(labels, views)
        losses = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        finest = losses[:, -(self.transformer.scales[-1] ** 2) :]
        return {"loss": losses.mean(), "finest": finest.mean()}
