"""What is trained on a person's own pictures: the stages of the embedded models in sizes of choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, check_count, unknown_name
from ..models.llamagen.text import clean_caption
from ..models.llamagen.transformer import LlamaGenTransformer
from .llamagen_text import build_text_encoder, build_text_tokenizer, words_of
from .llamagen_transformer import CaptionObjective
from .loop import MOST_BATCH, MOST_STEPS, FitConfig
from .mar_recipe import AutoencoderStage, MARTransformerStage
from .own_data import MOST_SIDE, OwnPictures
from .recipes import ClassStage, TokenizerStage, TransformerStage
from .stages import Stage, Work
from .var_recipe import VARTokenizerStage, VARTransformerStage

SMALLEST_SIDE, MOST_GRID, MOST_FACTOR = 16, 32, 16
HEAD_WIDTH = 32
"""Pixels of a side, tokens of a side, pixels per token and side; and what divides widths."""

GROUPS = 8
"""Of channels in a tokenizer's normalisation: four in each at the narrowest."""

TEXT_WIDTH, MOST_CAPTION = 64, 64
"""Width of a text encoder trained along, and tokens of a caption that it reads at most."""

MOST_MINUTES = 100_000


@dataclass(frozen=True, kw_only=True)
class OwnSettings:
    """What is trained on a person's own pictures, and how long.

    Attributes:
        recipe: "llamagen" (codes one by one), "var" (codes scale by scale) or "mar" (latents).
        size: pixels of a side, a multiple of 8.
        minutes: wall time in all, from which the steps follow by measuring a few of each stage; 10
            where neither this nor `steps` is given.
        steps: of each of the two stages, in place of `minutes`.
        factor: pixels per token and side, a power of two; None for the largest up to 16 that leaves
            at least 8 x 8 tokens.
        hidden_size: width of the transformer, a multiple of 32.
        num_layers: its blocks.
        codebook_size: codes of the tokenizer ("llamagen" and "var").
        batch_size: pictures per step.
        learning_rate: peak of both schedules.
        sample_every: steps between two sheets of samples and measurements on what is held out; None
            for a tenth of a stage.
        mixed_precision: "no" or "bf16"; None for bf16 on an accelerator, and on a CPU for what is
            measured to be faster (with `steps` for "no").
        is_unconditional: whether subfolders are no classes.
        seed: of everything.

    Raises:
        InputError: an unknown recipe, a number out of range, or a size that does not fit.
    """

    recipe: str = "llamagen"
    size: int = 64
    minutes: float | None = None
    steps: int | None = None
    factor: int | None = None
    hidden_size: int = 192
    num_layers: int = 4
    codebook_size: int = 512
    batch_size: int = 32
    learning_rate: float = 1e-3
    sample_every: int | None = None
    mixed_precision: str | None = None
    is_unconditional: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise unknown_name("recipe of own pictures", self.recipe, RECIPES)
        for name, most in MOST.items():
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), most)
        if self.minutes is not None and self.steps is not None:
            raise InputError(f"minutes {self.minutes} and steps {self.steps}: expected one of them")
        if self.minutes is not None and not 0 < self.minutes <= MOST_MINUTES:
            raise InputError(f"minutes {self.minutes}: expected a number up to {MOST_MINUTES:,}")
        if not 0 < self.learning_rate < 1:
            raise InputError(f"learning_rate {self.learning_rate}: expected a number in (0, 1)")
        if self.mixed_precision not in (None, "no", "bf16"):
            raise unknown_name("mixed_precision", self.mixed_precision, ("no", "bf16"))
        if self.hidden_size % HEAD_WIDTH:
            raise InputError(f"hidden_size {self.hidden_size}: expected a multiple of {HEAD_WIDTH}")
        self._check_size()

    def _check_size(self) -> None:
        if self.size % 8 or not SMALLEST_SIDE <= self.size <= MOST_SIDE:
            near = min(max(SMALLEST_SIDE, round(self.size / 8) * 8), MOST_SIDE)
            raise InputError(
                f"size {self.size}: the tokenizer takes multiples of 8 from {SMALLEST_SIDE} to "
                f"{MOST_SIDE}, such as {near}"
            )
        fits = [2**k for k in range(1, 5) if self.size % 2**k == 0]
        fits = [one for one in fits if 2 <= self.size // one <= MOST_GRID]
        if self.factor is not None and self.factor not in fits:
            raise InputError(
                f"factor {self.factor} at size {self.size}: expected one of "
                f"{', '.join(map(str, fits))}"
            )

    @property
    def pixels_per_token(self) -> int:
        """Along one side."""
        if self.factor is not None:
            return self.factor
        fits = [2**k for k in range(1, 5) if self.size % 2**k == 0 and self.size // 2**k >= 8]
        return max(fits)

    @property
    def grid(self) -> int:
        """Tokens of a side."""
        return self.size // self.pixels_per_token

    @property
    def levels(self) -> tuple[int, ...]:
        """Widths of the tokenizer's levels, in its base width."""
        return (1, 1, 2, 2, 4)[: self.pixels_per_token.bit_length()]

    @property
    def num_heads(self) -> int:
        """Attention heads, 64 wide where that divides the width."""
        return self.hidden_size // (64 if self.hidden_size % 64 == 0 else HEAD_WIDTH)

    def to_json(self) -> dict[str, Any]:
        """What a run is, by name; what has its default is left out where it is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


MOST = {
    "steps": MOST_STEPS,
    "hidden_size": 1 << 14,
    "num_layers": 200,
    "codebook_size": 1 << 20,
    "batch_size": MOST_BATCH,
    "sample_every": MOST_STEPS,
    "size": 1 << 20,
}
"""Bounds of the settings."""


def scales_of(grid: int) -> tuple[int, ...]:
    """Side lengths of the scales of a VAR, about the square root of two apart: 1, 2, 3, 5, 8."""
    num = 2 * grid.bit_length() - 2
    return tuple(sorted({round(grid ** (k / (num - 1))) for k in range(num)} | {1, grid}))


def caption_writer(
    captions: Sequence[Sequence[str]],
) -> tuple[Callable[[int, torch.Generator], str], list[list[str]]]:
    """What gives one of the captions of a picture by its number; and all of them, cleaned."""
    cleaned = [[clean_caption(text) for text in own] for own in captions]

    def write(index: int, generator: torch.Generator) -> str:
        own = cleaned[index]
        return own[int(torch.randint(len(own), (), generator=generator))]

    return write, cleaned


@dataclass(frozen=True, kw_only=True)
class OwnCaptionStage(TransformerStage):
    """A text-conditional transformer and its text encoder, on captions of a file.

    Attributes:
        captions: of each picture.
        sizes: arguments of `LlamaGenTransformer`.
    """

    name: str = "transformer"
    fit: FitConfig = ClassStage.fit
    captions: Sequence[Sequence[str]]
    sizes: dict[str, Any]

    def objective(self, work: Work) -> CaptionObjective:
        """Next tokens behind a caption of the picture, drawn anew for each step."""
        write, cleaned = caption_writer(self.captions)
        words = build_text_tokenizer(words_of(text for own in cleaned for text in own))
        longest = max(len(words(text)["input_ids"]) for own in cleaned for text in own)
        transformer = LlamaGenTransformer(
            num_classes=None,
            caption_dim=TEXT_WIDTH,
            caption_length=min(longest, MOST_CAPTION),
            **self.sizes,
        )
        encoder = build_text_encoder(len(words), TEXT_WIDTH, self.fit.seed)
        return CaptionObjective(transformer, work.codes, write, encoder, words)

    def finish(self, work: Work, objective: CaptionObjective) -> None:
        """The transformer and the text parts."""
        super().finish(work, objective)
        work.parts["text_encoder"] = objective.text_encoder
        work.parts["text_tokenizer"] = objective.text_tokenizer


def _llamagen(settings: OwnSettings, pictures: OwnPictures) -> list[Stage[Work]]:
    width = settings.hidden_size
    tokenizer = TokenizerStage(
        sizes={
            "ch": 32,
            "ch_mult": settings.levels,
            "num_res_blocks": 1,
            "z_channels": 64,
            "codebook_size": settings.codebook_size,
            "code_dim": 8,
            "num_recorded": 0,
            "norm_num_groups": GROUPS,
        }
    )
    sizes = {
        "vocab_size": settings.codebook_size,
        "grid": (settings.grid, settings.grid),
        "hidden_size": width,
        "num_layers": settings.num_layers,
        "num_heads": settings.num_heads,
        "intermediate_size": -(-8 * width // 3 // 32) * 32,
    }
    if pictures.captions is not None:
        return [tokenizer, OwnCaptionStage(captions=pictures.captions, sizes=sizes)]
    return [tokenizer, ClassStage(sizes=sizes)]


def _var(settings: OwnSettings, pictures: OwnPictures) -> list[Stage[Work]]:
    shared = {
        "patch_nums": scales_of(settings.grid),
        "codebook_size": settings.codebook_size,
        "z_channels": 16,
    }
    tokenizer = {
        "ch": 32,
        "ch_mult": settings.levels,
        "num_res_blocks": 1,
        "norm_num_groups": GROUPS,
    }
    transformer = {
        "hidden_size": settings.hidden_size,
        "num_layers": settings.num_layers,
        "num_heads": settings.num_heads,
        "shared_aln": True,
    }
    return [
        VARTokenizerStage(sizes=shared | tokenizer),
        VARTransformerStage(sizes=shared | transformer),
    ]


def _mar(settings: OwnSettings, pictures: OwnPictures) -> list[Stage[Work]]:
    half = settings.num_layers // 2
    autoencoder = {
        "ch": 32,
        "ch_mult": settings.levels,
        "num_res_blocks": 1,
        "latent_dim": 8,
        "norm_num_groups": GROUPS,
    }
    transformer = {
        "latent_dim": 8,
        "grid": (settings.grid, settings.grid),
        "hidden_size": settings.hidden_size,
        "encoder_depth": max(1, half),
        "decoder_depth": max(1, settings.num_layers - half),
        "num_heads": settings.num_heads,
        "head_width": settings.hidden_size,
        "head_depth": 2,
        "num_buffer": 4,
        "num_sampling_steps": 50,
        "noisiest": 980,
    }
    return [AutoencoderStage(sizes=autoencoder), MARTransformerStage(sizes=transformer)]


RECIPES: dict[str, Callable[[OwnSettings, OwnPictures], list[Stage[Work]]]] = {
    "llamagen": _llamagen,
    "var": _var,
    "mar": _mar,
}
"""The stages of a recipe: its tokenizer, then its transformer."""

SHARES = (0.35, 0.5)
"""Of the minutes: steps of the tokenizer, and of the transformer; the rest is reading, measuring and
drawing."""


def check_captions(settings: OwnSettings, captions: str | Path | None) -> None:
    """Refuse captions where nothing reads them.

    Raises:
        InputError: see above.
    """
    if captions is None:
        return
    if settings.recipe != "llamagen":
        raise InputError(
            f"captions {captions} with recipe {settings.recipe!r}: expected recipe 'llamagen', which "
            "reads text"
        )
    if settings.is_unconditional:
        raise InputError(f"captions {captions} of unconditional training: expected one of them")


def timed(stage: Stage[Work], settings: OwnSettings, steps: int, mixed_precision: str) -> Any:
    """A stage of so many steps in the loop's settings of a run."""
    every = settings.sample_every or max(1, steps // 10)
    fit = replace(
        stage.fit,
        steps=steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup=min(100, steps // 10),
        seed=settings.seed,
        mixed_precision=mixed_precision,
        save_every=min(250, every),
        log_every=_divisor(every, 25),
    )
    return replace(stage, fit=fit)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number up to `most`."""
    return max(k for k in range(1, min(number, most) + 1) if number % k == 0)
