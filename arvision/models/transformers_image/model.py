"""What the image models of transformers share: prompts in, guided logits and pixels out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...contracts import Conditions
from ...decoding.guidance import weights_are
from ...decoding.logits import check_guidance_scale
from ...decoding.transformers_cache import CacheView, kernels_in
from ...errors import InputError, check_count
from ...networks import bare, compiled_like
from ..conditions import ImagePrompt
from ..pixels import as_source
from .layout import Layout
from .network import CodeColumns, base_of, check_class, device_of, take_masks, wake
from .state import ImageState, Row


class TransformersImageModel:
    """A network of transformers that draws images, as a token model.

    A family says how prompts are written, what is forced, and how the network is called; see
    `docs/extending.md` for one in sixty lines. Tokens are codes from 0, ids are the network's.

    Args:
        network: the network, or a peft wrapper around it.
        processor: of the network; without one conditions are ids.
        codes: ids of the codes, in order.
        layout: of one image.
        grid: rows and columns, None where the tokens are no single grid.

    Raises:
        InputError: a network of another class, or one that is spread over several devices.
    """

    family: ClassVar[str] = "an image model of transformers"
    """What messages call it."""

    network_class: ClassVar[str | None] = None
    """Name of the class that the family drives; None for any."""

    has_guidance: ClassVar[bool] = True
    """Whether the model knows a null prompt."""

    takes_trees = True

    takes_images: ClassVar[bool] = False
    """Whether prompts may hold source images."""

    cell: ClassVar[int] = 16
    """Pixels of a picture per token and side."""

    options: Mapping[str, Any] = {}
    """Arguments, besides the parts, that make the same model again, as JSON takes them."""

    def __init__(
        self,
        network: Any,
        processor: Any = None,
        *,
        codes: Sequence[int],
        layout: Layout,
        grid: tuple[int, int] | None,
    ) -> None:
        self.network, self.processor = network, processor
        self.base = base_of(network)
        if self.network_class is not None:
            check_class(self.base, self.network_class, self.family)
        _ = self.device
        take_masks(self.base)
        self.columns = CodeColumns(codes)
        self.layout, self.grid = layout, grid
        self._compiled: Any = None
        self.vocab_size, self.num_tokens = len(codes), layout.num_tokens

    # What a family fills in.

    def encode(self, text: str, images: Sequence[Any]) -> Tensor:
        """Ids [L] of a whole prompt, written with the processor."""
        raise InputError(f"{self.family} takes ids [L] of a whole prompt, not texts")

    def check_ids(self, ids: Tensor) -> None:
        """Refuse a prompt [L] behind which no image can start."""

    def row(self, ids: Tensor, images: Sequence[Any]) -> Row:
        """The conditional cache row of a prompt [L]."""
        return Row.plain(ids)

    def null_row(self, ids: Tensor) -> Row:
        """The null row that stands beside a prompt [L] without a negative one."""
        raise InputError(f"{self.family} has no null prompt: expected guidance_scale 1")

    def prompt_inputs(self, ids: Tensor) -> dict[str, Any]:
        """Arguments of the network for prompts [R, P]."""
        return {"input_ids": ids}

    def inputs(self, codes: Tensor, forced: Tensor | None) -> dict[str, Any]:
        """Arguments of the network for codes [R, S], with ids in the place of some (-1: none)."""
        ids = self.columns.ids_of(codes)
        return {"input_ids": ids if forced is None else torch.where(forced < 0, ids, forced)}

    def of_size(self, height: int, width: int) -> TransformersImageModel:
        """The same network for another size, in pixels."""
        own = "x".join(map(str, self.picture_size))
        raise InputError(f"{height}x{width}: {self.family} draws {own} pixels only")

    def check_pixels(self) -> None:
        """Refuse to draw where no picture can be made of the tokens."""

    @property
    def body(self) -> nn.Module:
        """The part of the network that turns inputs into hidden states."""
        return self.base.model

    @property
    def output_layer(self) -> nn.Module:
        """What turns hidden states into logits."""
        return self.base.lm_head

    # What all families have.

    def at_size(
        self, height: int | None, width: int | None, num_sources: int = 0
    ) -> TransformersImageModel:
        """The model for pictures of that size; None for its own side.

        Args:
            height: pixels.
            width: pixels.
            num_sources: source images of a prompt, where a model draws otherwise with some.

        Raises:
            InputError: a size that it does not draw.
        """
        wanted = self.size_or(height, width)
        return self if wanted == self.picture_size else self.of_size(*wanted)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of a picture, in pixels."""
        rows, columns = self.grid or (0, 0)
        return rows * self.cell, columns * self.cell

    def size_or(self, height: int | None, width: int | None) -> tuple[int, int]:
        """A size with the model's own sides where None is given.

        Raises:
            InputError: a side that is no number of pixels.
        """
        own = self.picture_size
        sides = (("height", height, own[0]), ("width", width, own[1]))
        found = [mine if side is None else check_count(name, side) for name, side, mine in sides]
        return found[0], found[1]

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return device_of(self.base)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the network's cache."""
        return self.base.get_input_embeddings().weight.dtype

    @property
    def codebook(self) -> Tensor | None:
        """Vectors behind the tokens [V, D]; None where there are none."""
        return None

    @property
    def cost_key(self) -> str:
        """What the cost of a pass depends on, apart from the machine."""
        text = self.base.config.get_text_config()
        return (
            f"{type(self.base).__name__} {text.num_hidden_layers}x{text.hidden_size} "
            f"{self.vocab_size} {self.num_tokens} {self.dtype} {self.device.type}"
        )

    def to(self, *args: Any, **kwargs: Any) -> TransformersImageModel:
        """Move or cast the network, as `nn.Module.to` does; returns the model itself."""
        self.network.to(*args, **kwargs)
        return self

    @property
    def _called_body(self) -> Any:
        """The body, compiled as the network was when the last draw began."""
        return self.body if self._compiled is None else self._compiled

    def run(
        self, inputs: dict[str, Any], positions: Tensor, mask: Tensor, cache: CacheView
    ) -> Tensor:
        """Hidden states [R, S, C]; positions [A, R, S], mask [R, 1, S, ...]."""
        with kernels_in(self.base, self._called_body, mask):
            return self._called_body(
                **inputs,
                position_ids=positions if len(positions) > 1 else positions[0],
                attention_mask=mask,
                cache=cache,
                use_cache=True,
            ).last_hidden_state

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., C]."""
        return self.columns.logits(self.output_layer, hidden)

    @torch.no_grad()
    def start(
        self, conditions: Conditions, guidance_scale: float = 1.0
    ) -> tuple[ImageState, Tensor]:
        """Prefill the prompts and, where guidance needs them, the null rows.

        Args:
            conditions: one per image: ids [L] of a whole prompt, a text (with a processor), or an
                `ImagePrompt`.
            guidance_scale: null + scale * (cond - null); 1 costs no null rows, 0 only these.

        Returns:
            The decode state, and guided logits [B, V] of the first token.

        Raises:
            InputError: no conditions, one that the model does not understand, or guidance that it
                does not have.
        """
        check_guidance_scale(guidance_scale)
        if not weights_are(guidance_scale, 1) and not self.has_guidance:
            raise InputError(f"guidance_scale {guidance_scale}: {self.family} takes 1 only")
        if len(conditions) == 0:
            raise InputError("no conditions: expected at least one")
        wake(self.base)
        body = compiled_like(self.network, self.body)
        # Graphs are kept as long as what they were compiled for.
        if bare(body) is body:
            self._compiled = None
        elif self._compiled is None or self._compiled.dynamo_ctx is not body.dynamo_ctx:
            self._compiled = body
        rows, branches = self.rows(conditions, guidance_scale)
        state = ImageState(self, rows, branches, guidance_scale)
        return state, state.prefill(rows)

    def rows(self, conditions: Conditions, guidance_scale: float) -> tuple[list[Row], int]:
        """The rows of the cache, branch by branch, and the number of branches."""
        prompts = [self._prompt(condition, guidance_scale) for condition in conditions]
        conditional: list[Row] = []
        if not weights_are(guidance_scale, 0):
            conditional = [
                self.null_row(p.prompt) if _is_open(one) else self.row(p.prompt, p.images)
                for p, one in zip(prompts, conditions, strict=True)
            ]
        if weights_are(guidance_scale, 1):
            return conditional, 1
        null = [
            self.null_row(p.prompt) if p.negative is None else self.row(p.negative, ())
            for p in prompts
        ]
        return conditional + null, 2 if conditional else 1

    def _prompt(self, condition: Any, guidance_scale: float) -> ImagePrompt:
        """A condition with its texts as ids.

        Raises:
            InputError: a condition that the model does not understand.
        """
        given = condition if isinstance(condition, ImagePrompt) else ImagePrompt(condition)
        images = list(given.images)
        if images and not self.takes_images:
            raise InputError(f"{len(images)} source images: {self.family} draws from text alone")
        if given.negative is not None and weights_are(guidance_scale, 1):
            raise InputError(
                f"negative prompt {_brief(given.negative)}: there is no guidance at guidance_scale "
                "1" + ("" if self.has_guidance else f", and {self.family} has none")
            )
        images = [as_source(image) for image in images]
        ids = self._ids("" if given.prompt is None else given.prompt, images)
        negative = None if given.negative is None else self._ids(given.negative, ())
        return ImagePrompt(ids, negative, images)

    def _ids(self, prompt: Any, images: Sequence[Any]) -> Tensor:
        if isinstance(prompt, str):
            if self.processor is None:
                raise InputError(
                    f"prompt {_brief(prompt)}: this model has no processor, expected ids [L] of a "
                    "whole prompt"
                )
            ids = self.encode(prompt, images).to(self.device)
        else:
            try:
                ids = torch.as_tensor(prompt, dtype=torch.int64, device=self.device)
            except (TypeError, ValueError, RuntimeError):
                raise InputError(
                    f"condition {_brief(prompt)}: expected ids [L], a text or an ImagePrompt"
                ) from None
        if ids.dim() != 1 or len(ids) == 0:
            raise InputError(f"prompt ids {tuple(ids.shape)}: expected [L] with L >= 1")
        most = self.base.get_input_embeddings().num_embeddings - 1
        wrong = ids[(ids < 0) | (ids > most)]
        if len(wrong):
            raise InputError(f"the prompt holds the id {int(wrong[0])}: expected 0..{most}")
        self.check_ids(ids)
        return ids

    def check_end(self, ids: Tensor, ends: Sequence[int | None], what: str) -> None:
        """Refuse a prompt [L] that does not end in these ids (None: any).

        Raises:
            InputError: see above.
        """
        wrong = len(ids) < len(ends) or any(
            end is not None and int(own) != end
            for own, end in zip(ids[-len(ends) :], ends, strict=False)
        )
        if wrong:
            shown = ", ".join("any" if end is None else str(end) for end in ends)
            found = ", ".join(map(str, ids[-len(ends) :].tolist()))
            raise InputError(f"the prompt ends in {found}: expected {what} ({shown})")

    def sequence(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] as the ids that the network's own generate gives, forced ones included."""
        return self.layout.sequence(self.columns.ids_of(tokens))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] to pixels [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: tokens of another shape or range, or a model that makes no pixels.
        """
        if tokens.dim() != 2 or tokens.shape[1] != self.num_tokens:
            raise InputError(f"tokens {tuple(tokens.shape)}: expected [B, {self.num_tokens}]")
        self.check_pixels()
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size):
            raise InputError(f"tokens: expected codes 0..{self.vocab_size - 1}")
        return self.pixels(tokens).float().clamp(-1, 1)

    def pixels(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] to pixels [B, 3, H, W]."""
        raise InputError(f"{self.family} gives tokens but not images")


def told(**arguments: Any) -> dict[str, Any]:
    """Grids and ids that a caller gave, as JSON takes them."""
    given = {name: value for name, value in arguments.items() if value is not None}
    if "grids" in given:
        given["grids"] = [list(grid) for grid in given["grids"]]
    if "ids" in given:
        given["ids"] = dict(given["ids"])
    return given


def single_grid(grids: Sequence[tuple[int, int]], family: str) -> tuple[int, int]:
    """The only grid of a model that draws one.

    Raises:
        InputError: another number of grids, or one without rows or columns.
    """
    check_grids(grids)
    if len(grids) != 1:
        raise InputError(f"grids {list(grids)}: {family} draws one grid")
    return grids[0][0], grids[0][1]


def check_grids(grids: Sequence[tuple[int, int]]) -> None:
    """Refuse what is no list of (rows, columns).

    Raises:
        InputError: see above.
    """
    is_fine = len(grids) > 0 and all(
        len(grid) == 2 and all(isinstance(side, int) and side > 0 for side in grid)
        for grid in grids
    )
    if not is_fine:
        raise InputError(f"grids {grids!r}: expected [(rows, columns), ...] of integers >= 1")


def _is_open(condition: Any) -> bool:
    """Whether a condition is no prompt: its row is then a null row."""
    return condition is None or (isinstance(condition, ImagePrompt) and condition.prompt is None)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
