"""What all networks of this package are: diffusers models that are checked before they are built."""

from __future__ import annotations

import sys
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from ..files import user_path
from ..networks import Entered
from ..portable import Portable
from ..stored import check_network

REACHED = ("revision", "token", "cache_dir", "local_files_only", "force_download")


class Network(Entered, Portable, ModelMixin, ConfigMixin):
    """A network with saved configuration, whose entries are calls, loaded as strictly as the authors' checkpoints are.

    Subclasses record their constructor's arguments with `register_to_config`; its annotations say
    what a saved configuration may hold, see `arvision.schema`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # diffusers finds out how to load a saved component by looking for the mixins of its class
        # among the names of its module.
        vars(sys.modules[cls.__module__]).setdefault("ModelMixin", ModelMixin)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """A saved network, see diffusers' `ModelMixin.from_pretrained`.

        Args:
            pretrained_model_name_or_path: folder, or a hub id "owner/name".
            **kwargs: diffusers' own.

        Raises:
            CheckpointError: a configuration or weights that are not those of this class, before
                anything is built; names the first value or key.
        """
        folder = user_path(pretrained_model_name_or_path)
        subfolder = kwargs.pop("subfolder", None) or ""
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            reached = {name: kwargs.pop(name) for name in REACHED if name in kwargs}
            wanted = [f"{subfolder}/{kind}".lstrip("/") for kind in ("*.json", "*.safetensors")]
            name = str(pretrained_model_name_or_path)
            folder = user_path(snapshot_download(name, allow_patterns=wanted, **reached))
        place = folder / subfolder
        check_network(cls, place, kwargs.get("variant"))
        return super().from_pretrained(str(place), **{"use_safetensors": True} | kwargs)
