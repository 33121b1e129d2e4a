"""`arvision finetune`: a model that is there already, on a person's own pictures; whole or by LoRA."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import add_adapter, save_adapter
from ..card import settings_in_words, write_card
from ..checkpoint import write_like
from ..errors import InputError, check_count, unknown_name
from ..files import check_out, user_path, working_in, write_json
from ..models.conditions import resolve_class
from ..models.llamagen import convert as llamagen
from ..models.mar import convert as mar
from ..models.var import convert as var
from ..pipeline import ARPipeline
from .llamagen_tokenizer import encode_all
from .llamagen_transformer import CaptionObjective, ClassObjective
from .loop import MOST_BATCH, MOST_STEPS, Chance, FitConfig, Objective, fit
from .mar import MARObjective, encode_moments
from .own import MASKED_PASSES, put_pipeline, tell_fall
from .own_data import (
    NO_CLASS,
    WORK,
    OwnPictures,
    check_run,
    open_pictures,
    pack_pictures,
)
from .own_recipes import caption_writer
from .own_watch import Watch, held_out_loss, prompts_of, sample_sheet
from .processes import joined
from .var import VARClassObjective

STAGE = "transformer"
FULL_RATE, LORA_RATE = 1e-4, 1e-3
"""Peaks of the schedule where none is given."""

MOST_RANK = 1024


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """How a model is fine-tuned.

    Attributes:
        steps: of the optimiser.
        batch_size: pictures per step.
        learning_rate: peak of the schedule; None for 1e-4, with LoRA 1e-3.
        lora_rank: train updates of this rank beside the weights of the blocks and the classes, which
            stay as they are; None to train all of the transformer's weights.
        lora_alpha: the updates count alpha / rank; None for the rank.
        merge: with LoRA: also write the model with the updates in its weights.
        label: class (id or name) of pictures that lie in no subfolders.
        sample_every: steps between two sheets of samples and measurements; None for a tenth.
        mixed_precision: "no" or "bf16"; None for bf16 on an accelerator.
        seed: of order, noise and new weights.

    Raises:
        InputError: a number out of range.
    """

    steps: int = 500
    batch_size: int = 16
    learning_rate: float | None = None
    lora_rank: int | None = None
    lora_alpha: int | None = None
    merge: bool = False
    label: str | None = None
    sample_every: int | None = None
    mixed_precision: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "steps": MOST_STEPS,
            "batch_size": MOST_BATCH,
            "lora_rank": MOST_RANK,
            "lora_alpha": 1 << 20,
            "sample_every": MOST_STEPS,
        }
        for name, most in bounds.items():
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), most)
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise InputError(f"learning_rate {self.learning_rate}: expected a number in (0, 1)")
        if self.mixed_precision not in (None, "no", "bf16"):
            raise unknown_name("mixed_precision", self.mixed_precision, ("no", "bf16"))
        if self.lora_rank is None and (self.merge or self.lora_alpha is not None):
            given = "merge" if self.merge else f"lora_alpha {self.lora_alpha}"
            raise InputError(f"{given} without lora_rank: it would have no effect")

    @property
    def every(self) -> int:
        """Steps between two looks."""
        return self.sample_every or max(1, self.steps // 10)

    def fit(self) -> FitConfig:
        """Settings of the loop."""
        own = LORA_RATE if self.lora_rank is not None else FULL_RATE
        is_cpu = str(joined().device) == "cpu"
        return FitConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate or own,
            warmup=min(100, self.steps // 10),
            weight_decay=0.0,
            seed=self.seed,
            mixed_precision=self.mixed_precision or ("no" if is_cpu else "bf16"),
            save_every=min(250, self.every),
            log_every=max(k for k in range(1, min(25, self.every) + 1) if self.every % k == 0),
        )


class Partly(Objective):
    """Another objective, of which only some parameters are trained and saved.

    Args:
        whole: its parameters but these are frozen; its modules stay in evaluation mode.
        names: of its parameters.
    """

    def __init__(self, whole: Objective, names: Sequence[str]) -> None:
        super().__init__()
        own = dict(whole.named_parameters())
        for name, parameter in own.items():
            parameter.requires_grad_(name in names)
        self.trained = nn.ParameterDict({name.replace(".", "/"): own[name] for name in names})
        self.beside = (whole.eval(),)
        self.num_items = whole.num_items

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Of the other objective."""
        whole: Any = self.beside[0]
        return whole.inputs(indices, generator)

    def loss(self, inputs: dict[str, Any], chance: Chance) -> dict[str, Tensor]:
        """Of the other objective."""
        whole: Any = self.beside[0]
        return whole.loss(inputs, chance)


