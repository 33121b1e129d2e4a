"""Saved configurations: what travels with them, and what stays on the machine that wrote it."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from diffusers.configuration_utils import FrozenDict

from .errors import InputError, plain_numbers, shown
from .folders import embedded_models
from .schema import check_fields, short

HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")


class OnlyWith(NamedTuple):
    """Options that mean something only where another one is set.

    Attributes:
        options: their names.
        other: name of the other one.
        is_set: of the other one's value: whether they mean something.
        expected: such values in words, for messages.
    """

    options: tuple[str, ...]
    other: str
    is_set: Callable[[Any], bool]
    expected: str


class Portable:
    """A component whose saved configuration is checked when it is read, and names no place.

    To stand before diffusers' `ConfigMixin` among the bases of a class.

    A folder that somebody else wrote must not say which files this machine writes or reads.
    Therefore options that name places are neither saved nor taken from what was saved; whoever
    wants one gives it in the call.
    """

    local_files: ClassVar[tuple[str, ...]] = ()
    """Options that name a file of this machine."""

    local_models: ClassVar[tuple[str, ...]] = ()
    """Options that name a model: an embedded name or a hub id travels, a folder does not."""

    only_with: ClassVar[tuple[OnlyWith, ...]] = ()
    """Options that mean something only with others; a constructor ends with `check_idle`."""

    @classmethod
    def idle(cls, config: Mapping[str, Any]) -> dict[str, OnlyWith]:
        """Options that `config` sets, to something else than their defaults, and that change nothing.

        Args:
            config: options by name; what is missing has its default.
        """
        defaults = {name: plain_option(value) for name, value in options_of(cls).items()}
        full = defaults | {name: plain_option(value) for name, value in config.items()}
        return {
            name: row
            for row in cls.only_with
            if not row.is_set(full[row.other])
            for name in row.options
            if full[name] != defaults[name]
        }

    def check_idle(self) -> None:
        """Refuse options of `only_with` that are set and change nothing.

        Raises:
            InputError: names the first, and what it needs.
        """
        component: Any = self
        config: Mapping[str, Any] = component.config
        for name, row in self.idle(config).items():
            raise InputError(
                f"{name} {shown(config[name])} with {row.other} {shown(config[row.other])}: it "
                f"would have no effect, expected {row.other} {row.expected}"
            )

    @classmethod
    def stays(cls, option: str, value: Any) -> bool:
        """Whether an option is set to what belongs to this machine."""
        if option in cls.local_files:
            return value is not None
        return option in cls.local_models and value is not None and not travels(value)

    @classmethod
    def extract_init_dict(cls, config_dict: Any, **kwargs: Any) -> Any:
        """diffusers' step from a configuration to constructor arguments, on all ways of loading.

        Raises:
            InputError: a value that is not what the constructor's annotation says.
        """
        base: Any = super()
        if isinstance(config_dict, FrozenDict):  # of a living component: its owner chose it
            return base.extract_init_dict(config_dict, **kwargs)
        check_fields(config_dict, cls, f"stored {cls.__name__}")
        local = {name: value for name, value in config_dict.items() if cls.stays(name, value)}
        if local:
            named = ", ".join(f"{name}={short(value)}" for name, value in local.items())
            warnings.warn(
                f"stored {cls.__name__}: left out {named}, a place on the machine that wrote it; "
                "give it in the call",
                UserWarning,
                stacklevel=4,
            )
        kept = {name: value for name, value in config_dict.items() if name not in local}
        return base.extract_init_dict(kept, **kwargs)

    def to_json_string(self) -> str:
        """The configuration as it is saved."""
        base: Any = super()
        config: Mapping[str, Any] = json.loads(base.to_json_string())
        kept = {name: value for name, value in config.items() if not self.stays(name, value)}
        return json.dumps(kept, indent=2, sort_keys=True) + "\n"


def options_of(cls: type) -> dict[str, Any]:
    """The arguments of a class' constructor and their defaults."""
    parameters = inspect.signature(cls.__init__).parameters
    return {name: each.default for name, each in parameters.items() if name != "self"}


def plain_option(value: Any) -> Any:
    """An option's value as a file has it: Python's numbers, and lists for tuples."""
    return list(value) if isinstance(value, tuple) else plain_numbers(value)


def travels(name: Any) -> bool:
    """Whether a model's name means the same on all machines: an embedded one, or a hub id."""
    if not isinstance(name, str):
        return False
    is_hub_id = HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    return name in embedded_models() or is_hub_id
