"""The Infinity transformer as a diffusers model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict, split_placement
from ...decoding.logits import guide
from ...decoding.scale_state import Compute, ScaleCache, block_mask, compute_all, levels_of
from ...errors import InputError
from ...kernels.linear import Linear
from ...networks import entry, place_of
from ...schema import Layers, Maps, Positive, Side, Size
from ..adaptive import HeadNorm, SharedProjection
from ..network import Network
from .bits import PATCH, BitPyramid
from .convert import TRANSFORMER_WRAPPERS, transformer_sizes, without_records
from .layers import Block, Text, TextNorm, TextPoolHolder
from .schedules import Scales, check_scales, rotary_grid, scale_schedule

ROTARY_BASE = 10_000.0


@dataclass
class TextRows:
    """What captions set for all scales.

    Attributes:
        start: [R, C], the pooled text: the first input and the source of all modulations.
        text: what the blocks attend to.
        modulation: [R, 1, 6, C], shared by the blocks.
        head: [R, 1, 2, C].
    """

    start: Tensor
    text: Text
    modulation: Tensor
    head: Tensor


class Chunk(nn.Module):
    """Some blocks under the name that the authors' sharding gave them."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.module = nn.ModuleList(blocks)


class InfinityTransformer(Network):
    """Transformer over token maps of growing size that predicts the bits of every token.

    Args:
        scale_schedule: height and width of each scale; None for the square 1M schedule.
        rope_grid: map on which positions are counted; None for the one that the official schedule
            of that shape ends with at 1M.
        num_bits: bits of a token.
        patchify: whether a token is 2 x 2 latents.
        hidden_size: width C.
        num_layers: transformer blocks.
        num_heads: attention heads.
        num_chunks: groups of blocks in the parameters' names; 1 for a model of one's own.
        intermediate_size: width of the feed-forward; None for four times C.
        text_dim: width of the text features.
        text_length: longest text.
        pool_heads: heads of the text's pooling.
        max_scales: scales that the level embedding has room for.
        guidance_layer: 0 to guide logits; -n to guide, in their place, the features behind block
            `num_layers - n` (counted from 0), as `cfg_insertion_layer` of the authors' sampler.
        norm_eps: epsilon of the normalisations.

    Raises:
        InputError: sizes that do not fit each other.

    Paper: Han et al., "Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image
    Synthesis", 2024, section 3.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        scale_schedule: Maps | None = None,
        rope_grid: tuple[Side, Side] | None = None,
        num_bits: Size = 32,
        patchify: bool = False,
        hidden_size: Size = 2048,
        num_layers: Layers = 32,
        num_heads: Size = 16,
        num_chunks: Layers = 8,
        intermediate_size: Size | None = None,
        text_dim: Size = 2048,
        text_length: Size = 512,
        pool_heads: Size = 16,
        max_scales: Size = 15,
        guidance_layer: int = 0,
        norm_eps: Positive = 1e-6,
    ) -> None:
        super().__init__()
        self._check_sizes()
        self.set_scales(scale_schedule, rope_grid)
        self.cfg_uncond = nn.Parameter(torch.empty(text_length, text_dim))
        self.text_norm = TextNorm(text_dim)
        self.text_proj_for_sos = TextPoolHolder(text_dim, hidden_size, pool_heads)
        self.text_proj_for_ca = nn.Sequential(
            Linear(text_dim, hidden_size),
            nn.GELU(approximate="tanh"),
            Linear(hidden_size, hidden_size),
        )
        self.pos_start = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.lvl_embed = nn.Embedding(max_scales, hidden_size)
        self.word_embed = Linear(num_bits, hidden_size)
        self.shared_ada_lin = SharedProjection(hidden_size)
        per_chunk, hidden = num_layers // num_chunks, intermediate_size or 4 * hidden_size
        self.block_chunks = nn.ModuleList(
            Chunk([Block(hidden_size, num_heads, hidden, norm_eps) for _ in range(per_chunk)])
            for _ in range(num_chunks)
        )
        self.head_nm = HeadNorm(hidden_size, norm_eps)
        self.head = Linear(hidden_size, 2 * num_bits)
        self._init_weights(num_layers)

    def _check_sizes(self) -> None:
        config = self.config
        width, heads = config["hidden_size"], config["num_heads"]
        if width % (4 * heads):
            raise InputError(f"num_heads {heads}: expected heads of 4 n channels, {width} in all")
        for name, whole in (("num_chunks", "num_layers"), ("pool_heads", "hidden_size")):
            if config[whole] % config[name]:
                raise InputError(f"{name} {config[name]}: expected a divisor of {config[whole]}")
        if config["patchify"] and config["num_bits"] % PATCH**2:
            raise InputError(f"num_bits {config['num_bits']}: expected 4 n bits with patchify")
        layer = config["guidance_layer"]
        if not -config["num_layers"] < layer <= 0:
            raise InputError(
                f"guidance_layer {layer}: expected 0 (logits) or {1 - config['num_layers']}..-1"
            )

    def _init_weights(self, num_layers: int) -> None:
        """Small normal weights; gates and the head start near zero, as the authors train."""
        std = (1 / self.config["hidden_size"] / 3) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "scale_mul" not in name and "ada_gss" not in name and "norm" not in name:
                nn.init.trunc_normal_(parameter, std=std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            for block in self.blocks:
                block.sa.proj.weight.div_((2 * num_layers) ** 0.5)
                block.ffn.fc2.weight.div_((2 * num_layers) ** 0.5)
                block.shrink_gates()

    @classmethod
    def from_official(
        cls, source: str | Path | Mapping[str, Any], **sizes: Any
    ) -> InfinityTransformer:
        """Load the authors' checkpoint: `infinity_2b_reg.pth`, or the folder `infinity_8b_weights`.

        Args:
            source: path of a file or of a folder of shards, or a state dict.
            **sizes: which pictures are drawn (`scale_schedule`, or `pixels` and `aspect_ratio`; the
                square 1M schedule by default); others are checked against the tensors.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
            InputError: scales that no model has.
        """
        name = "the given state dict" if isinstance(source, Mapping) else str(source)
        sizes, place = split_placement(sizes)
        tensors = read_state_dict(source, TRANSFORMER_WRAPPERS)
        found = transformer_sizes(tensors, name, sizes)
        return load_strictly(cls, found, without_records(tensors), name, **place)

    def set_scales(
        self, scales: Sequence[Sequence[int]] | None, grid: Sequence[int] | None = None
    ) -> None:
        """Draw pictures of another size from now on; see the class for the arguments.

        Raises:
            InputError: maps that do not grow, more than the level embedding has room for, or
                scales that begin no official schedule, without a grid.
        """
        checked = scale_schedule() if scales is None else check_scales(scales)
        most = self.config["max_scales"]
        if len(checked) > most:
            raise InputError(
                f"scale_schedule of {len(checked)} scales: expected at most {most}, the "
                "transformer's level embeddings"
            )
        if grid is None:
            rotary_grid(checked)  # refuses what has none
        self.register_to_config(scale_schedule=checked, rope_grid=grid)

    @property
    def blocks(self) -> list[Block]:
        """All blocks in their order."""
        chunks = cast("list[Chunk]", list(self.block_chunks))
        return [cast(Block, block) for chunk in chunks for block in chunk.module]

    @property
    def scales(self) -> Scales:
        """Height and width of each scale."""
        return check_scales(self.config["scale_schedule"])

    @property
    def pyramid(self) -> BitPyramid:
        """How bits and maps belong together."""
        bits, patchify = self.config["num_bits"], self.config["patchify"]
        return BitPyramid(self.scales, bits // PATCH**2 if patchify else bits, patchify)

    def angles(self) -> Tensor:
        """Rotary angles [L, D/2] of all tokens: rows turn the first half of the pairs."""
        grid = self.config["rope_grid"] or rotary_grid(self.scales)
        width = self.config["hidden_size"] // self.config["num_heads"]
        return rotary_angles(self.scales, tuple(grid), width, place_of(self))

    @entry
    def null_text(self) -> Tensor:
        """The null text [text_length, text_dim]."""
        return self.cfg_uncond.view_as(self.cfg_uncond)

    @entry
    def text_rows(self, features: Sequence[Tensor]) -> TextRows:
        """What captions set.

        Args:
            features: [T_i, text_dim] of each row, valid ones only.
        """
        return self._text_rows(features)

    def _text_rows(self, features: Sequence[Tensor]) -> TextRows:
        length, place = max(len(rows) for rows in features), self.pos_start.device
        shape = (len(features), length)
        padded = torch.zeros(
            *shape, self.config["text_dim"], device=place, dtype=self.cfg_uncond.dtype
        )
        valid = torch.zeros(shape, dtype=torch.bool, device=place)
        for row, rows in enumerate(features):
            padded[row, : len(rows)] = rows.to(padded)
            valid[row, : len(rows)] = True
        is_even = all(len(rows) == length for rows in features)
        mask = None if is_even else valid[:, None, None]
        normed = self.text_norm(padded)
        start = self.text_proj_for_sos(Text(normed, mask))
        return TextRows(
            start,
            Text(self.text_proj_for_ca(normed), mask),
            self.shared_ada_lin(start),
            self.head_nm.modulation(start),
        )

    def places(self, first: int, last: int) -> Tensor:
        """Level embeddings [last - first, C] of the tokens `first`..`last - 1`."""
        return self.lvl_embed(levels_of(self.scales, self.pos_start.device)[first:last])

    def start_inputs(self, rows: TextRows) -> Tensor:
        """Inputs [R, n_0, C] of scale 0, without level."""
        num = self.pyramid.counts[0]
        return rows.start[:, None].expand(-1, num, -1) + self.pos_start

    @entry
    def inputs(self, seen: Any, scale: int) -> Tensor:
        """Embedded inputs [R, n, C] of a scale.

        Args:
            seen: what captions set (`TextRows`) at the first scale, then the canvas at that size
                [R, n, d].
            scale: its number.
        """
        first, num = sum(self.pyramid.counts[:scale]), self.pyramid.counts[scale]
        x = self.start_inputs(seen) if scale == 0 else self.word_embed(seen)
        return x + self.places(first, first + num)

    def forward(
        self,
        x: Tensor,
        rows: TextRows,
        angles: Tensor,
        num_logits: int,
        num_rows: int,
        *,
        mask: Tensor | None = None,
        cache: ScaleCache | None = None,
        compute: Compute = compute_all,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Inputs [R, T, C] to logits [num_rows, num_logits, d, 2] of the first rows' last tokens.

        Args:
            x: see `features`, and so `rows`, `angles`, `mask`, `cache` and `compute`.
            num_logits: last tokens that need logits.
            num_rows: first rows that need logits.
            guidance: [T, 1], weights of the first half of the rows where features are guided behind
                `guidance_layer`; None for no such guidance.
        """
        run: Any = {"mask": mask, "cache": cache, "compute": compute}
        turn = None
        if guidance is not None:
            turn = self.config["num_layers"] + self.config["guidance_layer"] + 1
            x = self.features(x, rows, angles, **run, last=turn)
            conditional, null = x.chunk(2)
            mixed = guide(conditional, null, guidance).repeat(2, 1, 1)
            both = guidance if guidance.dim() == 2 else guidance.repeat(2, 1, 1)
            x = torch.where(both == 1, x, mixed)
        x = self.features(x, rows, angles, **run, first=turn or 0)
        return self.logits(x[:num_rows, -num_logits:], rows.head[:num_rows])

    def features(
        self,
        x: Tensor,
        rows: TextRows,
        angles: Tensor,
        *,
        mask: Tensor | None = None,
        cache: ScaleCache | None = None,
        compute: Compute = compute_all,
        first: int = 0,
        last: int | None = None,
    ) -> Tensor:
        """Inputs [R, T, C] through blocks `first`..`last - 1`, [R, T, C].

        Args:
            x: embedded inputs with their levels.
            rows: of the captions.
            angles: [T, D/2], of the tokens.
            mask: [T, S] bool, true where a query may look; None for everything.
            cache: keys and values of the coarser scales.
            compute: runs the parts of each block.
            first: block to begin with.
            last: block to end before; None for all.
        """
        for layer, block in list(enumerate(self.blocks))[first:last]:
            x = block(x, rows.modulation, rows.text, angles, layer, mask, cache, compute)
        return x

    def logits(self, features: Tensor, head: Tensor) -> Tensor:
        """Features [R, T, C] to logits [R, T, d, 2] of bits 0 and 1, float32 or wider.

        `head` [R, 1, 2, C] is that of the rows.
        """
        normed = self.head_nm(features, head)
        wide = normed if normed.dtype == torch.float64 else normed.to(self.head.weight.dtype)
        out = self.head(wide)
        return (out if out.dtype == torch.float64 else out.float()).unflatten(-1, (-1, 2))

    @entry
    def teacher_forced(self, features: Sequence[Tensor], views: Tensor) -> Tensor:
        """Logits [B, L, d, 2] of every token given its caption and all coarser scales.

        Args:
            features: text features [T_i, text_dim] of each row.
            views: [B, L - n_0, d], what `BitPyramid.canvas` sees on the way.
        """
        rows = self._text_rows(features)
        views = views.to(self.word_embed.weight.dtype)
        x = torch.cat([self.start_inputs(rows), self.word_embed(views)], dim=1)
        x = x + self.places(0, x.shape[1])
        mask = block_mask(self.scales, x.device)
        return self.logits(self.features(x, rows, self.angles(), mask=mask), rows.head)


@lru_cache(maxsize=8)
def rotary_angles(
    scales: Scales, grid: tuple[int, int], width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Angles [L, width / 2] float32 of the tokens of all scales, made once for each device.

    Token (r, c) of an h x w map stands at (round(r H / h), round(c W / w)) of the grid H x W.
    """
    steps = torch.arange(0, width // 2, 2, dtype=torch.float32) / (width // 2)
    frequencies = ROTARY_BASE**-steps
    tables = []
    for height, width_in_tokens in scales:
        rows = (torch.arange(height) * (grid[0] / height)).round()
        columns = (torch.arange(width_in_tokens) * (grid[1] / width_in_tokens)).round()
        shape = (height, width_in_tokens, len(frequencies))
        by_row = (rows[:, None, None] * frequencies).expand(shape)
        by_column = (columns[None, :, None] * frequencies).expand(shape)
        tables.append(torch.cat([by_row, by_column], dim=-1).flatten(0, 1))
    return torch.cat(tables).to(device)
