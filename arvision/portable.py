"""Saved configurations: what travels with them, and what stays on the machine that wrote it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from diffusers.configuration_utils import FrozenDict

from .folders import embedded_models
from .schema import check_fields, short

HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")


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


def travels(name: Any) -> bool:
    """Whether a model's name means the same on all machines: an embedded one, or a hub id."""
    if not isinstance(name, str):
        return False
    is_hub_id = HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    return name in embedded_models() or is_hub_id
