"""From a name to a pipeline: an embedded model, a folder, or a repository of the hub."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch

from .components import INDEX, quietly, sampler_class
from .errors import ArvisionError, CheckpointError, InputError, unknown_name
from .folders import find_model, parse_device, parse_dtype
from .foreign import check_parts, check_regular, few_modules
from .glm_pipeline import GlmPipeline, part_bases
from .headers import read_header
from .hub import Source, fetch
from .image_pipeline import FAMILIES, ImageModelPipeline
from .models import ChameleonDecoder
from .needed import WEIGHTS, index_of, needed_files, read_json
from .pipeline import ARPipeline
from .schema import check_fields
from .stored import check_layers, check_report

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILE = "tokenizer.json"
"""All that Lumina-mGPT's repositories hold of a processor, where they hold any."""

DECODER_FILE = "vqgan.ckpt"
"""The authors' file with the decoder of Chameleon's pixels; read as tensors only."""


def open_model(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    *,
    device_map: Any = None,
    quantization_config: Any = None,
    decoder: str | Path | None = None,
    options: dict[str, Any] | None = None,
    **reached: Any,
) -> ARPipeline:
    """Load a pipeline; see `arvision.load`.

    Args:
        name_or_path: see there.
        device: likewise.
        dtype: likewise.
        variant: likewise.
        device_map: likewise.
        quantization_config: likewise.
        decoder: likewise.
        options: of an image model's family, likewise.
        **reached: how a repository is reached, see `arvision.hub.Source`.
    """
    if device_map is not None and device is not None:
        raise InputError(f"device {device!r} and device_map {device_map!r}: expected one of them")
    place = parse_device(device)
    kind = parse_dtype(dtype, place)
    folder = find_folder(name_or_path, variant, **reached)
    index = index_of(str(folder), {path.name: path for path in folder.iterdir()})
    content = read_json(folder / index, str(folder / index))
    name = content.get("_class_name")
    build = BUILDERS.get(str(name)) if index == "model_index.json" else _bare
    extra = {"decoder": decoder, "options": options or None}
    if build is None:
        for key, value in {**extra, "quantization_config": quantization_config}.items():
            if value is not None:
                raise InputError(f"{key}: {folder} holds a pipeline that takes none")
        if device_map is not None:
            raise InputError(f"device_map: {folder} holds a pipeline that lies on one device")
        return ARPipeline.from_pretrained(folder, dtype=kind, variant=variant).to(place)
    how = {
        "dtype": kind,
        "variant": variant,
        "device_map": device_map,
        "quantization_config": quantization_config,
    }
    _check_files(folder, variant)
    with _loading(folder):
        pipe = build(folder, content, how, str(name_or_path), **extra)
    is_placed = device_map is not None or quantization_config is not None
    return pipe if is_placed else pipe.to(place)


def find_folder(name_or_path: str | Path, variant: str | None = None, **reached: Any) -> Path:
    """The folder that a name stands for; a repository of the hub is fetched if it must be.

    Raises:
        InputError: an unknown name, or options of the hub for a folder.
        CheckpointError: a folder or repository that holds no model.
    """
    place = find_model(name_or_path)
    if isinstance(place, Path):
        for name, value in reached.items():
            if name != "local_files_only" and value:
                raise InputError(f"{name}: {place} is a folder, expected it with a repository only")
        return place
    return fetch(Source(place, **reached), variant)


open_cached = lru_cache(maxsize=4)(open_model)
"""`open_model` that keeps the last few; call it with strings and a dtype."""


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Around a load by other libraries: without bars, their errors as one line of ours."""
    try:
        with quietly():
            yield
    except ArvisionError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: cannot be loaded ({reason})") from error


@contextlib.contextmanager
def _without_warnings(library: str) -> Iterator[None]:
    """Let a library's log tell errors only."""
    log = logging.getLogger(library)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _check_files(folder: Path, variant: str | None) -> None:
    """Refuse a folder of transformers' or diffusers' that is not complete or regular, before they see it.

    Raises:
        InputError: no weights of that variant.
        CheckpointError: a file is missing, cut off or no safetensors; names it.
    """
    check_regular(folder)
    files = {p.relative_to(folder).as_posix(): None for p in folder.rglob("*") if p.is_file()}

    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name, str(folder / name))

    for name in needed_files(str(folder), files, read, variant):
        if name.endswith(WEIGHTS):
            read_header(folder / name)


def _network(folder: Path, how: dict[str, Any]) -> Any:
    """A network of transformers whose weights are all there.

    Raises:
        InputError: a class that no family drives.
        CheckpointError: weights that are missing or of other shapes.
    """
    import transformers

    content = read_json(folder / "config.json", str(folder / "config.json"))
    named = content.get("architectures") or []
    written = [str(name) for name in named] if isinstance(named, list) else [str(named)]
    names = [name for name in FAMILIES if name in written]
    if not names and any(name.startswith("ChameleonXLLMX") for name in written):
        names = ["ChameleonForConditionalGeneration"]  # Lumina-mGPT's name for the same layout
        content["model_type"] = "chameleon"
    if not names:
        unknown = unknown_name("class of an image network", ", ".join(written) or None, FAMILIES)
        raise InputError(f"{folder}: {unknown}")
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise CheckpointError(
            f"{folder}: {names[0]} is not in transformers {transformers.__version__}, expected a "
            "later release"
        )
    tensors = check_layers(folder, how.get("variant"))
    with few_modules(len(tensors), str(folder / "config.json")):
        network, report = cls.from_pretrained(
            folder,
            config=cls.config_class.from_dict(content),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **{name: value for name, value in how.items() if value is not None},
        )
    check_report(report, str(folder), may_hold_more=True)
    return network.eval()


