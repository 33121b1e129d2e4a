"""What the page does: offer models, read its fields, draw with two samplers side by side."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..api import sample
from ..catalog import list_models, list_samplers
from ..errors import ArvisionError, InputError, check_count, unknown_name
from ..folders import find_model, parse_device, parse_dtype
from ..inputs import parse_schedule
from ..opening import open_cached
from ..pipeline import ARPipeline
from ..samplers.base import strangers_sampler
from .brush import read_painting
from .race import Race, Runner

LOG = logging.getLogger("arvision.ui")

PREVIEWS = 12
"""Pictures shown on the way of a model that draws token by token."""

WORTH_TRYING = {"token": ("sjd:window=32", "sjd:coupling=maximal")}
"""Options that are offered beside the plain samplers."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of the page.

    Attributes:
        queue: draws that wait, at most.
        images: pictures of each sampler in a draw, at most.
        prompt: characters, at most.
        timeout: seconds of a draw, at most; what is not drawn by then stays unfinished.

    Raises:
        InputError: a bound that is no positive number.
    """

    queue: int = 16
    images: int = 8
    prompt: int = 1000
    timeout: float = 300.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type == "int":
                check_count(each.name, value)
            elif not isinstance(value, (int, float)) or not 0 < value < 1e9:
                raise InputError(f"{each.name} {value!r}: expected seconds > 0")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The fields of the page, as they are written there.

    Attributes:
        model: one of those that are offered.
        prompt: a class, a class id, or a caption.
        seeds: such as "7", "7, 8", or "7:3" for picture 3 of seed 7.
        images: pictures of each seed.
        samplers: one or two, such as "sjd:window=32", or "dd@llamagen-fashion-dd" with another model.
        guidance: a number, or one for each scale; "" for the model's own.
        temperature: likewise.
        negative: what guidance leads away from; "" for nothing.
        painting: what the brush has painted; None for a picture without a source.
        known_scales: coarse scales of it that are kept; 0 for none.
        blend: whether what is redrawn is pasted into the source.
        is_shown: whether pictures are shown while they are drawn.
    """

    model: str
    prompt: str
    seeds: str = "0"
    images: int = 1
    samplers: Sequence[str] = ("ar", "sjd")
    guidance: str = ""
    temperature: str = ""
    negative: str = ""
    painting: Any = None
    known_scales: int = 0
    blend: bool = False
    is_shown: bool = True


@dataclass
class Side:
    """What one sampler has drawn so far.

    Attributes:
        sampler: as the page writes it.
        is_lossless: whether it draws from its model's own law.
        num_tokens: of a picture.
        grid: rows and columns of the tokens; None where they are no single grid.
        identities: seed and number of each picture.
        runner: its draw.
    """

    sampler: str
    is_lossless: bool
    num_tokens: int
    grid: tuple[int, int] | None
    identities: list[tuple[int, int]]
    runner: Runner


@dataclass
class Facts:
    """What the page has to know of a model.

    Attributes:
        kind: "token", "scale", "continuous" or "student".
        classes: names of its classes; none for captions.
        samplers: that drive it, with some options.
        takes_text: whether prompts are captions.
        num_scales: of a scale model, else 0.
        size: width and height of its pictures; None where it cannot be given one to edit.
    """

    kind: str
    classes: list[str]
    samplers: list[str]
    takes_text: bool
    num_scales: int
    size: tuple[int, int] | None


