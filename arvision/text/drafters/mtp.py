"""MTP layers that ship inside models: the extra layer that was trained to guess one token further.

transformers leaves the weights of such layers behind when it loads a model. Here they are read from the
model's own files, in the layouts that are published, into a decoder layer of the model's class:

- "nextn" (DeepSeek-V3, GLM-4.5): one layer more than the model has, `model.layers.N.*`, with `enorm`,
  `hnorm`, `eh_proj` and `shared_head.norm`;
- "mtp" (Qwen3-Next, Qwen3.5): `mtp.layers.0.*`, with `mtp.pre_fc_norm_embedding`,
  `mtp.pre_fc_norm_hidden`, `mtp.fc` and `mtp.norm`;
- "mtp_layers" (MiMo-7B): `model.mtp_layers.0.*`, with `token_layernorm`, `hidden_layernorm`, `input_proj`
  (the hidden state first) and `final_layernorm`.

Paper: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 2.2.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import Held, check_fit
from ...decoding.transformers_cache import TextSizes
from ...errors import CheckpointError, InputError
from ...files import user_path
from ..layers import find_layers
from ..state import FULL
from .base import register
from .features import FeatureTree, cache_name


@dataclass(frozen=True)
class Layout:
    """Where a published MTP layer's weights stand.

    Attributes:
        block: prefix of the decoder layer, `{}` for the number of the model's layers.
        parts: prefix of what stands around it.
        names: of the norms of embedding and hidden state, of the projection, and of the last norm.
        hidden_first: whether the projection takes the hidden state before the embedding.
        hands_on_normed: whether the next level gets what the last norm made, or what went into it.
    """

    block: str
    parts: str
    names: tuple[str, str, str, str]
    hidden_first: bool = False
    hands_on_normed: bool = True


LAYOUTS = {
    "nextn": Layout(
        "model.layers.{}.",
        "model.layers.{}.",
        ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
        hands_on_normed=False,
    ),
    "mtp": Layout(
        "mtp.layers.0.", "mtp.", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
    ),
    "mtp_layers": Layout(
        "model.mtp_layers.0.",
        "model.mtp_layers.0.",
        ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
        hidden_first=True,
    ),
}
SHARED = ("embed_tokens.weight", "shared_head.head.weight", "rotary_emb.inv_freq")
"""Copies of the model's own weights in such a layer, which are not needed again."""

MTP_FILE = "mtp.json"
"""Figures that `arvision train-draft --kind mtp` writes beside a layer."""

EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


class MTPLayer(nn.Module):
    """A decoder layer of a model's class on embedding and hidden state; a feature network.

    Args:
        network: the model; its embeddings, rotation and output layer are used as they are.
        layout: a name in `LAYOUTS`.

    Raises:
        InputError: a model whose layers are not of the usual kind.
    """

    def __init__(self, network: Any, layout: str) -> None:
        super().__init__()
        self.layout = LAYOUTS[layout]
        owner, name = find_layers(network)
        last = getattr(owner, name)[-1]
        final = getattr(owner, "norm", None)
        rotary = getattr(network.get_decoder(), "rotary_emb", None)
        if final is None or rotary is None or not hasattr(last, "self_attn"):
            raise InputError(
                f"{type(network).__name__} has no norm, rotary_emb or self_attn: expected a model "
                "of Llama's kind for its MTP layer"
            )
        # In a tuple: the model's weights are no part of the layer's.
        self._model = (network, rotary)
        config = copy.deepcopy(last.self_attn.config)
        number = config.num_hidden_layers - 1
        if getattr(config, "layer_types", None):
            config.layer_types = [FULL] * config.num_hidden_layers
        width, weight = config.hidden_size, network.get_input_embeddings().weight
        sizes = TextSizes.of(network)
        self.cache_sizes = (sizes.num_kv_heads, sizes.head_dim, sizes.value_dim)
        self.vocab_size = None
        self.block = type(last)(config, number)
        self.block.self_attn.layer_idx = 0
        self.embedding_norm, self.hidden_norm, self.last_norm = (
            copy.deepcopy(final) for _ in range(3)
        )
        self.projection = nn.Linear(2 * width, width, bias=False)
        if not self.projection.weight.is_meta:
            self.to(weight.device, weight.dtype)
        self._cache = cache_name(self.block)
        self.eval()

    def watches(self, model: Any) -> tuple[int, ...]:
        """What goes into the output layer."""
        return (model.sizes.num_layers,)

    def fuse(self, features: Tensor) -> Tensor:
        """See `FeatureNetwork`."""
        return features.to(self.projection.weight.dtype)

    def step(
        self, embedded: Tensor, hidden: Tensor, mask: Tensor, positions: Tensor, cache: Any
    ) -> Tensor:
        """See `FeatureNetwork`."""
        sides = [self.embedding_norm(embedded), self.hidden_norm(hidden)]
        if self.layout.hidden_first:
            sides.reverse()
        joined = self.projection(torch.cat(sides, dim=-1))
        out = self.block(
            joined,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=self._model[1](joined, positions),
            **{self._cache: cache},
        )
        out = out[0] if isinstance(out, tuple) else out
        return self.last_norm(out) if self.layout.hands_on_normed else out

    def logits(self, hidden: Tensor) -> Tensor:
        """See `FeatureNetwork`: the model's own output layer."""
        if not self.layout.hands_on_normed:
            hidden = self.last_norm(hidden)
        return self._model[0].get_output_embeddings()(hidden)