def _processor(folder: Path) -> Any:
    """The processor in a folder, a tokenizer without one, None where there is neither."""
    import transformers

    kinds = {"AutoProcessor": PROCESSOR_FILES, "AutoTokenizer": (TOKENIZER_FILE,)}
    for kind, files in kinds.items():
        if any((folder / name).exists() for name in files):
            return getattr(transformers, kind).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    return None


def _decoder(folder: Path, given: str | Path | None) -> Any:
    """The decoder of a Chameleon's pixels: the given one, or that beside the network."""
    found = folder / DECODER_FILE if given is None else Path(given)
    if found.is_dir():
        return ChameleonDecoder.from_pretrained(found)
    if given is None and not found.exists():
        return None
    return ChameleonDecoder.from_official(found)


def _bare(
    folder: Path,
    content: dict[str, Any],
    how: dict[str, Any],
    name: str,
    decoder: Any,
    options: Any,
) -> ARPipeline:
    """A network in the layout of transformers."""
    network = _network(folder, how)
    options = dict(options or {})
    processor = options.pop("processor", None) or _processor(folder)
    parts = {}
    if type(network).__name__.startswith("Chameleon"):
        parts["decoder"] = _decoder(folder, decoder)
        is_lumina = any("XLLMX" in str(name) for name in content.get("architectures") or [])
        is_lumina |= "lumina" in name.lower()
        options.setdefault("layout", "lumina" if is_lumina else "chameleon")
        side = re.search(r"lumina.*-(512|768|1024)(?!\d)", name.lower())
        if options["layout"] == "lumina" and side and not {"height", "width"} & set(options):
            options |= {"height": int(side[1]), "width": int(side[1])}
    elif decoder is not None:
        raise InputError(f"decoder {decoder}: {type(network).__name__} has one of its own")
    return ImageModelPipeline(network, processor, options=options or None, **parts)


def _saved(
    folder: Path,
    content: dict[str, Any],
    how: dict[str, Any],
    name: str,
    decoder: Any,
    options: Any,
) -> ARPipeline:
    """A folder that `ImageModelPipeline.save_pretrained` wrote."""
    own = {key: value for key, value in content.items() if not key.startswith("_")}
    try:
        check_fields(own, ImageModelPipeline, str(folder / INDEX), only=True)
    except InputError as error:
        raise CheckpointError(str(error)) from error
    settings, *_ = ImageModelPipeline.extract_init_dict(own)
    parts: dict[str, Any] = {"transformer": _network(folder / "transformer", how)}
    for part in ("processor", "decoder", "sampler", "transformer"):
        settings.pop(part, None)
    options = dict(options or {})
    if "processor" in options:
        parts["processor"] = options.pop("processor")
    elif (folder / "processor").is_dir():
        parts["processor"] = _processor(folder / "processor")
    if decoder is not None or (folder / "decoder").is_dir():
        parts["decoder"] = _decoder(folder, folder / "decoder" if decoder is None else decoder)
    if (folder / "sampler").is_dir():
        cls = sampler_class(content.get("sampler"), str(folder / INDEX))
        parts["sampler"] = cls.from_pretrained(folder / "sampler")
    settings["options"] = {**(settings.get("options") or {}), **options} or None
    try:
        return ImageModelPipeline(**parts, **settings)
    except TypeError as error:
        raise CheckpointError(f"{folder}: model_index.json does not fit ({error})") from error


def _glm(
    folder: Path,
    content: dict[str, Any],
    how: dict[str, Any],
    name: str,
    decoder: Any,
    options: Any,
) -> ARPipeline:
    """diffusers' folder of GLM-Image."""
    import diffusers

    if decoder is not None or options is not None:
        raise InputError("decoder and options: GLM-Image's folder holds all its parts")
    check_parts(folder, content, part_bases(), how.get("variant"))
    whole = dict(how)
    for_network = dict(how)
    if how["quantization_config"] is not None:
        # What the caller names is the network that draws the codes.
        whole["quantization_config"] = None
    network = _network(folder / "vision_language_encoder", for_network)
    with _without_warnings("diffusers"):  # of a part that is given and not read from the folder
        pipe: Any = cast(Any, diffusers).GlmImagePipeline.from_pretrained(
            folder,
            vision_language_encoder=network,
            use_safetensors=True,
            local_files_only=True,
            **{name: value for name, value in whole.items() if value is not None},
        )
    return GlmPipeline(**pipe.components)


BUILDERS: dict[str, Callable[..., ARPipeline]] = {
    "GlmImagePipeline": _glm,
    "ImageModelPipeline": _saved,
}
"""How a folder becomes a pipeline, by the class that its index names."""