class Desk:
    """Models and bounds behind a page.

    Args:
        models: names, folders or hub ids that are offered; none for the embedded ones.
        bounds: see there.
        device: None for an accelerator where there is one.
        dtype: None for what suits it.

    Raises:
        InputError: an unknown model or device.
    """

    def __init__(
        self,
        models: Sequence[str] = (),
        bounds: Bounds | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        self.models = list(dict.fromkeys(models)) or _drawing_models()
        self.bounds = bounds or Bounds()
        for name in self.models:
            find_model(name)
        self._place = parse_device(device)
        self._dtype: torch.dtype = parse_dtype(dtype, self._place)

    def pipe(self, name: str) -> ARPipeline:
        """The pipeline of one of the models; the last few stay loaded.

        Raises:
            InputError: a model that is not offered.
        """
        if name not in self.models:
            raise unknown_name("model of this page", name, self.models)
        return open_cached(name, str(self._place), self._dtype)

    def facts(self, name: str) -> Facts:
        """See `Facts`; loads the model."""
        pipe = self.pipe(name)
        classes: list[str] = list(pipe.config.get("class_names") or ())
        listed = [str(each) for each in list_samplers(pipe)]
        num_classes = getattr(pipe.network.config, "num_classes", None)
        model = pipe.model
        size = getattr(model, "picture_size", None) if hasattr(model, "tokens_of") else None
        return Facts(
            kind=pipe.kind,
            classes=classes or [str(number) for number in range(min(num_classes or 0, 1000))],
            samplers=[*listed, *WORTH_TRYING.get(pipe.kind, ())],
            takes_text=not num_classes,
            num_scales=len(getattr(model, "scales", None) or ()),
            size=None if size is None else (size[1], size[0]),
        )

    def draw(self, wishes: Wishes) -> Iterator[list[Side]]:
        """Draw with each sampler, side by side; yields the sides whenever there is more to see.

        Raises:
            InputError: a field that is wrong, before anything is drawn.
        """
        race, sides = self.start(wishes)
        yield sides
        for _ in race.run(self.bounds.timeout):
            yield sides

    def start(self, wishes: Wishes) -> tuple[Race, list[Side]]:
        """The draws of a wish, not yet begun, and their sides.

        Raises:
            InputError: see `draw`.
        """
        if len(wishes.prompt) > self.bounds.prompt:
            raise InputError(
                f"prompt of {len(wishes.prompt):,} characters: expected at most {self.bounds.prompt:,}"
            )
        if not wishes.prompt.strip():
            raise InputError("empty prompt: expected a class or a caption")
        identities = read_seeds(wishes.seeds, wishes.images, self.bounds.images)
        written = [text.strip() for text in wishes.samplers if text.strip()]
        if not written:
            raise InputError("no sampler: expected one or two")
        given = {
            "guidance_scale": parse_schedule("guidance", wishes.guidance.strip() or None),
            "temperature": parse_schedule("temperature", wishes.temperature.strip() or None),
            "negative_prompt": wishes.negative.strip() or None,
        }
        draws, sides = [], []
        for text in written:
            spec, _, other = text.partition("@")
            pipe = self.pipe(other or wishes.model)
            sampler = strangers_sampler(spec)
            pipe.check_sampler(sampler)
            model = pipe.model
            edit = self._edit(wishes, model)
            shown = _preview_every(model) if wishes.is_shown else None
            draws.append(_draw(pipe, wishes.prompt, spec, identities, given | edit, shown))
            grid = getattr(model, "grid", None)
            side = Side(
                text, sampler.is_exact, model.num_tokens, grid, identities, Runner(draws[-1])
            )
            sides.append(side)
        race = Race(draws)
        for side, runner in zip(sides, race.runners, strict=True):
            side.runner = runner
        return race, sides

    def _edit(self, wishes: Wishes, model: Any) -> dict[str, Any]:
        """Arguments of a call that redraws what is painted."""
        if wishes.painting is None:
            return {}
        size = getattr(model, "picture_size", None)
        if size is None:
            raise InputError(f"{type(model).__name__} has no tokenizer that encodes pictures")
        picture, mask = read_painting(wishes.painting, (size[1], size[0]))
        known = wishes.known_scales if getattr(model, "scales", None) else 0
        return {
            "image": picture,
            "mask_image": mask,
            "known_scales": known or None,
            "blend": wishes.blend,
        }


def _draw(
    pipe: ARPipeline,
    prompt: str,
    spec: str,
    identities: list[tuple[int, int]],
    given: dict[str, Any],
    preview_every: int | None,
) -> Callable[[Callable[..., Any]], Any]:
    """A draw that still needs its callback."""

    def draw(on_step: Callable[..., Any]) -> Any:
        return sample(
            pipe,
            [prompt] * len(identities),
            spec,
            seed=list(identities),
            progress=False,
            callback_on_step_end=on_step,
            preview_every=preview_every,
            **given,
        )

    return draw


def _preview_every(model: Any) -> int | None:
    """Passes between two previews; None for a model whose tokens are no single grid."""
    if getattr(model, "scales", None):
        return 1
    return max(1, model.num_tokens // PREVIEWS) if getattr(model, "grid", None) else None


def _drawing_models() -> list[str]:
    """The embedded models that draw pictures by themselves."""
    return [str(model) for model in list_models() if not str(model).endswith("-draft")]


def read_seeds(text: str, images: Any, most: int) -> list[tuple[int, int]]:
    """Identities of the pictures of a draw: "7" with 2 images to [(7, 0), (7, 1)].

    Args:
        text: seeds, with commas or spaces between them; "7:3" is picture 3 of seed 7 alone.
        images: of each seed without a colon.
        most: pictures of a draw, at most.

    Raises:
        InputError: anything else, or too many.
    """
    num = check_count("images", images)
    if num > most:
        raise InputError(f"images {num}: expected at most {most}")
    found: list[tuple[int, int]] = []
    for part in re.split(r"[,\s]+", text.strip()):
        seed, colon, image = part.partition(":")
        numbers = [seed, image] if colon else [seed]
        if not all(number.isdecimal() and len(number) <= 18 for number in numbers):
            raise InputError(f"seed {part[:40]!r}: expected a number, or seed:image such as 7:3")
        found += [(int(seed), int(image))] if colon else [(int(seed), k) for k in range(num)]
        if len(found) > most:
            raise InputError(
                f"seeds and images make more than {most} pictures: expected at most {most}"
            )
    return found


def in_words(error: Exception) -> str:
    """One line of an error; of what is no user's mistake only its kind, and the rest to the log."""
    if isinstance(error, ArvisionError):
        return str(error)
    LOG.error("a draw failed (%s: %s)", type(error).__name__, error)
    return f"the pictures could not be drawn ({type(error).__name__})"
