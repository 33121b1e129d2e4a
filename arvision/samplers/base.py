"""What all samplers share: configuration like a diffusers scheduler's, and the registry."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from typing_extensions import Self

from ..contracts import (
    Conditions,
    ContinuousModel,
    HasCodebook,
    Samples,
    ScaleModel,
    Schedule,
    Seeds,
    StepCallback,
    TokenModel,
    device_of,
)
from ..decoding.fixed_step import Steps
from ..decoding.given import Given
from ..decoding.guidance import Guidance
from ..decoding.logits import Shaping, idle_law, per_scale, warn_of_greedy
from ..decoding.loop import Drafter, FixedWindow, WindowPolicy, decode_tokens
from ..decoding.run import Run
from ..decoding.verify import Rule
from ..errors import InputError, plain_numbers, unknown_name
from ..files import user_path
from ..memory import Peak
from ..portable import Portable, options_of, travels
from ..registry import Registry
from ..stored import check_plain

LAW = ("temperature", "top_k", "top_p")
"""Options of samplers for which a model has values of its own."""

SAMPLERS: Registry[type[BaseSampler]] = Registry("sampler", entry_point_group="arvision.samplers")


def register(name: str, *, exact: bool, drives: str) -> Any:
    """Class decorator: file a sampler under `name`.

    Args:
        name: what users write.
        exact: whether its default configuration draws from the model's own law.
        drives: kind of model, "token", "scale", "continuous" or "student".
    """
    file = SAMPLERS.register(name, exact=exact, drives=drives)

    def mark(cls: type[BaseSampler]) -> type[BaseSampler]:
        cls.name = name
        # diffusers finds out how to load a saved component by looking for the mixins of its class
        # among the names of its module.
        vars(sys.modules[cls.__module__]).setdefault("SchedulerMixin", SchedulerMixin)
        return file(cls)

    return mark


NOUNS: dict[type, str] = {
    TokenModel: "a token model",
    ScaleModel: "a scale model",
    ContinuousModel: "a continuous model",
    HasCodebook: "a model with a codebook",
}
"""What messages call a model that a sampler needs, with its article."""


class BaseSampler(Portable, SchedulerMixin, ConfigMixin):
    """A sampler: constructor arguments are its saved configuration.

    Subclasses record their arguments with `register_to_config`, declare what they need besides the
    model in `needs`, and implement `decode`.
    """

    config_name = "sampler_config.json"
    has_compatibles = False
    name = ""

    needs: ClassVar[dict[str, type]] = {}
    """Models that the sampler needs besides the one it draws with: option to contract. The option
    takes a name or folder, which a pipeline loads, a pipeline, or a model."""

    keeps_given: ClassVar[bool] = False
    """Whether the sampler keeps tokens that are given and draws the others around them."""

    @classmethod
    def stays(cls, option: str, value: Any) -> bool:
        """Whether an option is set to what belongs to this machine: `needs` may name folders."""
        is_model = option in cls.needs and value is not None and not travels(value)
        return is_model or super().stays(option, value)

    def register_to_config(self, **options: Any) -> None:
        """diffusers' step that keeps constructor arguments, with a word on those that change nothing."""
        super().register_to_config(**options)
        warn_of_greedy(self.config)

    @property
    def is_exact(self) -> bool:
        """Whether this configuration draws from the model's own law."""
        return bool(SAMPLERS.entry(self.name).facts["exact"])

    def __call__(
        self,
        model: Any,
        conditions: Conditions,
        *,
        seeds: Seeds,
        guidance_scale: Schedule | Guidance = 1.0,
        on_step: StepCallback | None = None,
        steps: Steps | None = None,
        given: Given | None = None,
    ) -> Samples:
        """Draw one image per condition.

        Args:
            model: of a kind that the sampler drives.
            conditions: one per image.
            seeds: one per image, an integer or a pair (seed, image).
            guidance_scale: weight of the condition; 1 is the plain conditional model. Scale models
                also take a list with a weight for each scale; everything else that changes is a
                `Guidance`.
            on_step: called after each pass.
            steps: how passes of fixed shapes run, see `arvision.decoding.fixed_step`; None for the
                ordinary loop.
            given: tokens that are not drawn, conditions of the others; None for none.

        Returns:
            Tokens [B, N], the statistics of `arvision.decoding.run.Run.stats` and what the sampler
            adds, `lossless`, and `peak_memory`: the most bytes that lay on an accelerator while tokens
            were drawn, weights included; None on a CPU.

        Raises:
            InputError: a negative guidance scale, another number of seeds than of conditions, given
                tokens with a sampler that keeps none, or what the sampler's class names.
        """
        if given is not None and not self.keeps_given:
            raise InputError(
                f"sampler {self.name!r} draws all tokens of an image and keeps none that are given: "
                f"expected another, such as {', '.join(keeping(self.name)) or 'ar'}"
            )
        if isinstance(guidance_scale, Guidance):
            guidance_scale = guidance_scale.of(model, len(conditions))
        run = Run(
            len(conditions),
            model.num_tokens,
            seeds,
            on_step,
            guidance_scale=guidance_scale,
            steps=steps,
            given=given,
        )
        with Peak(device_of(model)) as peak:
            try:
                samples = self.decode(model, conditions, run)
            finally:
                run.leave_graphs()
        samples.stats["lossless"] = self.is_exact
        samples.stats["peak_memory"] = peak.bytes
        return samples

    def without_effect(self, model: Any) -> dict[str, Any]:
        """Arguments of a draw that change nothing with this configuration and model.

        Returns:
            Names out of "guidance_scale", "temperature", "top_k" and "top_p", and the value of each
            that asks for nothing.
        """
        return {}

    @property
    def plan_in_words(self) -> str:
        """The configuration, as far as it decides what has an effect."""
        return "this configuration"

    def decode(self, model: Any, conditions: Conditions, run: Run) -> Samples:
        """Draw one image per condition, keeping the books in `run`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it samples")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A saved sampler, without the options that this release does not know (with a warning)."""
        place = user_path(pretrained_model_name_or_path or "") / (subfolder or "")
        if place.is_dir():
            check_plain(place)
        loaded: Any = cls.load_config(
            pretrained_model_name_or_path,
            subfolder=subfolder,
            return_unused_kwargs=True,
            return_commit_hash=True,
            **kwargs,
        )
        config, unused, _ = loaded
        known = options_of(cls)
        stale = [name for name in config if name not in known and not name.startswith("_")]
        _warn_of_stale(cls.name, {name: config[name] for name in stale})
        # Earlier releases took and saved what changes nothing.
        stale += cls.idle({name: config[name] for name in known if name in config})
        stale += idle_law(config)
        kept = {name: value for name, value in config.items() if name not in stale}
        made: Any = cls.from_config(kept, return_unused_kwargs=True, **unused)
        sampler, rest = made
        sampler.is_stored = True
        return (sampler, rest) if return_unused_kwargs else sampler

    is_stored = False
    """Whether the configuration was read from a folder, and not chosen by the caller."""

    def foreign(self, kind: str) -> dict[str, Any]:
        """Options that models of `kind` do not have and that are set here, to their defaults."""
        return {}

    def suited(self, kind: str) -> BaseSampler:
        """A stored sampler without the options foreign to `kind` of model (with a warning).

        What a caller sets is refused when it draws; a folder must open.
        """
        foreign = self.foreign(kind) if self.is_stored else {}
        if not foreign:
            return self
        _warn_of_stale(f"{self.name} of a {kind} model", {n: self.config[n] for n in foreign})
        return self.with_options(**foreign)

    def with_options(self, **options: Any) -> BaseSampler:
        """The same sampler with some options changed; it keeps the models that were bound to it.

        What it had been given besides and what means nothing with the changed options (`only_with`,
        `idle_law`) goes back to its default.

        Raises:
            InputError: an option that this sampler does not have, or that changes nothing.
        """
        known = options_of(type(self))
        wanted = {name: self.config[name] for name in known} | options
        left = {
            *self.idle({name: wanted[name] for name in known}),
            *idle_law(wanted),
        } - options.keys()
        wanted = {name: value for name, value in wanted.items() if name not in left}
        changed = _make(self.name, wanted)
        return changed.bind(**{k: v for k, v in self._bound.items() if k not in options})

    def with_law(self, law: Mapping[str, Any], written: Collection[str]) -> BaseSampler:
        """The same sampler with a model's recommended temperature, top-k and top-p.

        Args:
            law: recommended values by name, such as a pipeline's configuration.
            written: names of options that somebody has chosen, which stay.
        """
        open_ = [name for name in LAW if name in self.config and name not in written]
        wanted = {name: law[name] for name in open_}
        idle = idle_law({**self.config, **wanted})
        return self.with_options(**{k: v for k, v in wanted.items() if k not in idle})

    @property
    def _bound(self) -> dict[str, Any]:
        """What was given for each of `needs`: a model, or a pipeline around one."""
        return vars(self).get("_models", {})

    def take(self, name: str, value: Any) -> None:
        """Keep the constructor's option `name` of `needs`: a name, a path, a pipeline or a model.

        Raises:
            InputError: anything else.
        """
        if isinstance(value, Path):
            self.register_to_config(**{name: str(value)})
        elif value is not None and not isinstance(value, str):
            # A model is no configuration: what is saved is a sampler that still asks for one.
            self.register_to_config(**{name: None})
            self._models = self._checked({name: value})

    def bind(self, **models: Any) -> Self:
        """This sampler with models for what it needs, a copy: `sampler.bind(draft=model)`.

        Args:
            **models: by the names of `needs`; models of the right kind, or pipelines around them.

        Raises:
            InputError: a name that is not needed, or a model of another kind.
        """
        bound = copy.copy(self)
        bound._models = self._bound | self._checked(models)
        return bound

    def _checked(self, models: dict[str, Any]) -> dict[str, Any]:
        for name, value in models.items():
            if name not in self.needs:
                raise unknown_name(f"model of sampler {self.name!r}:", name, self.needs)
            noun = NOUNS[self.needs[name]]
            if not isinstance(inner_model(value), self.needs[name]):
                raise InputError(
                    f"{name} {type(value).__name__}: expected a model name, a folder, a pipeline "
                    f"around {noun}, or {noun}"
                )
        return models

    def missing(self, model: Any) -> list[str]:
        """Names of `needs` that this configuration lacks to draw with `model`."""
        return [name for name in self.needs if name not in self._bound]

    def bound(self, name: str) -> Any:
        """The model that was given for `name` of `needs`.

        Raises:
            InputError: none was given yet.
        """
        if name not in self._bound:
            given, noun = self.config[name], NOUNS[self.needs[name]]
            what = (
                f"no {name}" if given is None else f"{name} {given!r} is a name that is not loaded"
            )
            raise InputError(
                f"{what}: expected {noun}, a pipeline, or a name and a pipeline to load it"
            )
        return inner_model(self._bound[name])