def _llamagen(pipe: ARPipeline, pictures: OwnPictures) -> Objective:
    codes = encode_all(pipe.tokenizer, pictures.images)
    if pictures.captions is None:
        return ClassObjective(pipe.transformer, codes, pictures.labels)
    write, _ = caption_writer(pictures.captions)
    words = pipe.text_encoder, pipe.text_tokenizer
    return CaptionObjective(pipe.transformer, codes, write, *words)


def _var(pipe: ARPipeline, pictures: OwnPictures) -> Objective:
    codes = encode_all(pipe.tokenizer, pictures.images)
    return VARClassObjective(pipe.transformer, pipe.tokenizer, codes, pictures.labels)


def _mar(pipe: ARPipeline, pictures: OwnPictures) -> Objective:
    scale = pipe.tokenizer.config["scaling_factor"]
    means, deviations = encode_moments(pipe.tokenizer, pictures.images)
    return MARObjective(pipe.transformer, scale * means, scale * deviations, pictures.labels)


class Family(NamedTuple):
    """How the networks of a family are fine-tuned.

    Attributes:
        objective: of a pipeline on pictures.
        wrappers: names around the tensors of official files.
        blocks: parts of the names of layers that get LoRA, and of the embedding of classes.
    """

    objective: Any
    wrappers: Sequence[str]
    blocks: Sequence[str]


FAMILIES: Mapping[str, Family] = {
    "LlamaGenTransformer": Family(
        _llamagen,
        llamagen.TRANSFORMER_WRAPPERS,
        ("layers.", "cls_embedding.embedding_table"),
    ),
    "VARTransformer": Family(_var, var.TRANSFORMER_WRAPPERS, ("blocks.", "class_emb")),
    "MARTransformer": Family(
        _mar, mar.TRANSFORMER_WRAPPERS, ("encoder_blocks.", "decoder_blocks.", "class_emb")
    ),
}


