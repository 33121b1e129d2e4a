"""A causal language model of transformers behind the token model contract."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..contracts import Conditions
from ..decoding.transformers_cache import TextSizes
from ..errors import InputError
from ..networks import CallsNetwork, place_of
from .probe import check_driven
from .processors import Prefixes
from .state import FULL, SLIDING, HFState

ONE_SIZE = {"num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"}
"""What our cache and masks take to be the same in all layers."""


def check_network(network: Any) -> None:
    """Refuse a network whose passes cannot take a tree of candidates.

    Raises:
        InputError: names what is missing.
    """
    config = getattr(network, "config", None)
    name = type(network).__name__
    if config is None or not hasattr(network, "get_output_embeddings"):
        raise InputError(f"{name}: expected a causal language model of transformers")
    if name == "GlmImageForConditionalGeneration":
        raise InputError(
            f"{name} draws images, at positions of their own: expected arvision.models.GlmImage, or "
            "arvision.accelerate"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    # Such a configuration does not even tell the sizes that differ.
    varied = ONE_SIZE & set(getattr(text, "per_layer_attributes", None) or ())
    if varied:
        raise InputError(
            f"{name} cannot be driven here, it lacks: the same {', '.join(sorted(varied))} in every "
            "layer"
        )
    missing = []
    if getattr(config, "is_encoder_decoder", False):
        missing.append("a decoder without an encoder")
    accepts = inspect.signature(network.forward).parameters
    for argument, why in (
        ("attention_mask", "an attention mask"),
        ("position_ids", "position ids (siblings in a tree share a position)"),
    ):
        if argument not in accepts:
            missing.append(why)
    if not {"cache", "past_key_values"} & set(accepts):
        missing.append("a key/value cache")
    if network.get_output_embeddings() is None:
        missing.append("an output layer (get_output_embeddings)")
    other = layer_kinds(text) - {FULL, SLIDING}
    if other:
        missing.append(
            f"full or windowed attention in every layer (it has {', '.join(sorted(other))})"
        )
    elif SLIDING in layer_kinds(text) and not isinstance(text.sliding_window, int):
        missing.append(f"one window for all layers (sliding_window {text.sliding_window!r})")
    if getattr(text, "num_kv_shared_layers", 0):
        missing.append("keys and values of its own in every layer")
    if hasattr(config, "vq_config") and hasattr(network.base_model, "get_rope_index"):
        missing.append("positions in one dimension (draw its images with arvision.models)")
    if missing:
        raise InputError(f"{name} cannot be driven here, it lacks: {'; '.join(missing)}")


def layer_kinds(config: Any) -> set[str]:
    """What the layers of a text configuration attend to, in transformers' words."""
    kinds: set[str] = set(getattr(config, "layer_types", None) or ())
    if "local" in (getattr(config, "attention_layers", None) or ()):
        kinds.add("local attention")
    if not kinds:
        window = getattr(config, "sliding_window", None)
        kinds.add(SLIDING if window and getattr(config, "use_sliding_window", True) else FULL)
    return kinds


def device_of(network: Any) -> torch.device:
    """Where a network's passes run; its weights may wait elsewhere (offloading by accelerate)."""
    place = place_of(network)
    if place.type == "meta":
        raise InputError(
            f"{type(network).__name__} has weights on the device meta: expected loaded ones"
        )
    return place


IMAGE_STARTS = {
    "JanusForConditionalGeneration": "Janus",
    "Emu3ForConditionalGeneration": "Emu3",
    "ChameleonForConditionalGeneration": "Chameleon",
}
"""Networks that write text and draw images, and who draws them here."""


def image_start_of(network: Any) -> int | None:
    """The id behind which such a network draws an image; None for any other, or where none tells."""
    name = type(network).__name__
    if name == "JanusForConditionalGeneration":
        settings = getattr(network.generation_config, "generation_kwargs", None) or {}
        return settings.get("boi_token_id")
    opening = {"Emu3": "<|image token|>", "Chameleon": "<racm3:break>"}
    names = getattr(network.config, "vocabulary_map", None) or {}
    return names.get(opening.get(IMAGE_STARTS.get(name, ""), ""))


