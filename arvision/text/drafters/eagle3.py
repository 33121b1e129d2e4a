"""EAGLE-3: a head of one decoder layer on the target's low, middle and high features.

Checkpoints are read and written in the layout that is published for serving engines: `fc`, `midlayer`,
`norm`, `lm_head`, and the draft vocabulary as `d2t` (the target's id minus the draft's) and `t2d`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from ...checkpoint import Held, check_fit, read_state_dict
from ...errors import CheckpointError, InputError
from ...files import user_path, write_bytes, write_json
from ...schema import read_json
from .base import register
from .features import FeatureTree, cache_name

FILE = "model.safetensors"
ARCHITECTURE = "LlamaForCausalLMEagle3"
NEEDED = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
MOST = 1 << 20
"""Of any size that a head's configuration names."""


class Midlayer(nn.Module):
    """A Llama layer that attends from embedding and feature side by side, twice as wide as usual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = LlamaAttention(config, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            usual = getattr(self.self_attn, name)
            bias = usual.bias is not None
            setattr(self.self_attn, name, nn.Linear(2 * width, usual.out_features, bias=bias))
        self.mlp = LlamaMLP(config)
        self.hidden_norm = LlamaRMSNorm(width, eps)
        self.input_layernorm = LlamaRMSNorm(width, eps)
        self.post_attention_layernorm = LlamaRMSNorm(width, eps)
        self._cache = cache_name(self.self_attn)
        self._norms_residual = bool(getattr(config, "norm_before_residual", False))

    def forward(
        self, embedded: Tensor, hidden: Tensor, mask: Tensor, rotation: Any, cache: Any
    ) -> Tensor:
        """See `FeatureNetwork.step`."""
        normed = self.hidden_norm(hidden)
        residual = normed if self._norms_residual else hidden
        both = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        attended, _ = self.self_attn(
            both, position_embeddings=rotation, attention_mask=mask, **{self._cache: cache}
        )
        hidden = residual + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Head(nn.Module):
    """The head; a feature network for `FeatureTree`.

    Args:
        config: sizes in Llama's words, and `draft_vocab_size`; `target_hidden_size` where the
            target is of another width.

    Paper: Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via
    Training-Time Test", 2025, sections 3.1-3.2.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        config._attn_implementation = "sdpa"
        self.config = config
        self.vocab_size: int = config.vocab_size
        width = config.hidden_size
        num = getattr(config, "draft_vocab_size", None) or config.vocab_size
        self.target_width = getattr(config, "target_hidden_size", None) or width
        self.fc = nn.Linear(3 * self.target_width, width, bias=False)
        self.midlayer = Midlayer(config)
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, num, bias=False)
        self.register_buffer("d2t", torch.zeros(num, dtype=torch.int64))
        self.register_buffer("t2d", torch.ones(config.vocab_size, dtype=torch.bool))
        self.rotary = LlamaRotaryEmbedding(config)

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """See `FeatureNetwork`."""
        attention = self.midlayer.self_attn
        width = attention.head_dim
        return attention.k_proj.out_features // width, width, width

    @property
    def vocabulary(self) -> Tensor:
        """The target's ids of the draft vocabulary, [W]."""
        offsets = torch.as_tensor(self.d2t)
        return torch.arange(len(offsets), device=offsets.device) + offsets

    def watches(self, model: Any) -> tuple[int, ...]:
        """See `layers_of`."""
        return self.layers_of(model.sizes.num_layers, model.sizes.hidden_size, model.vocab_size)

    def layers_of(self, num: int, width: int, vocab_size: int) -> tuple[int, ...]:
        """A low, a middle and a high layer, as published, or those that the configuration names.

        Args:
            num: layers of the target.
            width: of its hidden states.
            vocab_size: its tokens.

        Raises:
            InputError: a target of another width or vocabulary, or layers that it does not have.
        """
        if width != self.target_width:
            raise InputError(
                f"an EAGLE-3 head for a target of width {self.target_width}: the model has {width}"
            )
        if int(self.vocabulary.max()) >= vocab_size:
            raise InputError(
                f"the EAGLE-3 head guesses the token {int(self.vocabulary.max())}: the model has "
                f"{vocab_size}"
            )
        named = (getattr(self.config, "eagle_config", None) or {}).get(
            "eagle_aux_hidden_state_layer_ids"
        )
        layers = tuple(named or (min(2, num - 1), num // 2, max(0, num - 3)))
        if len(layers) != 3 or not all(0 <= layer <= num for layer in layers):
            raise InputError(f"the EAGLE-3 head looks at the layers {layers}: the model has {num}")
        return layers

    def fuse(self, features: Tensor) -> Tensor:
        """See `FeatureNetwork`."""
        return self.fc(features.to(self.fc.weight.dtype))

    def step(
        self, embedded: Tensor, hidden: Tensor, mask: Tensor, positions: Tensor, cache: Any
    ) -> Tensor:
        """See `FeatureNetwork`."""
        rotation = self.rotary(hidden, positions)
        return self.midlayer(embedded, hidden, mask, rotation, cache)

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., W] of the draft vocabulary."""
        return self.lm_head(self.norm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """See `FeatureNetwork`; what is not in the draft vocabulary cannot be drafted."""
        found = self.draft_logits(hidden)
        if found.shape[-1] == self.vocab_size:
            return found
        whole = found.new_full((*found.shape[:-1], self.vocab_size), float("-inf"))
        whole[..., self.vocabulary] = found
        return whole


def save_eagle3(head: Eagle3Head, folder: str | Path, **facts: Any) -> None:
    """Write a head into a folder, in the published layout."""
    from safetensors.torch import save

    folder = user_path(folder)
    tensors = {key: value.detach().cpu().contiguous() for key, value in head.state_dict().items()}
    write_bytes(folder / FILE, save(tensors))
    config = head.config.to_dict() | {"architectures": [ARCHITECTURE]} | facts
    write_json(folder / "config.json", config)


def load_eagle3(folder: str | Path) -> Eagle3Head:
    """A head in the published layout; names of `speculators` (`layers.0.` for `midlayer.`) too.

    Raises:
        CheckpointError: a file that is missing or does not fit.
    """
    folder = user_path(folder)
    try:
        settings = read_json(folder / "config.json")
    except (OSError, InputError) as error:
        raise CheckpointError(
            f"{folder}: no EAGLE-3 head, expected config.json and {FILE}"
        ) from error
    settings = dict(settings) if isinstance(settings, dict) else {}
    missing = [name for name in NEEDED if not _is_size(settings.get(name))]
    if missing:
        raise CheckpointError(
            f"{folder / 'config.json'}: {missing[0]} {settings.get(missing[0])!r}: expected the "
            "sizes of an EAGLE-3 head"
        )
    tensors = {}
    for key, value in read_state_dict(folder, ()).items():
        name = key.removeprefix("model.").replace("layers.0.", "midlayer.", 1)
        # The target's own embeddings are used: a copy of them may be there.
        if name not in ("embed_tokens.weight", "rotary_emb.inv_freq"):
            tensors[name] = value
    if "lm_head.weight" in tensors:
        settings["draft_vocab_size"] = len(tensors["lm_head.weight"])
    settings.pop("model_type", None)
    try:
        config = LlamaConfig(**settings)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        head = Eagle3Head(config)
    if "d2t" not in tensors and settings.get("draft_vocab_size") == config.vocab_size:
        tensors["d2t"] = torch.zeros(config.vocab_size, dtype=torch.int64)
    tensors.setdefault("t2d", torch.ones(config.vocab_size, dtype=torch.bool))
    check_fit(head, {key: Held.of(value) for key, value in tensors.items()}, str(folder))
    tensors["d2t"] = tensors["d2t"].long()
    head.load_state_dict(tensors, strict=True, assign=True)
    head.rotary = LlamaRotaryEmbedding(config)  # its frequencies are in no checkpoint
    ids = head.vocabulary
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise CheckpointError(f"{folder}: d2t leads outside the {config.vocab_size} tokens")
    return head.eval()


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST


def is_eagle3(folder: Path) -> bool:
    """Whether a folder holds such a head."""
    try:
        settings = read_json(folder / "config.json")
    except (OSError, InputError):
        return False
    names = settings.get("architectures") if isinstance(settings, dict) else None
    return isinstance(names, list) and any("eagle3" in str(name).lower() for name in names)


@register("eagle3", summary="a feature head of EAGLE-3 (option head)")
class Eagle3(FeatureTree):
    """Drafts from an EAGLE-3 head.

    Args:
        head: a head, or its folder: `arvision train-draft --kind eagle3`, or a published one.
        num_draft: candidates per pass.
        max_depth: levels.
        **options: of `DraftTree`.
    """

    def __init__(
        self,
        head: Eagle3Head | str | Path,
        num_draft: int = 16,
        max_depth: int = 5,
        **options: Any,
    ) -> None:
        head = load_eagle3(head) if isinstance(head, str | Path) else copy.copy(head)
        super().__init__(head, num_draft=num_draft, max_depth=max_depth, **options)

    def begin(self, state: Any) -> None:
        """Bring the head where the target is, and read the prompts."""
        embedding = state.model.network.get_input_embeddings().weight
        self.draft: Any = self.draft.to(state.model.device, embedding.dtype)
        super().begin(state)