def finetune(
    pipe: ARPipeline,
    data: str | Path,
    out: str | Path,
    settings: FinetuneSettings | None = None,
    *,
    captions: str | Path | None = None,
    official: str | Path | None = None,
    name: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Go on training a model's transformer on a person's own pictures, or go on where a run stopped.

    Tokenizer and text encoder stay as they are. Of the trained weights those stay that did best on
    pictures that are held out. What comes out lies in `out`: the folder of a pipeline, or with `official`
    a file of the same name and layout; with LoRA `out/adapter` in peft's layout, which
    `arvision.load(..., adapter=)` merges, and the others with `merge` only. `out/samples` and
    `out/held_out.jsonl` tell how it goes.

    Args:
        pipe: of LlamaGen, VAR or MAR, in float32; its transformer is changed in place.
        data: folder of pictures, cropped to the model's size. Subfolders are classes, called by an id or
            a name of the model; where it knows none of them, they take over its first classes.
        out: a new or empty folder, or one of the same run.
        settings: see `FinetuneSettings`.
        captions: for a model of texts, see `arvision.training.own.train`.
        official: the authors' file that `pipe` was read from.
        name: of the model, by which an interrupted run is known again; None needed with `official`.
        progress: show bars.

    Returns:
        Figures: numbers of pictures and of trained parameters, "held_out_loss" ("first" of the model as
        it came, "best", "best_step", "last"), "seconds".

    Raises:
        InputError: a family that cannot be fine-tuned, bad pictures or captions, classes that the model
            has not, or a folder that holds something else.
        MissingDependencyError: LoRA without peft.
    """
    settings = settings or FinetuneSettings()
    out = user_path(out)
    check_out(out, is_folder=True)
    family = _family_of(pipe)
    is_text = pipe.transformer.config.get("num_classes") is None
    _check_captions(pipe, is_text, captions)
    asked = {key: value for key, value in asdict(settings).items() if value is not None}
    asked |= {"model": name or str(official), "data": str(user_path(data).absolute())}
    if captions is not None:
        asked["captions"] = str(user_path(captions).absolute())
    height, width = pipe.model.picture_size
    if height != width:
        raise InputError(f"the model draws {height}x{width}: expected squares")
    processes, is_new = joined(), check_run(out, asked)
    with working_in(out) if processes.is_main_process else contextlib.nullcontext():
        place = out / WORK / "pictures"
        if processes.is_main_process and is_new:
            how = {"captions": captions, "seed": settings.seed, "progress": progress}
            pack_pictures(data, height, place, asked, most_side=MOST_PIXELS, **how)
        processes.wait_for_everyone()
        pictures = open_pictures(place)
        names, ids = None, []
        if not is_text:
            pictures, ids, names = _with_classes(pipe, pictures, settings.label)
        run = _Tuning(pipe, family, pictures, ids, names, settings, out)
        return run.figures(official, progress)


MOST_PIXELS = 2048
"""Pixels of a side that a model to be fine-tuned may draw."""


def _family_of(pipe: ARPipeline) -> Family:
    kind = type(pipe.transformer).__name__
    if kind not in FAMILIES or pipe.tokenizer is None:
        had = "without a tokenizer" if kind in FAMILIES else kind
        raise InputError(
            f"{had} cannot be fine-tuned here: expected one of {', '.join(FAMILIES)} with its tokenizer"
        )
    return FAMILIES[kind]


def _check_captions(pipe: ARPipeline, is_text: bool, captions: str | Path | None) -> None:
    if is_text and captions is None:
        raise InputError("this model takes captions: expected a file of them, captions=")
    if is_text and pipe.text_encoder is None:
        raise InputError("this model has no text encoder: expected one to read captions")
    if not is_text and captions is not None:
        raise InputError(f"captions {captions}: this model takes classes and no text")


def _with_classes(
    pipe: ARPipeline, pictures: OwnPictures, label: str | None
) -> tuple[OwnPictures, list[int], list[str] | None]:
    """The pictures with the model's class ids, the id of each subfolder, and new names of the model's
    classes if the subfolders take some over.

    Raises:
        InputError: pictures without classes, more classes than the model has, or names of which it
            knows only some.
    """
    count = pipe.transformer.config["num_classes"]
    known = list(pipe.config["class_names"] or [])
    folders = pictures.class_names or []
    if folders == [NO_CLASS] and NO_CLASS not in known:
        if label is None and count > 1:
            raise InputError(
                "pictures in no subfolders: expected a subfolder for each class, or a label"
            )
        folders = [label or "0"]
    elif label is not None:
        raise InputError(f"label {label!r}: the subfolders say the classes, leave it out")
    found: list[int | None] = []
    for name in folders:
        try:
            found.append(resolve_class(int(name) if name.isdecimal() else name, count, known))
        except InputError:
            found.append(None)
    unknown = [name for name, one in zip(folders, found, strict=True) if one is None]
    names = None
    if unknown and len(unknown) < len(folders):
        raise InputError(
            f"class {unknown[0]!r}: the model knows other subfolders, but not this one"
        )
    if unknown:
        if len(folders) > count:
            raise InputError(f"{len(folders)} classes: the model has {count}")
        names = [*folders, *(known or [str(index) for index in range(count)])[len(folders) :]]
        found = list(range(len(folders)))
    ids = [one for one in found if one is not None]
    labels = torch.tensor(ids)[pictures.labels]
    return OwnPictures(pictures.images, labels, folders, None, pictures.num_train), ids, names


class _Tuning:
    """One run over packed pictures."""

    def __init__(
        self,
        pipe: ARPipeline,
        family: Family,
        pictures: OwnPictures,
        ids: list[int],
        names: list[str] | None,
        settings: FinetuneSettings,
        out: Path,
    ) -> None:
        self.pipe, self.family, self.pictures = pipe, family, pictures
        self.ids, self.names, self.settings, self.out = ids, names, settings, out
        if names is not None:
            pipe.register_to_config(class_names=names)

    def figures(self, official: str | Path | None, progress: bool) -> dict[str, Any]:
        """Train, publish and measure."""
        settings, pictures, processes = self.settings, self.pictures, joined()
        wrapped = None
        if settings.lora_rank is not None:
            torch.manual_seed(settings.seed)
            alpha = settings.lora_alpha or settings.lora_rank
            wrapped = add_adapter(self.pipe.transformer, self._layers(), settings.lora_rank, alpha)
        objective = self._objective(is_lora=wrapped is not None)
        watch = None
        if processes.is_main_process:
            watch = Watch(
                STAGE,
                objective,
                self.out,
                settings.every,
                settings.steps,
                score=lambda: held_out_loss(objective, pictures.held_out),
                sheet=self._sheet,
                keeps_best=True,
            )
        log = fit(
            objective, settings.fit(), self.out / WORK / STAGE, progress=progress, on_log=watch
        )
        if watch is None:
            processes.wait_for_everyone()
            return {}
        figures: dict[str, Any] = {
            "pictures": pictures.num_train,
            "held_out": len(pictures.held_out),
            "trained": sum(part.numel() for part in objective.parameters()),
            "steps": settings.steps,
            "seconds": log[-1]["seconds"],
            "held_out_loss": watch.keep_best(),
        }
        self._publish(wrapped, official, figures)
        tell_fall(figures["held_out_loss"])
        processes.wait_for_everyone()
        return figures

    def _layers(self) -> list[str]:
        """Names of the layers that get LoRA."""
        return [
            name
            for name, module in self.pipe.transformer.named_modules()
            if isinstance(module, (nn.Linear, nn.Embedding))
            and name.startswith(tuple(self.family.blocks))
        ]

    def _objective(self, is_lora: bool) -> Partly:
        with torch.no_grad():
            whole = self.family.objective(self.pipe, self.pictures)
        whole.num_items = self.pictures.num_train
        prefix = f"{STAGE}."
        names = [name for name, _ in whole.named_parameters() if name.startswith(prefix)]
        return Partly(whole, [name for name in names if not is_lora or ".lora_" in name])

    def _sheet(self) -> Any:
        rows = [
            (label, prompt if self.pictures.captions else self.ids[prompt])
            for label, prompt in prompts_of(self.pictures)
        ]
        options: dict[str, Any] = {}
        if self.pipe.kind == "continuous":
            passes = min(MASKED_PASSES, self.pipe.transformer.num_tokens)
            options = {"sampler": "ar", "num_iter": passes}
        return sample_sheet(self.pipe, rows[:2], columns=2, **options)

    def _publish(self, wrapped: Any, official: str | Path | None, figures: dict[str, Any]) -> None:
        """Write what was trained."""
        settings, pipe = self.settings, self.pipe
        if wrapped is not None:
            save_adapter(wrapped, self.out / "adapter", self.names)
            if not settings.merge:
                return
            with torch.no_grad():
                pipe.transformer = wrapped.merge_and_unload()
        if official is not None:
            weights = pipe.transformer.state_dict()
            write_like(official, self.out / Path(official).name, self.family.wrappers, weights)
            if self.names is not None:
                write_json(self.out / "classes.json", {"class_names": self.names})
            return
        put_pipeline(pipe, self.out, lambda: self._card(figures))

    def _card(self, figures: dict[str, Any]) -> None:
        found = figures["held_out_loss"]
        facts = {
            "Data": f"{figures['pictures']:,} pictures of one's own; {figures['held_out']:,} more are "
            "held out.",
            "Settings": json.dumps(asdict(self.settings)),
            "Recommended settings": f"{settings_in_words(self.pipe.config)}.",
            "Loss on what is held out": f"{found['first']:.3f} as it came, {found['best']:.3f} at step "
            f"{found['best_step']:,}, whose weights these are.",
        }
        kind = type(self.pipe.transformer).__name__.removesuffix("Transformer")
        write_card(self.out, f"A {kind} fine-tuned on a person's own pictures.", facts)
