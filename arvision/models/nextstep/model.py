"""NextStep as a continuous model: prompts in, laws of latents and pixels out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...contracts import Conditions
from ...decoding.logits import check_guidance_scale
from ...errors import CheckpointError, InputError
from ...files import user_path
from ...networks import enter, place_of
from ..conditions import ImagePrompt
from ..pixels import EncodesPixels, read_pixels
from .autoencoder import NextStepAutoencoder
from .law import FlowSteps, NextStepHead
from .prompt import Captions, PromptFormat
from .state import NextStepState
from .transformer import NextStepTransformer

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


class NextStep(EncodesPixels):
    """NextStep-1 or 1.1 with its autoencoder; see `arvision.contracts.ContinuousModel`.

    Latents are drawn in raster order, each from what a language model makes of the prompt and the
    latents before it.

    Args:
        transformer: the language model with its flow head.
        tokenizer: the autoencoder; without one the model gives latents but not images.
        class_names: none; a pipeline says so.
        text_tokenizer: of transformers; without one, conditions have to be token ids.

    Raises:
        InputError: an autoencoder with other latents than the transformer was built for.

    Paper: NextStep Team, "NextStep-1: Toward Autoregressive Image Generation with Continuous Tokens
    at Scale", 2025.
    """

    is_causal = True

    def __init__(
        self,
        transformer: NextStepTransformer,
        tokenizer: NextStepAutoencoder | None = None,
        class_names: None = None,
        text_tokenizer: Any = None,
    ) -> None:
        self.transformer, self.tokenizer = transformer, tokenizer
        self.captions = None if text_tokenizer is None else Captions(text_tokenizer)
        config = transformer.config
        self.num_tokens, self.latent_dim = transformer.num_tokens, transformer.latent_dim
        self.grid: tuple[int, int] = tuple(config["grid"])
        self._format = PromptFormat(config, text_tokenizer)
        steps = FlowSteps(
            num_steps=config["num_sampling_steps"], shift=config["shift"], release=config["release"]
        )
        net, image_scale = transformer.image_head.net, config["image_guidance_scale"]
        run = partial(enter, transformer, "run_head")
        self.head = NextStepHead(net, steps, image_scale, run)
        if tokenizer is not None:
            theirs = (tokenizer.config["latent_channels"], tokenizer.config["patch_size"])
            ours = (config["latent_channels"], config["latent_patch_size"])
            if theirs != ours:
                raise InputError(
                    f"the autoencoder has {theirs[0]} channels in squares of side {theirs[1]}: expected "
                    f"{ours[0]} in squares of side {ours[1]}, the transformer's"
                )

    @classmethod
    def from_official(
        cls,
        folder: str | Path,
        vae: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        **sizes: Any,
    ) -> NextStep:
        """Load a folder as the authors publish it.

        Args:
            folder: with `config.json`, the weights (one file or shards) and the text tokenizer's
                files, which may be missing.
            vae: folder of the autoencoder (`NextStep-1-f8ch16-Tokenizer`); None for `vae/` in
                `folder`, where release 1.1 has it, or no autoencoder.
            dtype: of the language model and the head; the autoencoder stays in float32.
            **sizes: what the files do not tell: `grid`, `num_sampling_steps`, `shift`, `release`,
                `use_norm`, `positive_prompt`, `negative_prompt`, `image_guidance_scale`.

        Raises:
            CheckpointError: files that cannot be read or do not fit, naming the key.
            InputError: a size that there is not, or out of range.
        """
        network = NextStepTransformer.from_official(folder, dtype, **sizes)
        inside = user_path(folder) / "vae"
        if vae is None and inside.is_dir():
            vae = inside
        autoencoder = None if vae is None else NextStepAutoencoder.from_official(vae)
        return cls(network, autoencoder, text_tokenizer=_text_tokenizer(user_path(folder)))

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return place_of(self.transformer)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the transformer."""
        return self.transformer.dtype

    @property
    def latent_space(self) -> str | None:
        """Names the autoencoder that the latents belong to; None without one."""
        if self.tokenizer is None:
            return None
        sizes = {k: v for k, v in self.tokenizer.config.items() if not k.startswith("_")}
        return str(sorted(sizes.items()))

    def to(self, *args: Any, **kwargs: Any) -> NextStep:
        """Move or cast all networks, as `nn.Module.to` does; returns the model itself."""
        self.transformer.to(*args, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def start(
        self, conditions: Conditions, guidance_scale: float = 1.0, order: Tensor | None = None
    ) -> NextStepState:
        """A state in which no latent is known.

        Args:
            conditions: one per image, captions, token ids [L] of whole prompts, or `ImagePrompt`.
            guidance_scale: 1 costs no further branches. The scale itself is an argument of the head.
            order: [B, N] int64, row by row; anything else is refused.

        Raises:
            InputError: no conditions, one that the model cannot read, edits beside plain prompts, a
                negative scale, a prompt that is too long, or another order.
        """
        check_guidance_scale(guidance_scale)
        if len(conditions) == 0:
            raise InputError("no conditions: expected at least one")
        if order is not None:
            every = torch.arange(self.num_tokens, device=order.device)
            if order.shape != (len(conditions), len(every)) or bool((order != every).any()):
                raise InputError(
                    f"order {tuple(order.shape)}: a causal model draws row by row, expected positions "
                    f"0..{self.num_tokens - 1} for each of {len(conditions)} images"
                )
        branches = [self._branches(condition, guidance_scale != 1) for condition in conditions]
        if len({len(rows) for rows in branches}) > 1:
            raise InputError("prompts with and without images in one batch: expected one kind")
        prompts = [row for rows in zip(*branches, strict=True) for row in rows]
        room = self.transformer.config["num_positions"] - self.num_tokens
        longest = max(len(row) for row in prompts)
        if longest > room:
            raise InputError(
                f"prompt of {longest} tokens: expected at most {room} beside the image"
            )
        return NextStepState(self.transformer, prompts, len(conditions))

    def _branches(self, condition: Any, is_guided: bool) -> list[Tensor]:
        """Embeddings [L, W] of a condition's branches of guidance."""
        given = condition if isinstance(condition, ImagePrompt) else ImagePrompt(condition)
        pictures = [self._encode(image) for image in given.images]
        if given.prompt is None and not pictures:
            # Without a prompt stands what guidance leads away from.
            null = self._format.rows(ImagePrompt("-", given.negative), (), True)[-1]
            rows = [null] * (1 + is_guided)
        else:
            rows = self._format.rows(given, [grid for grid, _ in pictures], is_guided)
        return [
            self._embed(row.to(self.device), [tokens for _, tokens in pictures]) for row in rows
        ]

    def _embed(self, ids: Tensor, pictures: list[Tensor]) -> Tensor:
        tokens = torch.cat(pictures) if pictures else None
        return enter(self.transformer, "embed_prompt", ids, tokens)

    def _encode(self, image: Any) -> tuple[tuple[int, int], Tensor]:
        """Grid and tokens [N, D] of a picture, whose middle is cut to multiples of a token's side.

        Tokens are those of the mean; the released code draws from the autoencoder's posterior. The
        autoencoder has normalised them: `use_norm` concerns what the head draws.
        """
        if self.tokenizer is None:
            raise InputError("this model has no autoencoder: expected one to read images")
        side = self.tokenizer.downsample_factor
        pixels = read_pixels(image, self.tokenizer)
        if len(pixels) != 1:
            raise InputError(f"a source image of {len(pixels)} pictures: expected one")
        height, width = pixels.shape[2:]
        rows, columns = height // side, width // side
        if not (rows and columns):
            raise InputError(f"image of {(width, height)} pixels: expected at least {side} a side")
        top, left = (height - rows * side) // 2, (width - columns * side) // 2
        pixels = pixels[:, :, top : top + rows * side, left : left + columns * side]
        tokens = enter(self.tokenizer, "encode_pixels", pixels)
        return (rows, columns), tokens[0].to(self.device)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of a picture, in pixels."""
        rows, columns = self.grid
        return rows * self.tokenizer.downsample_factor, columns * self.tokenizer.downsample_factor

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Latents [B, N, D] to pixels [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: the model has no autoencoder.
        """
        if self.tokenizer is None:
            raise InputError("this model has no autoencoder: expected one to decode latents")
        latents = self.transformer.normalised(tokens).to(self.tokenizer.dtype)
        return enter(self.tokenizer, "decode", latents, self.grid).clamp(-1, 1)


def _text_tokenizer(folder: Path) -> Any:
    """The text tokenizer in a folder; None where there are no files of one."""
    if not any((folder / file).is_file() for file in TEXT_FILES):
        return None
    from transformers import AutoTokenizer, PreTrainedConfig

    try:
        # The folder's own configuration is not one that transformers knows.
        return AutoTokenizer.from_pretrained(str(folder), config=PreTrainedConfig())
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: its text tokenizer cannot be read ({reason})") from error
