"""The LlamaGen transformer as a diffusers model: its blocks first, then the network.

Source: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
2024, section 2.3, and the authors' published checkpoints, whose parameter names are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...checkpoint import load_strictly, read_state_dict, split_placement
from ...errors import InputError
from ...kernels.linear import Linear
from ...kernels.tree_attention import attend
from ...networks import Entered, entry, place_of
from ...schema import Layers, Positive, Side, Size
from ..conditions import embed_mixture
from ..network import Network
from .convert import STRAY_KEYS, TRANSFORMER_WRAPPERS, transformer_sizes


class AttentionCache(Protocol):
    """Where an attention layer puts its keys and values, and what it may look at."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [R, H, T, D] and return everything visible, [R, H, S, D]."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 (or wider) and scaled after the cast."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of `x`."""
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(width, hidden, bias=False)
        self.w3 = Linear(width, hidden, bias=False)
        self.w2 = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Attention(nn.Module):
    """Self-attention with rotary positions and, where a checkpoint has it, grouped queries."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = width // num_heads
        self.wqkv = Linear(width, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.wo = Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        layer: int,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [R, T, C].
            rotary: [T, D/2, 2] or [R, T, D/2, 2], (cos, sin) of each position.
            layer: index of this layer in the cache.
            mask: [R or 1, 1, T, S] bool, true where a query may look; None for everything.
            is_causal: a causal mask over the T positions, without a cache.
            cache: takes the new keys and values and gives all visible ones.
        """
        rows, num, _ = x.shape
        heads, groups, dim = self.num_heads, self.num_kv_heads, self.head_dim
        qk, v = self.wqkv(x).split([(heads + groups) * dim, groups * dim], dim=-1)
        qk = apply_rotary(qk.view(rows, num, heads + groups, dim), rotary).transpose(1, 2)
        q, k = qk.split([heads, groups], dim=1)
        v = v.view(rows, num, groups, dim).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        out = attend(q, k, v, mask, is_causal=is_causal)
        return self.wo(out.transpose(1, 2).reshape(rows, num, heads * dim))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, hidden: int, eps: float
    ) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads, num_kv_heads)
        self.feed_forward = FeedForward(width, hidden)
        self.attention_norm = RMSNorm(width, eps)
        self.ffn_norm = RMSNorm(width, eps)

    def forward(self, x: Tensor, rotary: Tensor, layer: int, **attend) -> Tensor:
        """[R, T, C] to [R, T, C]; `attend` as in `Attention.forward`."""
        x = x + self.attention(self.attention_norm(x), rotary, layer, **attend)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    """Class ids [R] to one conditioning row [R, 1, C]; id `num_classes` is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, class_ids: Tensor) -> Tensor:
        """Look the classes up."""
        return self.embedding_table(class_ids).unsqueeze(1)


class CaptionEmbedding(Entered):
    """Caption features [R, L, caption_dim] to conditioning rows [R, L, C].

    The learnt null caption `uncond_embedding` [L, caption_dim] stands before the projection.
    """

    def __init__(self, caption_dim: int, width: int, caption_length: int) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(caption_dim, width)
        self.register_buffer(
            "uncond_embedding", torch.randn(caption_length, caption_dim) / caption_dim**0.5
        )

    def forward(self, features: Tensor) -> Tensor:
        """Project the features."""
        return self.cap_proj(features)

    @entry
    def null(self, like: Tensor) -> Tensor:
        """The null caption for each row of features `like` [R, L, caption_dim], in their type."""
        table: Any = self.uncond_embedding
        return table.to(like).expand_as(like)


class CaptionProjection(nn.Module):
    """Two linear layers with a tanh-GELU between them."""

    def __init__(self, caption_dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[..., caption_dim] to [..., C]."""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


