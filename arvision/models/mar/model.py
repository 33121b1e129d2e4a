"""MAR as a continuous model: conditions in, laws of latents and pixels out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import split_placement
from ...contracts import Conditions
from ...decoding.latents.schedule import Schedule
from ...decoding.logits import check_guidance_scale
from ...errors import InputError
from ...networks import enter, place_of
from ..conditions import null_classes, read_classes
from ..pixels import EncodesPixels
from .autoencoder import MARAutoencoder
from .convert import token_side
from .law import MARHead
from .state import MARState
from .transformer import MARTransformer


class MAR(EncodesPixels):
    """A MAR transformer with its autoencoder; see `arvision.contracts.ContinuousModel`.

    Args:
        transformer: the network with its diffusion head.
        tokenizer: the autoencoder; without one the model gives latents but not images.
        class_names: names of the classes, in the order of their ids.

    Raises:
        InputError: an autoencoder with other latents than the transformer was built for.

    Paper: Li et al., "Autoregressive Image Generation without Vector Quantization", 2024.
    """

    def __init__(
        self,
        transformer: MARTransformer,
        tokenizer: MARAutoencoder | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.transformer, self.tokenizer = transformer, tokenizer
        self.class_names = list(class_names or [])
        self.num_tokens = transformer.num_tokens
        self.latent_dim: int = transformer.config["latent_dim"]
        self.grid: tuple[int, int] = tuple(transformer.config["grid"])
        config = transformer.config
        schedule = Schedule(config["num_sampling_steps"], noisiest=config["noisiest"])
        run = partial(enter, transformer, "run_head")
        self.head = MARHead(transformer.diffloss.net, schedule, run)
        if tokenizer is not None and tokenizer.token_dim != self.latent_dim:
            own, side = tokenizer.config["latent_dim"], tokenizer.config["patch_size"]
            squares = "" if side == 1 else f" in squares of {side} x {side}"
            raise InputError(
                f"the autoencoder has latents of width {own}{squares}: expected tokens of "
                f"{self.latent_dim}, the transformer's"
            )

    @classmethod
    def from_official(
        cls,
        model: str | Path | Mapping[str, Any],
        vae: str | Path | Mapping[str, Any] | None = None,
        **sizes: Any,
    ) -> MAR:
        """Load the authors' checkpoints.

        Args:
            model: path (or state dict) such as `mar_base/checkpoint-last.pth`; `model_ema` is used.
            vae: path (or state dict) such as `kl16.ckpt`, or KL-8, whose latents are tokens in
                squares (`patch_size`, which follows from the widths of both files).
            **sizes: what tensors and the table of official sizes do not tell: `num_heads`, `grid`,
                `num_sampling_steps`; of the autoencoder `patch_size` and `scaling_factor`. `dtype`
                (float32 unless given) and `device` are those of both networks.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
            InputError: files that do not fit each other.
        """
        sizes, place = split_placement(sizes)
        own = {name: sizes.pop(name) for name in ("patch_size", "scaling_factor") if name in sizes}
        network = MARTransformer.from_official(model, **sizes, **place)
        if vae is None:
            return cls(network)
        autoencoder = MARAutoencoder.from_official(vae, **own, **place)
        if "patch_size" not in own:
            widths = network.config["latent_dim"], autoencoder.config["latent_dim"]
            autoencoder.register_to_config(patch_size=token_side(*widths))
        return cls(network, autoencoder)

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return place_of(self.transformer)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the transformer."""
        return self.transformer.dtype

    @property
    def latent_space(self) -> str | None:
        """Names the autoencoder that the latents belong to; None without one."""
        if self.tokenizer is None:
            return None
        sizes = {k: v for k, v in self.tokenizer.config.items() if not k.startswith("_")}
        return str(sorted(sizes.items()))

    def to(self, *args: Any, **kwargs: Any) -> MAR:
        """Move or cast all networks, as `nn.Module.to` does; returns the model itself."""
        self.transformer.to(*args, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def start(
        self, conditions: Conditions, guidance_scale: float = 1.0, order: Tensor | None = None
    ) -> MARState:
        """A state in which no latent is known.

        Args:
            conditions: one per image: class ids or names, None for no class, or mixtures, see
                `arvision.models.conditions.read_classes`.
            guidance_scale: 1 costs no unconditional rows. The scale itself is an argument of the
                head, since schedules change it on the way.
            order: [B, N] int64, positions in the order of drawing; row by row if None.

        Raises:
            InputError: no conditions, one that the model does not know, a negative scale, or an
                order that is not one.
        """
        check_guidance_scale(guidance_scale)
        if len(conditions) == 0:
            raise InputError("no conditions: expected at least one")
        every = torch.arange(self.num_tokens, device=self.device)
        order = every.expand(len(conditions), -1) if order is None else order.to(self.device)
        if order.shape != (len(conditions), len(every)) or bool((order.sort(1)[0] != every).any()):
            raise InputError(
                f"order {tuple(order.shape)}: expected all {self.num_tokens} positions for each of "
                f"{len(conditions)} images"
            )
        num_classes = self.transformer.config["num_classes"]
        classes = read_classes(conditions, num_classes, self.class_names).to(self.device)
        if guidance_scale != 1:
            classes = torch.cat([classes, null_classes(classes, num_classes)])
        if classes.is_floating_point():
            classes, null = classes[:, :num_classes], classes[:, num_classes]
        else:
            null = classes == num_classes
            classes = classes.masked_fill(null, 0)
        condition = enter(self.transformer, "embed_classes", classes, null)
        return MARState(self.transformer, condition, order)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of a picture, in pixels."""
        rows, columns = self.grid
        return rows * self.tokenizer.downsample_factor, columns * self.tokenizer.downsample_factor

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Latents [B, N, D] to pixels [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: the model has no autoencoder.
        """
        if self.tokenizer is None:
            raise InputError("this model has no autoencoder: expected one to decode latents")
        latents = tokens.to(self.tokenizer.dtype)
        return enter(self.tokenizer, "decode", latents, self.grid).clamp(-1, 1)
