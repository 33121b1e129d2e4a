"""The masked autoregressive transformer of MAR, with its diffusion head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict, split_placement
from ...decoding.latents.schedule import NUM_TRAIN_STEPS
from ...errors import InputError
from ...kernels.linear import Linear
from ...networks import entry, hot_entry
from ...schema import Count, Layers, Side, Size
from ..conditions import embed_mixture
from ..latent_head import HeadHolder, run_part
from ..network import Network
from .convert import TRANSFORMER_WRAPPERS, transformer_sizes
from .layers import NORM_EPS, Block, KeptKeys


class KeptFeatures:
    """Keys and values of all blocks at all places, see `MARTransformer.update`.

    Args:
        transformer: whose.

    Attributes:
        inputs: [R, P + N, W], what the decoder's first block was given; None before a full pass.
        probe: index of the decoder block whose values tell which places have changed: the fourth in
            decoders of 12 blocks and more, as published, and a quarter of the way in shorter ones.
    """

    inputs: Tensor | None = None

    def __init__(self, transformer: MARTransformer) -> None:
        slots = transformer.num_buffer + transformer.num_tokens
        self.encoder = [KeptKeys(slots) for _ in transformer.encoder_blocks]
        self.decoder = [KeptKeys(slots) for _ in transformer.decoder_blocks]
        self.probe = min(3, len(self.decoder) // 4)


class MARTransformer(Network):
    """Encoder over the known latents, decoder over all positions, and the head that draws latents.

    Parameter names are those of the published checkpoints.

    Args:
        latent_dim: D, width of a latent.
        grid: rows and columns of latents.
        hidden_size: width W of encoder and decoder.
        encoder_depth, decoder_depth: numbers of blocks.
        num_heads: attention heads of a block.
        head_width, head_depth: sizes of the diffusion head.
        num_classes: classes; the unconditional embedding is a row of its own.
        num_buffer: copies of the condition that stand before the latents.
        num_sampling_steps: steps of a denoising chain.
        noisiest: trained step that a chain starts with, see `Schedule`.

    Raises:
        InputError: heads that do not divide the width.

    Paper: Li et al., "Autoregressive Image Generation without Vector Quantization", 2024.
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: Size = 16,
        grid: tuple[Side, Side] = (16, 16),
        hidden_size: Size = 768,
        encoder_depth: Layers = 12,
        decoder_depth: Layers = 12,
        num_heads: Size = 12,
        head_width: Size = 1024,
        head_depth: Layers = 6,
        num_classes: Size = 1000,
        num_buffer: Count = 64,
        num_sampling_steps: Side = 100,
        noisiest: Count = NUM_TRAIN_STEPS - 1,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise InputError(f"num_heads {num_heads}: expected a divisor of {hidden_size}")
        self.num_tokens, self.num_buffer = grid[0] * grid[1], num_buffer
        rows, width = num_buffer + self.num_tokens, hidden_size
        self.class_emb = nn.Embedding(num_classes, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.z_proj = Linear(latent_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, rows, width))
        self.encoder_blocks = nn.ModuleList(Block(width, num_heads) for _ in range(encoder_depth))
        self.encoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_embed = Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, rows, width))
        self.decoder_blocks = nn.ModuleList(Block(width, num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.num_tokens, width))
        self.diffloss = HeadHolder(latent_dim, width, head_width, head_depth)

    @classmethod
    def from_official(cls, source: str | Path | Mapping[str, Any], **sizes: Any) -> MARTransformer:
        """Load the authors' checkpoint, its averaged weights (`model_ema`) where it has them.

        Args:
            source: path (or state dict) such as `mar_base/checkpoint-last.pth`.
            **sizes: what tensors and the table of official sizes do not tell: `num_heads`, `grid`,
                `num_sampling_steps`.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        name = str(source) if isinstance(source, (str, Path)) else "the given state dict"
        sizes, place = split_placement(sizes)
        tensors = read_state_dict(source, TRANSFORMER_WRAPPERS)
        return load_strictly(cls, transformer_sizes(tensors, name, sizes), tensors, name, **place)

    @hot_entry
    def run_head(self, name: str, *arguments: Any) -> Any:
        """Run a part of the diffusion head, see `arvision.models.latent_head.RunPart`."""
        return run_part(self.diffloss.net, name, *arguments)

    @entry
    def embed_classes(self, class_ids: Tensor, is_null: Tensor) -> Tensor:
        """Conditions [R, W] of class ids [R], or of weights [R, num_classes] of classes; the
        unconditional row where `is_null` [R] bool, added by its share where that is a number [R]."""
        if class_ids.is_floating_point():
            mixed = embed_mixture(self.class_emb, class_ids)
            return mixed + is_null[:, None].to(mixed) * self.fake_latent
        return torch.where(is_null[:, None], self.fake_latent, self.class_emb(class_ids))

    def forward(
        self,
        latents: Tensor,
        known: Tensor,
        condition: Tensor,
        kept: KeptFeatures | None = None,
        span: tuple[int, int] | None = None,
    ) -> Tensor:
        """Conditions z [R, N, W] of the head, at every position.

        Args:
            latents: [R, N, D]; what stands at unknown positions does not matter.
            known: [R, N] bool. Rows may know different numbers of latents.
            condition: [R, W], see `embed_classes`.
            kept: takes the features of all places, for `update`.
            span: least and most latents that a row knows, where the caller has them; None to look.
                A compiled graph cannot look.
        """
        if span is None:
            span = span_of(known)
        encoded, order, valid = self._encode(latents, known, condition, kept, span)
        x = self.decoder_embed(encoded)
        buffer, x = x[:, : self.num_buffer], x[:, self.num_buffer :]
        # One more row takes what pads the shorter rows, and is cut off again.
        spread = self.mask_token.to(x.dtype).repeat(len(x), self.num_tokens + 1, 1)
        place = torch.where(valid, order, self.num_tokens)
        spread = spread.scatter(1, place[..., None].expand_as(x), x)[:, : self.num_tokens]
        x = torch.cat([buffer, spread], dim=1) + self.decoder_pos_embed_learned
        held = None
        if kept is not None:
            slots = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
            held = kept.decoder, slots
            kept.inputs = x
        x = self._run(self.decoder_blocks, x, None, held)
        return self.decoder_norm(x)[:, self.num_buffer :] + self.diffusion_pos_embed_learned

    @hot_entry
    def update(
        self,
        latents: Tensor,
        places: Tensor,
        known: Tensor,
        queries: Tensor,
        kept: KeptFeatures,
        condition: Tensor | None = None,
        num: int | None = None,
    ) -> Tensor:
        """Conditions z [R, Q, W] at `queries`, all features but those of a few places kept.

        Computed are the latents that became known and the queries; they see what other places were
        in the pass before. An approximation: other places do not see what became known. With `num` also
        the buffer, and in the decoder all places up to the probe (see `KeptFeatures`), behind it the
        `num` places whose values there are least like those of the pass before.

        Args:
            latents: [R, M, D] that became known since the last pass.
            places: [R, M] int64, where.
            known: [R, N] bool, these included.
            queries: [R, Q] int64, unknown places.
            kept: from `forward`; updated. It may hold more rows, of which the first are taken.
            condition: [R, W], see `forward`; with `num`.
            num: places that all decoder blocks compute, latents that became known and queries included.

        Source: Yan et al., "LazyMAR: Accelerating Masked Autoregressive Models via Feature
        Caching", 2025, section 3.2 (the token cache).
        """
        slots = self.num_buffer + places
        x = self.z_proj(latents) + self.encoder_pos_embed_learned[0][slots]
        if num is not None:
            assert condition is not None
            buffer = condition[:, None] + self.encoder_pos_embed_learned[:, : self.num_buffer]
            first = torch.arange(self.num_buffer, device=x.device).expand(len(x), -1)
            x, slots = torch.cat([buffer, x], dim=1), torch.cat([first, slots], dim=1)
        mask = self._with_buffer(known)
        x = self._run(self.encoder_blocks, self.z_proj_ln(x), mask, (kept.encoder, slots))
        x = self.decoder_embed(self.encoder_norm(x))
        if num is not None:
            x = x + self.decoder_pos_embed_learned[0][slots]
            forced = self.num_buffer + torch.cat([places, queries], dim=1)
            z = self._decode_changed(x, slots, forced, kept, num)
            at = (self.num_buffer + queries)[..., None].expand(-1, -1, z.shape[-1])
            return self.decoder_norm(z.gather(1, at)) + self.diffusion_pos_embed_learned[0][queries]
        unknown = self.mask_token.to(x.dtype).expand(*queries.shape, -1)
        slots = torch.cat([slots, self.num_buffer + queries], dim=1)
        x = torch.cat([x, unknown], dim=1) + self.decoder_pos_embed_learned[0][slots]
        x = self._run(self.decoder_blocks, x, None, (kept.decoder, slots))[:, places.shape[1] :]
        return self.decoder_norm(x) + self.diffusion_pos_embed_learned[0][queries]

    def _decode_changed(
        self, x: Tensor, slots: Tensor, forced: Tensor, kept: KeptFeatures, num: int
    ) -> Tensor:
        """Features [R, P + N, W] behind the decoder; right at `forced` and the other computed places.

        Args:
            x: [R, T, W], new inputs of the decoder.
            slots: [R, T], where.
            forced: [R, F], places that are computed in any case.
            kept: of the pass before.
            num: places computed behind the probe.
        """
        assert kept.inputs is not None
        inputs = kept.inputs[: len(x)]
        inputs.scatter_(1, slots[..., None].expand_as(x), x)
        every = torch.arange(inputs.shape[1], device=x.device).expand(len(x), -1)
        blocks: list[Any] = list(self.decoder_blocks)
        probe = kept.probe
        held = list(zip(blocks, kept.decoder, strict=True))
        h = inputs.clone()
        for block, keys in held[:probe]:
            h = block(h, None, (keys, every))
        block, keys = held[probe]
        before = keys.values(len(h))
        h = block.attend(h, None, (keys, every))
        likeness = F.cosine_similarity(keys.values(len(h)), before, dim=-1).mean(1)
        likeness = likeness.scatter(1, forced, -2.0)
        chosen = likeness.topk(num, largest=False).indices.sort(dim=1).values
        place = chosen[..., None].expand(-1, -1, h.shape[-1])
        part = block.think(h.gather(1, place))
        for block, keys in held[probe + 1 :]:
            part = block(part, None, (keys, chosen))
        return h.scatter(1, place, part)

    @staticmethod
    def _run(
        blocks: nn.ModuleList,
        x: Tensor,
        mask: Tensor | None,
        held: tuple[list[KeptKeys], Tensor] | None,
    ) -> Tensor:
        """[R, T, W] through blocks; `held`: what each keeps, and the slots [R, T] of the rows."""
        for number, block in enumerate(blocks):
            x = block(x, mask, None if held is None else (held[0][number], held[1]))
        return x

    def _with_buffer(self, counts: Tensor) -> Tensor:
        """Mask [R, 1, 1, P + M] of keys: the buffer, and those of M that count, [R, M] bool."""
        buffer = counts.new_ones(len(counts), self.num_buffer)
        return torch.cat([buffer, counts], dim=1)[:, None, None]

    def _encode(
        self,
        latents: Tensor,
        known: Tensor,
        condition: Tensor,
        kept: KeptFeatures | None,
        span: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Buffer and known latents [R, P + M, W], positions [R, M] of the latents, which count."""
        least, most = span
        order = torch.argsort(~known, dim=1, stable=True)[:, :most]
        valid = known.gather(1, order)
        chosen = latents.gather(1, order[..., None].expand(-1, -1, latents.shape[-1]))
        buffer = condition[:, None].expand(-1, self.num_buffer, -1)
        position = self.encoder_pos_embed_learned
        places = position[0, self.num_buffer :][order]
        x = torch.cat(
            [buffer + position[:, : self.num_buffer], self.z_proj(chosen) + places], dim=1
        )
        mask = held = None
        if kept is not None:
            mask = self._with_buffer(known)
            first = torch.arange(self.num_buffer, device=x.device).expand(len(x), -1)
            # What pads the shorter rows goes into the slot behind all places.
            place = torch.where(valid, order, self.num_tokens)
            held = kept.encoder, torch.cat([first, self.num_buffer + place], dim=1)
        elif least < most:
            mask = self._with_buffer(valid)
        x = self._run(self.encoder_blocks, self.z_proj_ln(x), mask, held)
        return self.encoder_norm(x), order, valid


def span_of(known: Tensor) -> tuple[int, int]:
    """Least and most latents that a row of `known` [R, N] knows."""
    counts = known.sum(1)
    return (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
