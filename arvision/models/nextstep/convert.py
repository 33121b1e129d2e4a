"""The folders in which NextStep is published: their files, and the sizes that these tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checkpoint import (
    StateDict,
    check_sizes,
    count_numbered,
    known_sizes,
    read_state_dict,
    shape_of,
)
from ...errors import CheckpointError
from ...files import user_path
from ...schema import read_json

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
POSITION_TABLE = "gen_pos_embed"
"""A fixed table that files hold whether it is used or not."""

NETWORK_ALIASES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "num_positions",
    "o_attention_bias": "output_bias",
    "fm_head_dim": "head_width",
    "fm_head_layers": "head_depth",
    "boi": "begin_image",
    "eoi": "end_image",
    "image_placeholder_id": "image_placeholder",
    "pad_token_id_added": "pad_token",
}
"""The names of `config.json` and ours; it may hold many more, which do not concern the sizes."""

NETWORK_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "rms_norm_eps",
    "rope_theta",
    "num_positions",
    "attention_bias",
    "output_bias",
    "latent_channels",
    "latent_patch_size",
    "head_width",
    "head_depth",
    "begin_image",
    "end_image",
    "image_placeholder",
    "pad_token",
    "grid",
    "num_sampling_steps",
    "shift",
    "release",
    "use_norm",
    "positive_prompt",
    "negative_prompt",
    "image_guidance_scale",
    "use_gen_pos_embed",
)

UNSUPPORTED = {"mlp_bias": (False, None), "rope_scaling": (None,)}
"""What a configuration may say that the network here does not do, and what it may say instead."""

AUTOENCODER_ALIASES = {"z_channels": "latent_channels", "psz": "patch_size"}
AUTOENCODER_SIZES = (
    "ch",
    "ch_mult",
    "num_res_blocks",
    "latent_channels",
    "scaling_factor",
    "shift_factor",
    "encoder_norm",
    "patch_size",
)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file with an object in it.

    Raises:
        CheckpointError: it is missing or something else.
    """
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a JSON object ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def network_files(
    source: str | Path | Mapping[str, Any],
) -> tuple[str, dict[str, Any], StateDict]:
    """Name for messages, `config.json` and tensors of the language model and the head.

    Raises:
        CheckpointError: not a folder, or one without weights or configuration.
    """
    if isinstance(source, Mapping):
        name, config = "the given state dict", {}
        tensors = read_state_dict(source, ())
    else:
        folder, name = user_path(source), str(source)
        if not folder.is_dir():
            raise CheckpointError(
                f"{name}: no such folder; expected one with {' or '.join(WEIGHTS)}"
            )
        config = read_config(folder / "config.json")
        found = [folder / file for file in WEIGHTS if (folder / file).is_file()]
        if not found:
            raise CheckpointError(f"{name}: expected {' or '.join(WEIGHTS)} in it")
        name = str(found[0])
        tensors = read_state_dict(found[0], ())
    if not config.get("use_gen_pos_embed"):
        tensors = {key: value for key, value in tensors.items() if key != POSITION_TABLE}
    return name, config, tensors


def network_sizes(
    tensors: StateDict, config: dict[str, Any], name: str, sizes: dict[str, Any]
) -> dict[str, Any]:
    """Constructor arguments of the network that `tensors` fits.

    Args:
        tensors: official names to tensors.
        config: content of `config.json`, names that are no sizes included.
        name: of the file, for messages.
        sizes: what the caller knows, our names or the authors'; it wins over `config`.

    Raises:
        CheckpointError: a size that cannot be known or disagrees with the tensors, or a
            configuration that needs what this network does not do.
        InputError: a size that there is not.
    """
    for key, allowed in UNSUPPORTED.items():
        if config.get(key) not in allowed:
            raise CheckpointError(f"{name}: {key} {config[key]!r} is not supported")
    concerned = {
        key: value
        for key, value in config.items()
        if NETWORK_ALIASES.get(key, key) in NETWORK_SIZES
    }
    given = known_sizes(concerned, NETWORK_SIZES, "NextStep network", NETWORK_ALIASES)
    given |= known_sizes(sizes, NETWORK_SIZES, "NextStep network", NETWORK_ALIASES)
    vocab_size, width = shape_of(tensors, "embed_tokens.weight", 2, name)
    head_width, latent_dim = shape_of(tensors, "image_head.net.input_proj.weight", 2, name)
    found: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_layers": count_numbered(tensors, "layers"),
        "intermediate_size": shape_of(tensors, "layers.0.mlp.up_proj.weight", 2, name)[0],
        "attention_bias": "layers.0.self_attn.q_proj.bias" in tensors,
        "output_bias": "layers.0.self_attn.o_proj.bias" in tensors,
        "head_width": head_width,
        "head_depth": count_numbered(tensors, "image_head.net.res_blocks"),
    }
    check_sizes(found, given, name)
    return given | found | _heads(tensors, given, name) | _patch(given, latent_dim, name)


def _heads(tensors: StateDict, given: dict[str, Any], name: str) -> dict[str, Any]:
    """Numbers of heads and their width, of which one has to be known."""
    queries = shape_of(tensors, "layers.0.self_attn.q_proj.weight", 2, name)[0]
    keys = shape_of(tensors, "layers.0.self_attn.k_proj.weight", 2, name)[0]
    head_dim = given.get("head_dim")
    if head_dim is None:
        if "num_heads" not in given:
            raise CheckpointError(
                f"{name}: num_heads cannot be read off the tensors: pass num_heads"
            )
        head_dim = queries // given["num_heads"]
    found = {
        "num_heads": queries // head_dim,
        "num_kv_heads": keys // head_dim,
        "head_dim": head_dim,
    }
    check_sizes(found, given, name)
    return found


def _patch(given: dict[str, Any], latent_dim: int, name: str) -> dict[str, Any]:
    """How a token's values divide into channels and a square."""
    side = given.get("latent_patch_size", 2)
    found = {"latent_patch_size": side, "latent_channels": latent_dim // side**2}
    if latent_dim % side**2:
        raise CheckpointError(
            f"{name}: tokens of {latent_dim} values are no {side} x {side} squares"
        )
    check_sizes(found, given, name)
    return found


def autoencoder_sizes(
    tensors: StateDict, config: dict[str, Any], name: str, sizes: dict[str, Any]
) -> dict[str, Any]:
    """Constructor arguments of the autoencoder that `tensors` fits; arguments as above.

    Raises:
        CheckpointError: see `network_sizes`; also where nothing says the latents' scale or shift,
            which no tensor tells.
    """
    concerned = {
        key: value
        for key, value in config.items()
        if AUTOENCODER_ALIASES.get(key, key) in AUTOENCODER_SIZES
    }
    kind = "NextStep autoencoder"
    given = known_sizes(concerned, AUTOENCODER_SIZES, kind, AUTOENCODER_ALIASES)
    given |= known_sizes(sizes, AUTOENCODER_SIZES, kind, AUTOENCODER_ALIASES)
    for key in ("scaling_factor", "shift_factor"):
        if key not in given:
            raise CheckpointError(f"{name}: nothing says {key}: expected it in config.json")
    ch = shape_of(tensors, "encoder.conv_in.weight", 4, name)[0]
    widths = [
        shape_of(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4, name)[0]
        for i in range(count_numbered(tensors, "encoder.down"))
    ]
    found = {
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": count_numbered(tensors, "encoder.down.0.block"),
        "latent_channels": shape_of(tensors, "decoder.conv_in.weight", 4, name)[1],
    }
    check_sizes(found, given, name)
    return given | found
