"""What all samplers share: configuration like a diffusers scheduler's, and the registry."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any, ClassVar, cast

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..contracts import Conditions, Samples, Seeds, StepCallback, TokenModel
from ..decoding.logits import Shaping, check_guidance_scale
from ..decoding.loop import Drafter, FixedWindow, WindowPolicy, decode_tokens
from ..decoding.verify import Rule
from ..errors import InputError, unknown_name
from ..registry import Registry

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


class BaseSampler(SchedulerMixin, ConfigMixin):
    """A sampler: constructor arguments are its saved configuration.

    Subclasses record their arguments with `register_to_config` and implement `__call__` as
    `arvision.contracts.Sampler` says.
    """

    config_name = "sampler_config.json"
    has_compatibles = False
    name = ""

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
        guidance_scale: float = 1.0,
        on_step: StepCallback | None = None,
    ) -> Samples:
        """Draw one sample per condition, see `arvision.contracts.Sampler`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it samples")

    def with_options(self, **options: Any) -> BaseSampler:
        """The same sampler with some options changed.

        Raises:
            InputError: an option that this sampler does not have.
        """
        known = _options(type(self))
        current = {name: self.config[name] for name in known}
        return get_sampler(self.name, **current | options)


def _options(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]


def parse_value(text: str) -> Any:
    """A number, boolean or None where the text is one, else the text."""
    try:
        return json.loads({"none": "null"}.get(text.lower(), text.lower()))
    except json.JSONDecodeError:
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
    cls = SAMPLERS[name]
    known = _options(cls)
    for option in options:
        if option not in known:
            raise unknown_name(f"option of sampler {name!r}:", option, known)
    return cls(**options)


class TokenSampler(BaseSampler):
    """A sampler that runs the one decoding loop of token models.

    Subclasses say which drafter, rule and window policy the loop takes.
    """

    def shaping(self) -> Shaping:
        """The configured temperature, top-k and top-p."""
        config = self.config
        return Shaping(
            temperature=config["temperature"], top_k=config["top_k"] or 0, top_p=config["top_p"]
        )

    def drafter(self, model: TokenModel) -> Drafter:
        """What proposes tokens."""
        raise NotImplementedError

    def rule(self, model: TokenModel) -> Rule:
        """What decides which of them stay."""
        raise NotImplementedError

    def policy(self, model: TokenModel) -> WindowPolicy:
        """How long a pass is; one token by default."""
        return FixedWindow(1)

    def __call__(
        self,
        model: Any,
        conditions: Conditions,
        *,
        seeds: Seeds,
        guidance_scale: float = 1.0,
        on_step: StepCallback | None = None,
    ) -> Samples:
        """Draw one image per condition.

        Args:
            model: a token model.
            conditions: one per image.
            seeds: one per image, an integer or a pair (seed, image).
            guidance_scale: weight of the conditional logits; 1 is the plain conditional model.
            on_step: called after each pass.

        Returns:
            Tokens [B, N] int64, the statistics of `decode_tokens`, and `lossless`.

        Raises:
            InputError: a negative guidance scale, or as many seeds as conditions are not given.
        """
        check_guidance_scale(guidance_scale)
        samples = self.decode(
            model, conditions, seeds=seeds, guidance_scale=guidance_scale, on_step=on_step
        )
        samples.stats["lossless"] = self.is_exact
        return samples

    def decode(self, model: Any, conditions: Conditions, **run: Any) -> Samples:
        """Run the decoding loop; `run` holds `seeds`, `guidance_scale` and `on_step`."""
        return decode_tokens(
            model,
            conditions,
            drafter=self.drafter(model),
            rule=self.rule(model),
            shape=self.shaping(),
            policy=self.policy(model),
            **run,
        )


class DraftHolder(BaseSampler):
    """A sampler with an option `draft`: a name or folder to be loaded later, or a model.

    Subclasses call `take_draft` in their constructor, and `needed_draft` when they draw.
    """

    draft_contract: ClassVar[type]
    """What a draft must satisfy."""

    draft_noun: ClassVar[str]
    """What to call such a model in messages, with its article."""

    _draft: Any = None

    def take_draft(self, draft: Any) -> None:
        """Keep the option `draft` of the constructor: a name, a path, a pipeline, a model or None.

        Raises:
            InputError: anything else.
        """
        if isinstance(draft, Path):
            self.register_to_config(draft=str(draft))
        elif draft is not None and not isinstance(draft, str):
            # A model is no configuration: what is saved is a sampler whose draft is still to come.
            self.register_to_config(draft=None)
            self.bind_draft(draft)

    @property
    def wants_draft(self) -> bool:
        """Whether a draft is still to be given by `bind_draft`."""
        return self._draft is None

    def bind_draft(self, draft: Any) -> None:
        """Give the sampler its draft, a model of the right kind or a loaded pipeline around one.

        Raises:
            InputError: neither.
        """
        contract = self.draft_contract
        model = draft if isinstance(draft, contract) else getattr(draft, "model", None)
        if not isinstance(model, contract):
            raise InputError(
                f"draft {type(draft).__name__}: expected a model name, a folder, a pipeline around "
                f"{self.draft_noun}, or {self.draft_noun}"
            )
        self._draft = model

    def needed_draft(self) -> Any:
        """The draft.

        Raises:
            InputError: none was given yet.
        """
        if self._draft is None:
            name = self.config["draft"]
            given = "no draft" if name is None else f"draft {name!r} is a name that is not loaded"
            raise InputError(
                f"{given}: expected {self.draft_noun}, a pipeline, or a name and a pipeline to "
                "load it"
            )
        return self._draft

    def with_options(self, **options: Any) -> DraftHolder:
        """The same sampler with some options changed; it keeps its draft unless that is one."""
        changed = cast("DraftHolder", super().with_options(**options))
        if "draft" not in options:
            changed._draft = self._draft
        return changed
