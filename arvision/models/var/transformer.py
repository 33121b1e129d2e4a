"""The VAR transformer as a diffusers model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict, split_placement
from ...decoding.scale_state import Compute, ScaleCache, block_mask, compute_all, levels_of
from ...errors import InputError
from ...kernels.linear import Linear
from ...networks import entry
from ...schema import Layers, Positive, Scales, Size
from ..adaptive import HeadNorm, SharedProjection
from ..conditions import embed_mixture
from ..network import Network
from .convert import TRANSFORMER_WRAPPERS, transformer_sizes, without_records
from .layers import Block
from .tokenizer import check_scales


@dataclass
class Modulations:
    """What a condition sets in every normalisation; it does not depend on the scale.

    Attributes:
        blocks: [R, 1, 6, C] per block.
        head: [R, 1, 2, C].
    """

    blocks: list[Tensor]
    head: Tensor


class VARTransformer(Network):
    """Transformer over token maps of growing size; a scale sees itself and all coarser ones.

    Args:
        patch_nums: side lengths of the scales.
        codebook_size: codes of the image tokenizer.
        z_channels: width of a code.
        hidden_size: width C.
        num_layers: transformer blocks.
        num_heads: attention heads.
        num_classes: classes; one more embedding serves the null class.
        shared_aln: one projection of the condition for all blocks.
        attn_l2_norm: queries and keys of unit length, with a learnt scale per head.
        norm_eps: epsilon of the normalisation.

    Raises:
        InputError: sizes that do not fit each other.

    Paper: Tian et al., "Visual Autoregressive Modeling", 2024, section 3.3.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        patch_nums: Scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        codebook_size: Size = 4096,
        z_channels: Size = 32,
        hidden_size: Size = 1024,
        num_layers: Layers = 16,
        num_heads: Size = 16,
        num_classes: Size = 1000,
        shared_aln: bool = False,
        attn_l2_norm: bool = True,
        norm_eps: Positive = 1e-6,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise InputError(f"num_heads {num_heads}: expected a divisor of {hidden_size}")
        self.scales = check_scales(patch_nums)
        self.word_embed = Linear(z_channels, hidden_size)
        self.class_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.pos_start = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.num_tokens, hidden_size))
        self.lvl_embed = nn.Embedding(len(self.scales), hidden_size)
        self.shared_ada_lin = SharedProjection(hidden_size) if shared_aln else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, shared_aln, attn_l2_norm, norm_eps)
            for _ in range(num_layers)
        )
        self.head_nm = HeadNorm(hidden_size, norm_eps)
        self.head = Linear(hidden_size, codebook_size)
        self._init_weights(num_layers)

    def _init_weights(self, num_layers: int) -> None:
        """Small normal weights; gates and the head start near zero, as the authors train."""
        std = (1 / self.config["hidden_size"] / 3) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "scale_mul" not in name and "ada_gss" not in name:
                nn.init.trunc_normal_(parameter, std=std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            self.head_nm.ada_lin[1].weight.mul_(0.5)
            for block in self._each_block():
                block.attn.proj.weight.div_((2 * num_layers) ** 0.5)
                block.ffn.fc2.weight.div_((2 * num_layers) ** 0.5)
                block.shrink_gates()

    def _each_block(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    @classmethod
    def from_official(cls, source: str | Path | Mapping[str, Any], **sizes: Any) -> VARTransformer:
        """Load the authors' checkpoint, such as `var_d16.pth`; sizes are read off its tensors.

        Args:
            source: path or state dict.
            **sizes: checked against the tensors; `patch_nums` where they cannot be read off.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        name = "the given state dict" if isinstance(source, Mapping) else str(source)
        sizes, place = split_placement(sizes)
        tensors = read_state_dict(source, TRANSFORMER_WRAPPERS)
        found = transformer_sizes(tensors, name, sizes)
        return load_strictly(cls, found, without_records(tensors), name, **place)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, over all scales."""
        return sum(side * side for side in self.scales)

    def offsets(self) -> list[int]:
        """Where each scale begins among the tokens, and, last, their number."""
        out = [0]
        for side in self.scales:
            out.append(out[-1] + side * side)
        return out

    def modulations(self, conditions: Tensor) -> Modulations:
        """What the conditions [R, C] (rows of `class_emb`) set in all layers."""
        shared = self.shared_ada_lin(conditions)
        blocks = [block.modulation(shared) for block in self._each_block()]
        return Modulations(blocks, self.head_nm.modulation(conditions))

    def places(self, first: int, last: int) -> Tensor:
        """Position and level embeddings [1, last - first, C] of the tokens `first`..`last - 1`."""
        levels = levels_of(self.sizes(), self.pos_1LC.device)[first:last]
        return self.pos_1LC[:, first:last] + self.lvl_embed(levels)

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each scale in tokens."""
        return tuple((side, side) for side in self.scales)

    def start_rows(self, conditions: Tensor) -> Tensor:
        """Inputs of scale 0, [R, n_0, C], without position and level."""
        num = self.scales[0] ** 2
        return conditions[:, None].expand(-1, num, -1) + self.pos_start

    @entry
    def read_classes(self, class_ids: Tensor) -> tuple[Tensor, Modulations]:
        """Conditions [R, C] of class ids [R], or of weights [R, num_classes + 1] of classes
        (`num_classes` is the null class), and what they set."""
        conditions = embed_mixture(self.class_emb, class_ids)
        return conditions, self.modulations(conditions)

    @entry
    def inputs(self, seen: Tensor, scale: int) -> Tensor:
        """Embedded inputs [R, n, C] of a scale.

        Args:
            seen: conditions [R, C] at the first scale, then the canvas at that size [R, n, D].
            scale: its number.
        """
        rows = self.start_rows(seen) if scale == 0 else self.word_embed(seen)
        return rows + self.places(*self.offsets()[scale : scale + 2])

    def forward(
        self,
        x: Tensor,
        modulations: Modulations,
        num_logits: int,
        *,
        mask: Tensor | None = None,
        cache: ScaleCache | None = None,
        compute: Compute = compute_all,
    ) -> Tensor:
        """Inputs [R, T, C] to logits [R, num_logits, V] of the last ones, see `features`."""
        x = self.features(x, modulations, mask=mask, cache=cache, compute=compute)
        return self.logits(x[:, -num_logits:], modulations)

    def features(
        self,
        x: Tensor,
        modulations: Modulations,
        *,
        mask: Tensor | None = None,
        cache: ScaleCache | None = None,
        compute: Compute = compute_all,
    ) -> Tensor:
        """Inputs [R, T, C] through all blocks, [R, T, C].

        Args:
            x: embedded inputs with their places.
            modulations: of the conditions.
            mask: [T, S] bool, true where a query may look; None for everything.
            cache: keys and values of the coarser scales.
            compute: runs the parts of each block.
        """
        for layer, (block, modulation) in enumerate(
            zip(self.blocks, modulations.blocks, strict=True)
        ):
            x = block(x, modulation, layer, mask, cache, compute)
        return x

    def logits(self, features: Tensor, modulations: Modulations) -> Tensor:
        """Features [R, T, C] to logits [R, T, V], float32 or wider."""
        normed = self.head_nm(features, modulations.head)
        if normed.dtype == torch.float64:
            return self.head(normed)
        return self.head(normed.to(self.head.weight.dtype)).float()

    @entry
    def teacher_forced(self, class_ids: Tensor, views: Tensor) -> Tensor:
        """Logits [B, L, V] of every token given its class and all coarser scales.

        Args:
            class_ids: [B] int64; `num_classes` is the null class.
            views: [B, L - 1, D], see `VARTokenizer.views`.
        """
        conditions = self.class_emb(class_ids)
        x = torch.cat([self.start_rows(conditions), self.word_embed(views)], dim=1)
        x = x + self.places(0, self.num_tokens)
        modulations = self.modulations(conditions)
        mask = block_mask(self.sizes(), x.device)
        return self.logits(self.features(x, modulations, mask=mask), modulations)
