"""Students of Distilled Decoding for VAR: the network, and the family object around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...checkpoint import StateDict, load_strictly, read_state_dict, shape_of, split_placement
from ...decoding.scale_state import ScaleCache, levels_of
from ...decoding.student import codebook_mark
from ...errors import InputError
from ...kernels.linear import Linear
from ...networks import Table, enter
from ...schema import Count, Layers, Positive, Scales, Size
from ..adaptive import HeadNorm, SharedProjection, modulated_norm
from ..network import Network
from ..student import Student, VectorHead, check_timesteps
from .convert import TRANSFORMER_SIZES, transformer_sizes, without_records
from .layers import Block
from .model import VAR
from .tokenizer import VARTokenizer, check_scales
from .transformer import VARTransformer

STUDENT_WRAPPERS = ("trainer.ema_parameters", "trainer.var_wo_ddp", "ema_parameters", "state_dict")

OFFICIAL_PLANS = {16: ((0, 5), 5), 20: ((0, 4), 4), 24: ((0, 4), 4)}
"""Layers of the published students to what they were trained for: numbers of known scales, and the
first scale whose vectors are decoded as they are. Not in their tensors."""


class StudentBlock(Block):
    """A block of the teacher's that also hears, between its branches, which rows are data."""

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        layer: int,
        mask: Tensor | None,
        cache: ScaleCache | None = None,
        told: Tensor | None = None,
    ) -> Tensor:
        """As `Block`, with `told` [R, T, C] added behind the attention."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        h = modulated_norm(x, scale1, shift1, self.eps)
        x = x + gate1 * self.attn(h, layer, mask, cache)
        if told is not None:
            x = x + told
        return x + gate2 * self.ffn(modulated_norm(x, scale2, shift2, self.eps))


class VARStudentTransformer(Network):
    """Transformer from vectors (codes of known scales, then noise) to all tokens of an image.

    A sequence is a class row and a row per token of every scale. A row holds a vector of its own
    position (not the canvas that the teacher is fed), looks at itself and at all coarser scales, and
    predicts its own token: what the teacher would make of this noise behind the coarser scales. The
    class row counts as a scale before the first one, in the embeddings of places and levels too.

    Args:
        patch_nums: side lengths of the scales, without the class row.
        codebook_size: codes of the image tokenizer.
        z_channels: width D of a code.
        hidden_size: width C.
        num_layers: transformer blocks.
        num_heads: attention heads.
        num_classes: classes; one more embedding is the teacher's null class.
        shared_aln: one projection of the condition for all blocks.
        attn_l2_norm: queries and keys of unit length, with a learnt scale per head.
        norm_eps: epsilon of the normalisation.
        timesteps: numbers of known scales that it was trained for, 0 first.
        split: scales from here on are decoded from the predicted vectors, not from codes; None for
            codes alone.
        teacher_name: name or folder of the teacher's pipeline, None if unknown.
        codebook_mark: tells the codebook it was trained for, see `arvision.decoding.student`; None if
            unknown.

    Raises:
        InputError: sizes that do not fit each other, timesteps or a split that do not fit the scales.

    Paper: Liu et al., "Distilled Decoding 1", 2024, section 3.3 and appendix; the layout is that of
    the authors' checkpoints.
    """

    local_models = ("teacher_name",)
    _supports_gradient_checkpointing = False
    _no_split_modules = ["StudentBlock"]

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
        timesteps: Sequence[Count] = (0, 5),
        split: Count | None = None,
        teacher_name: str | None = None,
        codebook_mark: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise InputError(f"num_heads {num_heads}: expected a divisor of {hidden_size}")
        self.scales = check_scales(patch_nums)
        most = len(self.scales)
        check_timesteps(timesteps, most, " scales")
        if split is not None and not 0 <= split <= most:
            raise InputError(f"split {split}: expected a number of scales in 0..{most}")
        self.word_embed = Linear(z_channels, hidden_size)
        self.class_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.pos_start = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.pos_1LC = nn.Parameter(torch.empty(1, 1 + self.num_tokens, hidden_size))
        self.lvl_embed = nn.Embedding(1 + most, hidden_size)
        self.shared_ada_lin = SharedProjection(hidden_size) if shared_aln else nn.Identity()
        self.blocks = nn.ModuleList(
            StudentBlock(hidden_size, num_heads, shared_aln, attn_l2_norm, norm_eps)
            for _ in range(num_layers)
        )
        self.head_nm = HeadNorm(hidden_size, norm_eps)
        self.head = Linear(hidden_size, codebook_size)
        self.final_layer_conti = VectorHead(hidden_size, z_channels)
        self.n_d_embed = Table(2, hidden_size)
        self.layerwise_n_d_embed = nn.ModuleList(
            Linear(hidden_size, hidden_size) for _ in range(num_layers + 1)
        )
        self._init_weights()

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif not name.endswith(("scale_mul_1H11", "ada_gss", "scale_shift_table")):
                nn.init.trunc_normal_(parameter, std=(1 / self.config["hidden_size"] / 3) ** 0.5)

    @classmethod
    @torch.no_grad()
    def from_teacher(cls, teacher: VARTransformer, **settings: Any) -> VARStudentTransformer:
        """A student with its teacher's sizes and, wherever shapes allow, its weights.

        The first scale's places start as copies of those of the class row, where the teacher
        predicts it. What says in each block that a row is data starts silent.

        Args:
            teacher: the network.
            **settings: `timesteps`, `split`, `teacher_name`, `codebook_mark`.
        """
        student = cls(**{name: teacher.config[name] for name in TRANSFORMER_SIZES}, **settings)
        weights = dict(teacher.state_dict())
        for key, axis in (("pos_1LC", 1), ("lvl_embed.weight", 0)):
            first = weights[key].narrow(axis, 0, 1)
            weights[key] = torch.cat([first, weights[key]], dim=axis)
        student.load_state_dict(weights, strict=False)
        for parameter in student.layerwise_n_d_embed.parameters():
            nn.init.zeros_(parameter)
        return student

    @classmethod
    def from_official(
        cls, source: str | Path | Mapping[str, Any], **sizes: Any
    ) -> VARStudentTransformer:
        """Load the authors' checkpoint, such as `VAR-DD/var-d16.pth` (its average is taken).

        Args:
            source: path or state dict.
            **sizes: as of `VARTransformer.from_official` (`patch_nums` without the class row);
                `timesteps` and `split` where the depth is not that of a published student; `dtype`
                and `device`.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        name = "the given state dict" if isinstance(source, Mapping) else str(source)
        sizes, place = split_placement(sizes)
        tensors = read_state_dict(source, STUDENT_WRAPPERS)
        own = {key: sizes.pop(key) for key in ("timesteps", "split") if key in sizes}
        found = transformer_sizes(_without_class_row(tensors, name), name, sizes)
        timesteps, split = OFFICIAL_PLANS.get(found["num_layers"], ((0,), None))
        found |= {"timesteps": timesteps, "split": split} | own
        return load_strictly(cls, found, without_records(tensors), name, **place)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, over all scales."""
        return self.ends()[-1]

    def ends(self) -> tuple[int, ...]:
        """Tokens up to the end of each scale."""
        return tuple(accumulate(side * side for side in self.scales))

    def levels(self) -> Tensor:
        """Level of each row [1 + N] int64: 0 for the class row, 1 for the first scale."""
        sizes = tuple((side, side) for side in self.scales)
        return F.pad(levels_of(sizes, self.pos_1LC.device) + 1, (1, 0))

    def mask(self) -> Tensor:
        """[1 + N, 1 + N] bool, true where a row may look: at itself and at coarser levels."""
        levels = self.levels()
        itself = torch.eye(len(levels), dtype=torch.bool, device=levels.device)
        return (levels[:, None] > levels[None, :]) | itself

    def forward(self, class_ids: Tensor, vectors: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, N, V] and vectors [B, N, D] of every position, float32 or wider.

        Args:
            class_ids: [B] int64.
            vectors: [B, N, D], codes of the known scales, then noise.
            known: [B] int64, how many scales are known.
        """
        condition = self.class_emb(class_ids)[:, None]
        is_data = self.levels() <= known[:, None]
        told = self.n_d_embed.whole()
        rows = self.word_embed(vectors.to(condition.dtype))
        x = torch.cat([condition + self.pos_start, rows], dim=1)
        x = x + self.lvl_embed(self.levels()) + self.pos_1LC + _by_kind(told, is_data)
        shared, mask = self.shared_ada_lin(condition[:, 0]), self.mask()
        *inner, last = self.layerwise_n_d_embed
        blocks = cast("list[StudentBlock]", list(self.blocks))
        for index, (block, layer) in enumerate(zip(blocks, inner, strict=True)):
            x = block(x, block.modulation(shared), index, mask, told=_by_kind(layer(told), is_data))
        x = (x + _by_kind(last(told), is_data))[:, 1:]
        normed = self.head_nm(x, self.head_nm.modulation(condition[:, 0]))
        logits = self.head(normed.to(self.head.weight.dtype))
        out = self.final_layer_conti(x, condition)
        return (logits, out) if logits.dtype == torch.float64 else (logits.float(), out.float())