def rotary_table(
    grid: tuple[int, int], head_dim: int, num_conditions: int, theta: float = 10000.0
) -> Tensor:
    """(cos, sin) of every position of a sequence, [num_conditions + H * W, head_dim / 2, 2] float64.

    The first half of the rotated pairs turns with the row of an image token, the second half with
    its column. Conditioning rows are all zero: that sets their queries and keys to zero, as the
    published models expect (not the identity rotation).
    """
    height, width = grid
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    rows = torch.arange(height, dtype=torch.float64)[:, None] * frequencies
    columns = torch.arange(width, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat(
        [
            rows[:, None].expand(height, width, -1),
            columns[None].expand(height, width, -1),
        ],
        dim=-1,
    ).reshape(height * width, half)
    image = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([image.new_zeros(num_conditions, half, 2), image])


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate adjacent pairs of [R, T, H, D] by (cos, sin) [T, D/2, 2] or [R, T, D/2, 2]."""
    pairs = torch.view_as_complex(x.to(rotary.dtype).unflatten(-1, (-1, 2)))
    turned = pairs * torch.view_as_complex(rotary).unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class LlamaGenTransformer(Network):
    """Decoder-only transformer over the codes of one image in raster order.

    A sequence is `num_condition_tokens` conditioning rows (one class row, or a caption padded on
    the left) followed by the H * W image tokens; the last conditioning row predicts token 0.

    Args:
        vocab_size: codes of the image tokenizer.
        grid: rows and columns of image tokens.
        hidden_size: width C.
        num_layers: transformer blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; None for as many as query heads.
        intermediate_size: width of the feed-forward layer; None for the official rule
            (two thirds of 4C, rounded up to a multiple of 256).
        num_classes: classes of a class-conditional model, None for a text-conditional one.
        caption_dim: width of the caption features of a text-conditional model.
        caption_length: rows of a padded caption.
        norm_eps: epsilon of the RMS normalisation.
        rope_theta: base of the rotary frequencies.

    Raises:
        InputError: sizes that do not fit each other.

    Paper: Sun et al., "Autoregressive Model Beats Diffusion", 2024, section 2.3.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        vocab_size: Size = 16384,
        grid: tuple[Side, Side] = (16, 16),
        hidden_size: Size = 768,
        num_layers: Layers = 12,
        num_heads: Size = 12,
        num_kv_heads: Size | None = None,
        intermediate_size: Size | None = None,
        num_classes: Size | None = 1000,
        caption_dim: Size | None = None,
        caption_length: Side = 120,
        norm_eps: Positive = 1e-5,
        rope_theta: Positive = 10000.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if hidden_size % num_heads or (hidden_size // num_heads) % 4:
            raise InputError(
                f"hidden_size {hidden_size} with num_heads {num_heads}: expected a head width "
                "that is a multiple of 4"
            )
        if num_heads % num_kv_heads:
            raise InputError(
                f"num_kv_heads {num_kv_heads}: expected a divisor of num_heads {num_heads}"
            )
        if (num_classes is None) == (caption_dim is None):
            raise InputError("expected either num_classes or caption_dim, and not both")
        hidden = intermediate_size or -(-(8 * hidden_size // 3) // 256) * 256
        self.num_condition_tokens = 1 if caption_dim is None else caption_length
        self.cls_embedding: Any = (
            ClassEmbedding(num_classes, hidden_size)
            if num_classes is not None
            else CaptionEmbedding(caption_dim or 0, hidden_size, caption_length)
        )
        self.tok_embeddings = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(
            Block(hidden_size, num_heads, num_kv_heads, hidden, norm_eps) for _ in range(num_layers)
        )
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.output = Linear(hidden_size, vocab_size, bias=False)
        self._rotary: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._init_weights(num_layers)

    def _init_weights(self, num_layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = (2 * num_layers) ** -0.5 if name.endswith(("wo.weight", "w2.weight")) else 1
                nn.init.normal_(parameter, std=0.02 * scale)

    @classmethod
    def from_official(
        cls, source: str | Path | Mapping[str, Any], **sizes: Any
    ) -> LlamaGenTransformer:
        """Load the authors' checkpoint; sizes are read off its tensors where that is possible.

        Args:
            source: path or state dict.
            **sizes: what cannot be read off, such as `num_heads` and `grid`.

        Raises:
            CheckpointError: a file that cannot be read or does not fit, naming the key.
        """
        name = "the given state dict" if isinstance(source, Mapping) else str(source)
        sizes, place = split_placement(sizes)
        tensors = read_state_dict(source, TRANSFORMER_WRAPPERS)
        found = transformer_sizes(tensors, name, sizes, source)
        weights = {key: value for key, value in tensors.items() if key not in STRAY_KEYS}
        return load_strictly(cls, found, weights, name, **place)

    @property
    def is_text_conditional(self) -> bool:
        """Whether the conditions are captions rather than classes."""
        return isinstance(self.cls_embedding, CaptionEmbedding)

    @property
    def num_tokens(self) -> int:
        """Image tokens of one sample."""
        return self.config["grid"][0] * self.config["grid"][1]

    def rotary(self) -> Tensor:
        """The rotary table of the whole sequence, float32 (float64 in a float64 model)."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        place = place_of(self)
        key = (place, dtype)
        if key not in self._rotary:
            table = rotary_table(
                tuple(self.config["grid"]),
                self.config["hidden_size"] // self.config["num_heads"],
                self.num_condition_tokens,
                self.config["rope_theta"],
            )
            self._rotary[key] = table.to(device=place, dtype=dtype)
        return self._rotary[key]

    @entry
    def class_rows(self, class_ids: Tensor) -> Tensor:
        """Conditioning rows [R, 1, C] of class ids [R], or of weights [R, num_classes + 1] of classes;
        `num_classes` is the null class."""
        return embed_mixture(self.cls_embedding, class_ids)

    @entry
    def caption_rows(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Conditioning rows [R, L, C] of caption features [R, L, caption_dim], and null rows."""
        return self.cls_embedding(features), self.cls_embedding(self.cls_embedding.null(features))

    def forward(
        self,
        inputs: Tensor,
        rotary: Tensor,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: AttentionCache | None = None,
        num_logits: int | None = None,
    ) -> Tensor:
        """Inputs to logits of the last `num_logits` positions, float32 or wider.

        Args:
            inputs: tokens [R, T] int64, or conditioning rows and embedded tokens [R, T, C].
            rotary: (cos, sin) of their positions, see `rotary`.
            mask: [R or 1, 1, T, S] bool, true where a query may look.
            is_causal: a plain causal mask, without a cache.
            cache: key and value cache.
            num_logits: how many positions, from the right, need logits; None for all.
        """
        x = inputs if inputs.is_floating_point() else self.tok_embeddings(inputs)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, index, mask=mask, is_causal=is_causal, cache=cache)
        if num_logits is not None:
            x = x[:, -num_logits:]
        logits = self.output(self.norm(x))
        return logits if logits.dtype == torch.float64 else logits.float()

    def teacher_forced(
        self, conditions: Tensor, tokens: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """Logits [B, N, V] of every image token given its condition and the tokens before it.

        Args:
            conditions: conditioning rows [B, P, C].
            tokens: [B, N] int64; the last one is not looked at.
            valid: [B, P] bool, false on the padding of a caption; None for no padding.
        """
        num_conditions = conditions.shape[1]
        inputs = torch.cat([conditions, self.tok_embeddings(tokens[:, :-1])], dim=1)
        length = inputs.shape[1]
        mask = None if valid is None else prefix_mask(valid, length)
        return self(
            inputs,
            self.rotary()[:length],
            mask=mask,
            is_causal=mask is None,
            num_logits=length - num_conditions + 1,
        )


def prefix_mask(valid: Tensor, length: int) -> Tensor:
    """Causal mask [B, 1, length, length] with the padding columns of captions closed.

    `valid` [B, P] marks the caption rows that count; the diagonal stays open.
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    open_columns = valid.new_ones(valid.shape[0], length)
    open_columns[:, : valid.shape[1]] = valid
    diagonal = torch.eye(length, dtype=torch.bool, device=valid.device)
    return ((causal & open_columns[:, None]) | diagonal)[:, None]