def keeping(name: str) -> list[str]:
    """Samplers that keep given tokens and drive a kind of model that sampler `name` drives."""
    kinds = set(SAMPLERS.entry(name).facts["drives"].split(", "))
    return [
        entry.name
        for entry in SAMPLERS
        if entry.value.keeps_given and kinds & set(entry.facts["drives"].split(", "))
    ]


def inner_model(value: Any) -> Any:
    """The model of a pipeline; anything else as it is."""
    return getattr(value, "model", value) if hasattr(value, "components") else value


def _warn_of_stale(owner: str, options: dict[str, Any]) -> None:
    if options:
        named = ", ".join(f"{name}={value!r}" for name, value in options.items())
        warnings.warn(
            f"stored sampler {owner}: dropped {named}, which it does not know; save it again to "
            "write the rest",
            UserWarning,
            stacklevel=3,
        )


def parse_value(text: str) -> Any:
    """A number, boolean or None where the text is one, else the text."""
    try:
        return json.loads({"none": "null"}.get(text.lower(), text.lower()))
    except (ValueError, RecursionError):  # no JSON, or a number too long for Python
        return text


def parse_sampler(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a sampler written as "name" or "name:option=value:option=value".

    This is the one grammar for samplers in text: `get_sampler`, `sample`, `compare` and `eval`
    understand it. Whether the name and the options exist is for `get_sampler` to say.

    Raises:
        InputError: an option without a value, or given twice.
    """
    name, *parts = spec.strip().split(":")
    options: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise InputError(f"sampler {spec!r}: expected option=value, found {part!r}")
        options = join_options(spec, options, {key: parse_value(value)})
    return name, options


def join_options(spec: str, own: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The options of a sampler `spec` and further ones.

    Raises:
        InputError: one is given twice.
    """
    for name in more:
        if name in own:
            raise InputError(f"sampler {spec!r}: option {name!r} is given twice")
    return own | more


def get_sampler(name: str, **options: Any) -> BaseSampler:
    """Make the sampler `name`.

    Args:
        name: a registered name, or one with options: "sjd:window=32:coupling=maximal".
        **options: further options.

    Raises:
        InputError: an unknown name or option, one given twice, or one out of range.
    """
    spec, (name, own) = name, parse_sampler(name)
    options = join_options(spec, own, options)
    return _make(name, options)


def _make(name: str, options: dict[str, Any]) -> BaseSampler:
    cls = SAMPLERS[name]
    known = options_of(cls)
    for option in options:
        if option not in known:
            raise unknown_name(f"option of sampler {name!r}:", option, known)
    return cls(**{name: plain_numbers(value) for name, value in options.items()})


def strangers_sampler(spec: str) -> BaseSampler:
    """`get_sampler` of what a stranger wrote: options that name files or further models are refused.

    Raises:
        InputError: such an option, or what `get_sampler` refuses.
    """
    kind, own = parse_sampler(spec)
    sampler = SAMPLERS[kind]
    for name in own:
        if name in sampler.local_files or name in sampler.needs:
            raise InputError(f"sampler {spec!r}: {name} is for the server to say")
    return get_sampler(spec)


class TokenSampler(BaseSampler):
    """A sampler that runs the one decoding loop of token models.

    Subclasses say which drafter, rule and window policy the loop takes.
    """

    def shaping(self) -> Shaping:
        """The configured temperature, top-k and top-p.

        Raises:
            InputError: a value out of range, or a list of temperatures, which only scale models take.
        """
        return self._shaping(self.config["temperature"])

    def scale_shaping(self, model: ScaleModel) -> list[Shaping]:
        """The same for each scale of a model; a list of temperatures has one for each.

        Raises:
            InputError: a value out of range, or a list of another length.
        """
        listed = per_scale("temperature", self.config["temperature"], len(model.scales))
        return [self._shaping(value) for value in listed]

    def _shaping(self, temperature: float) -> Shaping:
        top_k, top_p = self.config["top_k"] or 0, self.config["top_p"]
        return Shaping(temperature=temperature, top_k=top_k, top_p=top_p)

    def check_shaping(self) -> None:
        """Refuse values out of range, for samplers that also take a list of temperatures.

        Raises:
            InputError: see above.
        """
        given = self.config["temperature"]
        for value in given if isinstance(given, Sequence) else [given]:
            self._shaping(value)

    def drafter(self, model: TokenModel) -> Drafter:
        """What proposes tokens."""
        raise NotImplementedError

    def rule(self, model: TokenModel) -> Rule:
        """What decides which of them stay."""
        raise NotImplementedError

    def policy(self, model: TokenModel) -> WindowPolicy:
        """How long a pass is; one token by default."""
        return FixedWindow(1)

    def decode(self, model: Any, conditions: Conditions, run: Run) -> Samples:
        """Run the decoding loop."""
        return decode_tokens(
            model,
            conditions,
            run,
            drafter=self.drafter(model),
            rule=self.rule(model),
            shape=self.shaping(),
            policy=self.policy(model),
        )
