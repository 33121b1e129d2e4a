"""NextStep's network: a language model of transformers between two projections, and a flow head.

Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ...checkpoint import load_strictly
from ...errors import InputError
from ...networks import entry, hot_entry
from ...schema import Count, Layers, NotNegative, Positive, Side, Size
from ..latent_head import HeadHolder, run_part
from ..network import Network
from .convert import network_files, network_sizes

NUM_GEN_POSITIONS = 32 * 32
"""Rows of the table behind `use_gen_pos_embed`."""


class Rotary(nn.Module):
    """Angles of the rotary embedding, always in float32 and without buffers that a cast could spoil.

    Args:
        theta: base of the frequencies.
        head_dim: width of a head.
    """

    def __init__(self, theta: float, head_dim: int) -> None:
        super().__init__()
        self._theta, self._head_dim = theta, head_dim

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [R, T, head_dim] at positions [R, T], in the type of `x`."""
        exponents = torch.arange(0, self._head_dim, 2, device=x.device).float() / self._head_dim
        angles = position_ids[..., None].float() / self._theta**exponents
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class NextStepTransformer(Network):
    """Language model over prompt and latents, and the head that draws the next latent.

    Args:
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size,
            rms_norm_eps, rope_theta, num_positions: of the language model, see transformers'
            `Qwen2Config`.
        attention_bias: biases of queries, keys and values.
        output_bias: bias of the attention's output.
        latent_channels: of the autoencoder.
        latent_patch_size: side of the square of autoencoder latents that make one token.
        head_width, head_depth: sizes of the flow head.
        begin_image, end_image, image_placeholder, pad_token: token ids of the prompt format.
        grid: rows and columns of tokens of the pictures to draw.
        num_sampling_steps, shift, release: of the sampler, see `FlowSteps`.
        use_norm: whether a token is normalised (no mean, unit variance over its values) before it is
            fed and decoded.
        positive_prompt: follows every caption.
        negative_prompt: what guidance leads away from, where a prompt does not say.
        image_guidance_scale: of edits, towards the images given; 1 for the prompt's guidance alone.
        use_gen_pos_embed: whether a fixed table is added to the hidden states that latents are drawn
            from; no released model does so.

    Raises:
        InputError: heads that do not fit the language models of transformers.

    Paper: NextStep Team, "NextStep-1: Toward Autoregressive Image Generation with Continuous Tokens
    at Scale", 2025.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: Size = 152064,
        hidden_size: Size = 5120,
        num_layers: Layers = 48,
        num_heads: Size = 40,
        num_kv_heads: Size = 8,
        head_dim: Size = 128,
        intermediate_size: Size = 13824,
        rms_norm_eps: Positive = 1e-5,
        rope_theta: Positive = 1e6,
        num_positions: Size = 131072,
        attention_bias: bool = True,
        output_bias: bool = False,
        latent_channels: Size = 16,
        latent_patch_size: Side = 2,
        head_width: Size = 1536,
        head_depth: Layers = 12,
        begin_image: Count = 151667,
        end_image: Count = 151668,
        image_placeholder: Count = 151669,
        pad_token: Count = 151665,
        grid: tuple[Side, Side] = (32, 32),
        num_sampling_steps: Side = 50,
        shift: Positive = 1.0,
        release: str = "1",
        use_norm: bool = True,
        positive_prompt: str = "",
        negative_prompt: str = "",
        image_guidance_scale: NotNegative = 2.0,
        use_gen_pos_embed: bool = False,
    ) -> None:
        super().__init__()
        width = hidden_size
        self.num_tokens = grid[0] * grid[1]
        self.latent_dim = latent_channels * latent_patch_size**2
        trunk: Any = _language_model(dict(self.config))
        trunk.rotary_emb = Rotary(rope_theta, head_dim)
        # Its parts are ours under the names that the checkpoints give them; the whole only runs them.
        object.__setattr__(self, "_trunk", trunk)
        self.embed_tokens, self.layers, self.norm = trunk.embed_tokens, trunk.layers, trunk.norm
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.image_in_projector = nn.Linear(self.latent_dim, width)
        self.image_out_projector = nn.Linear(width, width)
        if use_gen_pos_embed:
            if self.num_tokens > NUM_GEN_POSITIONS:
                raise InputError(
                    f"grid {tuple(grid)}: gen_pos_embed has {NUM_GEN_POSITIONS} positions, expected no "
                    "more tokens"
                )
            self.register_buffer("gen_pos_embed", torch.zeros(1, NUM_GEN_POSITIONS, width))
        self.image_head = HeadHolder(self.latent_dim, width, head_width, head_depth, 1)
        accepts = inspect.signature(type(trunk).forward).parameters
        self._cache_name = "cache" if "cache" in accepts else "past_key_values"

    @classmethod
    def from_official(
        cls,
        source: str | Path | Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        **sizes: Any,
    ) -> NextStepTransformer:
        """Load the authors' checkpoint.

        Args:
            source: folder with `config.json` and the weights in one file or in shards, or a state
                dict.
            dtype: of the weights; the 15B model takes 30 GB in bfloat16 and 60 GB in float32.
            **sizes: `grid`, `num_sampling_steps`, `shift`, `release`, `use_norm`, prompts; for a
                state dict everything that `config.json` would say.

        Raises:
            CheckpointError: files that cannot be read or do not fit, naming the key.
        """
        name, config, tensors = network_files(source)
        arguments = network_sizes(tensors, config, name, sizes)
        return load_strictly(cls, arguments, tensors, name, dtype)

    @hot_entry
    def run_head(self, name: str, *arguments: Any) -> Any:
        """Run a part of the flow head, see `arvision.models.latent_head.RunPart`."""
        return run_part(self.image_head.net, name, *arguments)

    @entry
    def embed_prompt(self, ids: Tensor, pictures: Tensor | None = None) -> Tensor:
        """Embeddings [L, W] of token ids [L], placeholders filled with tokens [M, D] of pictures."""
        embeddings = self.embed_tokens(ids)
        places = ids == self.config["image_placeholder"]
        if pictures is None:
            return embeddings
        projected = self.image_in_projector(pictures.to(embeddings.dtype))
        return embeddings.masked_scatter(places[:, None], projected)

    @entry
    def embed_latents(self, latents: Tensor) -> Tensor:
        """What the language model is fed for tokens [..., D], normalised where the model does so."""
        weight = self.image_in_projector.weight
        return self.image_in_projector(self.normalised(latents).to(weight.dtype))

    @entry
    def conditions(self, hidden: Tensor, places: Tensor) -> Tensor:
        """Conditions [..., W] of the latents at `places` [...], from the hidden states before them."""
        if self.config["use_gen_pos_embed"]:
            table = self.get_buffer("gen_pos_embed")[0]
            hidden = hidden + table[places.clamp(max=len(table) - 1)].to(hidden.dtype)
        return self.image_out_projector(hidden)

    def normalised(self, latents: Tensor) -> Tensor:
        """Tokens [..., D] as they are fed and decoded."""
        if not self.config["use_norm"]:
            return latents
        return nn.functional.layer_norm(latents, latents.shape[-1:], eps=1e-6)

    def forward(self, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Hidden states [R, T, W] behind the last normalisation.

        Args:
            embeddings: [R, T, W].
            mask: [R, 1, T, S], added to the attention's scores.
            positions: [R, T] int64.
            cache: of transformers; takes keys and values, gives all S.
        """
        return self._trunk(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self._cache_name: cache},
        ).last_hidden_state


def _language_model(config: dict[str, Any]) -> nn.Module:
    """Qwen2 (biases on queries, keys and values), or Llama (biases everywhere or nowhere)."""
    from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

    sizes: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_heads"],
        "num_key_value_heads": config["num_kv_heads"],
        "head_dim": config["head_dim"],
        "intermediate_size": config["intermediate_size"],
        "rms_norm_eps": config["rms_norm_eps"],
        "max_position_embeddings": config["num_positions"],
        "tie_word_embeddings": False,
        "pad_token_id": None,
    }
    if config["num_heads"] % config["num_kv_heads"]:
        raise InputError(
            f"num_kv_heads {config['num_kv_heads']}: expected a divisor of num_heads "
            f"{config['num_heads']}"
        )
    with_bias, output_bias = config["attention_bias"], config["output_bias"]
    if with_bias and not output_bias:
        return Qwen2Model(Qwen2Config(**sizes))
    if with_bias != output_bias:
        raise InputError("output_bias without attention_bias: no language model is built like that")
    return LlamaModel(LlamaConfig(**sizes, attention_bias=with_bias))