def read_mtp(folder: str | Path, num_layers: int) -> tuple[str, dict[str, Tensor]]:
    """The weights of the first MTP layer in a model's folder, without reading the others.

    Args:
        folder: of safetensors.
        num_layers: of the model.

    Returns:
        The name of the layout, and the tensors under the names of `MTPLayer`.

    Raises:
        CheckpointError: a folder without safetensors, or without such a layer.
    """
    from safetensors import safe_open

    folder = user_path(folder)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors, expected the folder of the model")
    places: dict[str, Path] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as content:
                places |= dict.fromkeys(content.keys(), file)
        for name, layout in LAYOUTS.items():
            wanted = _wanted(layout, num_layers, list(places))
            if not wanted:
                continue
            tensors = {}
            for file in sorted(set(map(places.__getitem__, wanted))):
                with safe_open(file, framework="pt") as content:
                    for key in wanted:
                        if places[key] == file:
                            tensors[wanted[key]] = content.get_tensor(key)
            return name, _joined_experts(tensors)
    except CheckpointError:
        raise
    except Exception as error:  # safetensors raises its own class
        raise CheckpointError(f"{folder}: cannot be read ({error}); is it complete?") from error
    raise CheckpointError(
        f"{folder}: no MTP layer, expected {', '.join(x.block for x in LAYOUTS.values())} with N = "
        f"{num_layers} and what belongs to it"
    )


def _wanted(layout: Layout, num_layers: int, keys: list[str]) -> dict[str, str]:
    """The keys of a layout's layer and their names in `MTPLayer`; empty where its projection is none."""
    block, parts = layout.block.format(num_layers), layout.parts.format(num_layers)
    own = dict(
        zip(layout.names, ("embedding_norm", "hidden_norm", "projection", "last_norm"), strict=True)
    )
    if f"{parts}{layout.names[2]}.weight" not in keys:
        return {}
    found = {}
    for key in keys:
        part = key.removeprefix(parts).removesuffix(".weight")
        if key.startswith(parts) and part in own:
            found[key] = f"{own[part]}.weight"
        elif key.startswith(block) and not key.endswith(SHARED):
            found[key] = f"block.{key.removeprefix(block)}"
    return found


def _joined_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts that are stored one by one as the tensors of all that transformers computes with."""
    single: dict[str, dict[tuple[int, str], Tensor]] = {}
    rest = {}
    for key, value in tensors.items():
        match = EXPERT.search(key)
        if match is None:
            rest[key] = value
        else:
            single.setdefault(key[: match.start()], {})[int(match[1]), match[2]] = value
    for prefix, experts in single.items():
        numbers = sorted({number for number, _ in experts})
        both = [torch.cat([experts[n, "gate"], experts[n, "up"]]) for n in numbers]
        rest[f"{prefix}mlp.experts.gate_up_proj"] = torch.stack(both)
        rest[f"{prefix}mlp.experts.down_proj"] = torch.stack([experts[n, "down"] for n in numbers])
    return rest


def load_mtp(network: Any, folder: str | Path) -> MTPLayer:
    """The MTP layer that ships with a model.

    Args:
        network: the model, loaded.
        folder: its folder.

    Raises:
        CheckpointError: no such layer there, or one that does not fit the model.
        InputError: a model of another kind.
    """
    layout, tensors = read_mtp(folder, TextSizes.of(network).num_layers)
    with torch.device("meta"):
        layer = MTPLayer(network, layout)
    check_fit(layer, {key: Held.of(value) for key, value in tensors.items()}, str(folder))
    weight = network.get_input_embeddings().weight
    held = layer.state_dict()
    cast = {
        key: value.to(weight.device, weight.dtype if held[key].is_floating_point() else None)
        for key, value in tensors.items()
    }
    layer.load_state_dict(cast, strict=True, assign=True)
    return layer


@register(
    "mtp", summary="the MTP layer in a model's own files: DeepSeek-V3, GLM-4.5, Qwen3-Next, MiMo"
)
class MTP(FeatureTree):
    """Drafts from the MTP layer that ships inside the model.

    The first such layer drafts every level, as serving engines use it; a layer reads its own output
    where the model's is not known yet.

    Args:
        folder: with the model's safetensors; None for the one that the model was loaded from.
        num_draft: candidates per pass.
        max_depth: levels.
        **options: of `DraftTree`.

    Raises:
        CheckpointError: at use, no MTP layer in the folder.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        num_draft: int = 4,
        max_depth: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(_Unread(), num_draft=num_draft, max_depth=max_depth, **options)
        self._folder = folder
        self._of: Any = None

    def watches(self, model: Any) -> tuple[int, ...]:
        """Read the layer, once per model; what goes into the output layer."""
        network = model.network
        if self._of is not network:
            folder = self._folder or getattr(network.config, "_name_or_path", "") or "."
            self.draft: Any = load_mtp(network, folder)
            self._of = network
        return super().watches(model)


class _Unread:
    """Stands for a layer that is not read yet."""

    vocab_size = None