def _by_kind(table: Tensor, is_data: Tensor) -> Tensor:
    """Rows [B, T, C] from those of noise and data, [2, C]."""
    return torch.where(is_data[..., None], table[1], table[0])


def _without_class_row(tensors: StateDict, name: str) -> StateDict:
    """A student's tensors with the teacher's sides, so that the teacher's sizes can be read off.

    Raises:
        CheckpointError: a table that is missing or has other sides.
    """
    for key, dims in (("n_d_embed.weight", 2), ("pos_1LC", 3), ("lvl_embed.weight", 2)):
        shape_of(tensors, key, dims, name)
    trimmed = {
        "pos_1LC": tensors["pos_1LC"][:, 1:],
        "lvl_embed.weight": tensors["lvl_embed.weight"][1:],
    }
    if "lvl_1L" in tensors:
        trimmed["lvl_1L"] = tensors["lvl_1L"].flatten()[1:] - 1
    return tensors | trimmed


class VARStudent(Student):
    """A VAR student with its image tokenizer; its units are scales, see `Student`.

    Raises:
        InputError: another tokenizer than the one that the student was trained for.
    """

    fits = {"codebook_size": "codebook_size", "z_channels": "z_channels"}
    transformer: VARStudentTransformer
    tokenizer: VARTokenizer

    def __init__(
        self,
        transformer: VARStudentTransformer,
        tokenizer: VARTokenizer | None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if tokenizer is not None and tokenizer.scales != transformer.scales:
            raise InputError(
                f"the tokenizer has scales {list(tokenizer.scales)}: expected "
                f"{list(transformer.scales)}, those of the student's teacher"
            )
        super().__init__(transformer, tokenizer, class_names)

    @classmethod
    def from_teacher(
        cls, teacher: VAR, timesteps: Sequence[int] | None = None, **settings: Any
    ) -> VARStudent:
        """A student in float32 with its teacher's weights, to be trained.

        Args:
            teacher: with its image tokenizer.
            timesteps: numbers of known scales to train for; None for 0 and half of all, as the
                published student of 16 layers has.
            **settings: `split`, `teacher_name`.
        """
        half = len(teacher.scales) // 2
        steps = ((0, half) if half else (0,)) if timesteps is None else tuple(timesteps)
        mark = codebook_mark(teacher.codebook)
        network = VARStudentTransformer.from_teacher(
            teacher.transformer, timesteps=steps, codebook_mark=mark, **settings
        )
        return cls(network, teacher.tokenizer, teacher.class_names)

    @classmethod
    def from_official(
        cls,
        transformer: str | Path | Mapping[str, Any],
        tokenizer: str | Path | Mapping[str, Any],
        **sizes: Any,
    ) -> VARStudent:
        """Load the authors' checkpoints: `VAR-DD/var-d16.pth` and `vae_ch160v4096z32.pth`.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        network = VARStudentTransformer.from_official(transformer, **sizes)
        _, place = split_placement(sizes)
        vq = VARTokenizer.from_official(tokenizer, patch_nums=network.scales, **place)
        return cls(network, vq)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N], or vectors [B, N, D] in their place, to pixels [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: tokens of another shape or range.
        """
        return enter(self.tokenizer, "decode", tokens).float()

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Vectors [B, N, D] to pixels [B, 3, H, W], not clamped; gradients pass."""
        return enter(self.tokenizer, "decode_vectors", vectors).float()