class HFCausalLM(CallsNetwork):
    """A causal language model as a token model: conditions are prompts, tokens are what follows.

    Args:
        network: a causal language model of transformers. Its passes must accept a four-dimensional
            attention mask, position ids and a cache, and attend to everything before a token, or
            in all or some layers to a window of it: Llama, Mistral, Qwen, Gemma, gpt-oss, OLMo,
            Cohere, SmolLM, GPT-2, GPT-NeoX and many more. It may be compiled or offloaded by
            accelerate.
        num_tokens: new tokens that a state has room for; None for what the positions allow.
        tree_room: candidates that a pass can hold besides.

    Raises:
        InputError: an unsupported architecture; the message names what is missing. What a network
            does not tell is tried once, see `arvision.text.probe`.
    """

    grid: tuple[int, int] | None = None
    takes_trees = True

    def __init__(
        self, network: Any, num_tokens: int | None = None, *, tree_room: int = 128
    ) -> None:
        self.called = network
        network = self.network
        check_network(network)
        config = network.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.layer_kinds = layer_kinds(text)
        self.attention_window: int | None = getattr(text, "sliding_window", None)
        self.sizes = TextSizes.of(network)
        self.vocab_size: int = network.get_output_embeddings().weight.shape[0]
        self.num_tokens = num_tokens or self.sizes.num_positions
        self.tree_room = tree_room
        self.prefixes: Prefixes | None = None
        """Processors that act on the logits of the next state."""
        self.watched: tuple[int, ...] = ()
        """What the next state keeps of its passes, see `HFState.features`."""
        check_driven(self)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return device_of(self.network)

    @property
    def cost_key(self) -> str:
        """What the cost of a pass depends on, apart from the machine."""
        sizes = self.sizes
        dtype = self.network.get_input_embeddings().weight.dtype
        return (
            f"{type(self.network).__name__} {sizes.num_layers}x{sizes.hidden_size} "
            f"{self.vocab_size} {dtype} {self.device.type}"
        )

    def prompts(self, conditions: Conditions) -> list[Tensor]:
        """Prompts as id tensors [L] on the model's device.

        Raises:
            InputError: an empty prompt, an id out of range, or no room for it.
        """
        prompts, image_start = [], image_start_of(self.network)
        for row, condition in enumerate(conditions):
            ids = torch.as_tensor(condition, dtype=torch.int64, device=self.device)
            if ids.dim() != 1 or len(ids) == 0:
                raise InputError(f"prompt {row} {tuple(ids.shape)}: expected at least one token id")
            if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
                raise InputError(
                    f"prompt {row} holds the id {int(ids.max())}: expected 0..{self.vocab_size - 1}"
                )
            if image_start is not None and int(ids[-1]) == image_start:
                family = IMAGE_STARTS[type(self.network).__name__]
                raise InputError(
                    f"prompt {row} ends where an image starts ({image_start}): a language model "
                    f"writes text, expected arvision.models.{family}"
                )
            if len(ids) >= self.sizes.num_positions:
                raise InputError(
                    f"prompt {row} has {len(ids)} tokens: the model has "
                    f"{self.sizes.num_positions} positions"
                )
            prompts.append(ids)
        return prompts

    def start(self, conditions: Conditions, guidance_scale: float = 1.0) -> tuple[HFState, Tensor]:
        """Prefill the prompts.

        Args:
            conditions: one per row, token ids [L].
            guidance_scale: 1; a language model has no null condition.

        Returns:
            The state, and the logits [B, V] of the first new token.

        Raises:
            InputError: a bad prompt, or guidance.
        """
        if guidance_scale != 1.0:
            raise InputError(f"guidance_scale {guidance_scale}: a language model takes 1 only")
        prompts = self.prompts(conditions)
        longest = max(map(len, prompts), default=1)
        new = max(1, min(self.num_tokens, self.sizes.num_positions - longest))
        state = HFState(self, len(prompts), longest + new + self.tree_room)
        return state, state.prefill(prompts)

    def decode(self, tokens: Tensor) -> Tensor:
        """There are no images in a language model's tokens.

        Raises:
            InputError: always; decode the text with the tokenizer.
        """
        raise InputError("a language model's tokens are text: decode them with its tokenizer")


def as_text_model(model: Any, num_tokens: int, tree_room: int = 128) -> HFCausalLM:
    """`model` with room for `num_tokens`: a network of transformers, or an `HFCausalLM`."""
    network = model.called if isinstance(model, HFCausalLM) else model
    return HFCausalLM(network, num_tokens, tree_room=tree_room)


def pad_right(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts [L_i] as one tensor [B, L], padded with their last token, and lengths [B]."""
    lengths = torch.tensor([len(ids) for ids in prompts], device=prompts[0].device)
    longest = int(lengths.max())
    rows = [torch.cat([ids, ids[-1:].expand(longest - len(ids))]) for ids in prompts]
    return torch.stack(rows), lengths
