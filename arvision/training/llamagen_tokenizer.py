"""Training objectives of a VQ tokenizer: a codebook that follows its codes, on the unit sphere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import in_batches, pixel_loss, to_pixels
from .loop import Chance, Objective
from .processes import of_all, take_first


class CodebookObjective(Objective):
    """A codebook that follows, by exponential averages, what it is asked to code.

    A subclass puts `_last`, what was asked [M, D] and the codes given [M], in its forward pass. Codes
    that hardly any position uses restart on what the current batch asked for. Processes that share a
    batch pool what they asked, so that their codebooks stay one.

    Args:
        tokenizer: the model to train, with `quantize.embedding`; its codebook gets no gradient.
        images: see `arvision.training.data.to_pixels`.
        unquantised_steps: steps before the codebook is switched on.
        decay: of the exponential averages.
        commitment: weight of the distance between an encoder output and its code.
        restart_below: expected uses per batch under which a code restarts.

    Paper: van den Oord et al., "Neural Discrete Representation Learning", 2017, appendix A.1.
    """

    def __init__(
        self,
        tokenizer: Any,
        images: Tensor,
        *,
        unquantised_steps: int = 150,
        decay: float = 0.99,
        commitment: float = 0.25,
        restart_below: float = 0.1,
    ) -> None:
        super().__init__()
        self.uses: Tensor
        self.sums: Tensor
        self.steps_done: Tensor
        self.tokenizer, self.images = tokenizer, images
        self.num_items = len(images)
        self.unquantised_steps, self.decay = unquantised_steps, decay
        self.commitment, self.restart_below = commitment, restart_below
        codebook = tokenizer.quantize.embedding.weight
        codebook.requires_grad_(False)
        self.register_buffer("uses", torch.ones(len(codebook)))
        self.register_buffer("sums", torch.zeros_like(codebook))
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))
        self._last: tuple[Tensor, Tensor] | None = None

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures."""
        return {"images": self.images[indices]}

    def codes(self) -> Tensor:
        """The codebook [V, D] that the averages stand for: the mean of what each code was given."""
        return self.sums / self.uses[:, None]

    @torch.no_grad()
    def _begin(self, codes: Tensor, uses: Tensor) -> None:
        """Switch the codebook on: codes [V, D] and their uses [V], the first process's for all."""
        codebook = self.tokenizer.quantize.embedding.weight
        codebook.copy_(codes)
        self.uses.copy_(uses)
        take_first(codebook, self.uses)
        self.sums.copy_(codebook * self.uses[:, None])

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the codebook after what the step asked for."""
        self.steps_done += 1
        if self._last is None:
            return
        asked, chosen = (of_all(part) for part in self._last)
        one_hot = F.one_hot(chosen, len(self.uses)).to(asked.dtype)
        self.uses.lerp_(one_hot.sum(0), 1 - self.decay)
        self.sums.lerp_(one_hot.T @ asked, 1 - self.decay)
        dead = (self.uses < self.restart_below).nonzero().squeeze(1)
        if len(dead):
            generator = torch.Generator().manual_seed(step)
            picks = torch.randint(len(asked), (len(dead),), generator=generator)
            self.sums[dead], self.uses[dead] = asked[picks.to(asked.device)], 1.0
        self.tokenizer.quantize.embedding.weight.copy_(self.codes())
        self._last = None


class TokenizerObjective(CodebookObjective):
    """Reconstruction through an L2-normalised codebook that follows its codes.

    Arguments as `CodebookObjective`, of a `LlamaGenTokenizer`. The first `unquantised_steps` train a
    plain autoencoder on the unit sphere; then the codebook is set by k-means on encoder outputs and
    follows them.

    Paper: van den Oord et al., "Neural Discrete Representation Learning", 2017, appendix A.1 (EMA
    codebook); Yu et al., "Vector-quantized Image Modeling with Improved VQGAN", 2022, section 3.2
    (normalised codes).
    """

    def codes(self) -> Tensor:
        """The codebook [V, D] that the averages stand for: directions."""
        return F.normalize(self.sums, dim=-1)

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Loss, PSNR in dB and code usage."""
        pixels = to_pixels(inputs["images"])
        z = F.normalize(self.tokenizer.pre_quant(pixels).float(), dim=1)
        flat = z.detach().permute(0, 2, 3, 1).flatten(0, 2)
        step = int(self.steps_done)
        if step == self.unquantised_steps:
            self._initialise(of_all(flat), chance)
        if step < self.unquantised_steps:
            out, commitment = self.tokenizer.decode_codes(z), z.new_zeros(())
        else:
            chosen = self.tokenizer.quantize.nearest(flat)
            codes = self.tokenizer.quantize.codes()[chosen]
            quantised = codes.view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
            commitment = F.mse_loss(z, quantised)
            out = self.tokenizer.decode_codes(z + (quantised - z).detach())
            self._last = (flat, chosen)
        loss, error = pixel_loss(out, pixels, inputs["images"])
        loss = loss + self.commitment * commitment
        return {
            "loss": loss,
            "psnr": 10 * torch.log10(4.0 / error.detach()),
            "codes_used": (self.uses > 0.5).sum(),
        }

    @torch.no_grad()
    def _initialise(self, flat: Tensor, chance: Chance) -> None:
        """Ten rounds of spherical k-means on the outputs of one batch."""
        size = len(self.uses)
        centres = flat[chance.randint(len(flat), size)]
        for _ in range(10):
            one_hot = F.one_hot((flat @ centres.T).argmax(-1), size).to(flat.dtype)
            sums, counts = one_hot.T @ flat, one_hot.sum(0)
            centres = torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), centres)
        self._begin(centres, counts.clamp(min=1.0))


@torch.no_grad()
def encode_all(tokenizer: Any, images: Tensor) -> Tensor:
    """Code indices [M, N] that a discrete tokenizer gives for images, see `to_pixels`."""
    tokenizer.eval()
    return torch.cat([tokenizer.encode(to_pixels(part)) for part in in_batches(images)])
