"""What a file, a folder or a repository is, and how to load it; no network is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .catalog import IMAGE_PIPELINES, list_models
from .checkpoint import INDEX, read_state_dict
from .errors import ArvisionError, CheckpointError, InputError
from .folders import ASSETS, embedded_models
from .headers import read_header
from .hub import Source, fetch_index
from .known import KnownModel, find_known, known_models
from .needed import INDEXES, read_json

Facts = dict[str, Any]
UNKNOWN = "nothing that arvision knows"
WRAPPERS = (
    *("trainer.ema_parameters", "trainer.var_wo_ddp", "trainer.gpt_fsdp", "trainer.gpt_wo_ddp"),
    *("var_wo_ddp", "gpt_fsdp", "gpt_wo_ddp", "model_ema", "ema", "model", "module", "state_dict"),
    *("vae", "trainer.vae_local", "vae_local"),
)
"""Keys under which any family's releases keep tensors."""

SIGNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("LlamaGen-DD transformer", "dd", ("tok_embeddings.weight", "final_layer_conti.")),
    ("VAR-DD transformer", "dd", ("word_embed.weight", "final_layer_conti.")),
    ("LlamaGen transformer", "llamagen", ("tok_embeddings.weight", "cls_embedding.")),
    ("VAR transformer", "var", ("word_embed.weight", "class_emb.weight", "lvl_embed.weight")),
    ("Infinity transformer", "infinity", ("text_proj_for_sos.", "word_embed.weight")),
    ("MAR transformer", "mar", ("diffusion_pos_embed_learned", "diffloss.")),
    ("LlamaGen tokenizer", "llamagen", ("encoder.conv_blocks.", "quantize.embedding.weight")),
    ("VAR tokenizer", "var", ("quantize.quant_resi.", "encoder.down.")),
    ("Infinity tokenizer", "infinity", ("encoder.conv_in.conv.weight", "decoder.up.")),
    ("Chameleon VQGAN", "chameleon", ("quantize.embedding.weight", "decoder.up.", "quant_conv.")),
    ("MAR autoencoder", "mar", ("encoder.down.", "decoder.up.", "quant_conv.")),
    ("NextStep autoencoder", "nextstep", ("encoder.down.", "decoder.up.")),
    ("NextStep network", "nextstep", ("image_head.", "layers.")),
    ("language model of transformers", "text", ("model.embed_tokens.", "model.layers.")),
)
"""What, family, and keys (or beginnings of keys) that all are there; the first that fits counts."""


def inspect(name: str | Path) -> Facts:
    """Tell what something is.

    Args:
        name: a file, a folder, an embedded or known name, or a hub id.

    Returns:
        `what` it is and how to `load` it, always; what else can be told (`family`, `parameters`,
        `types`, `parts`, `files`, known figures), where it can.

    Raises:
        InputError: nothing of that name.
        CheckpointError: a file that cannot be read, or the hub gives no answer.
    """
    text = str(name)
    if text in embedded_models():
        facts = next(one.facts for one in list_models() if one == text)
        found = {"what": "an embedded model", **facts, "load": f'arvision.load("{text}")'}
        return found | {"parts": _parts(ASSETS / text)}
    path = Path(name)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    known = find_known(text)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return _repository(text, known)
    if known is not None:
        return _known(known)
    names = ", ".join([*embedded_models(), *(one.name for one in known_models())])
    raise InputError(f"{text!r}: no such file or folder, and no known model: expected {names}")


def _known(model: KnownModel) -> Facts:
    """What the list of known models says."""
    return {
        "what": f"a published {model.family} model ({model.kind})",
        "family": model.family,
        "files": dict(model.files),
        "licence": model.licence,
        "size": model.size,
        "settings": dict(model.settings),
        "quality": model.quality,
        "speed": model.speed,
        "source": model.source,
        "load": model.load,
    }


def _file(path: Path) -> Facts:
    """A weight file, by its head or its keys."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return {
            "what": "a language model in GGUF",
            "load": f'arvision.generate("{path}", ["a prompt"])',
        }
    if path.name.endswith(INDEX):
        places = read_json(path, str(path)).get("weight_map")
        if not isinstance(places, dict):
            raise CheckpointError(f"{path}: expected an index of shards with a weight_map")
        shards = sorted(set(places.values()))
        missing = [shard for shard in shards if not (path.parent / shard).is_file()]
        facts = _by_keys(path.parent, places)
        return facts | {"files": shards, "missing": missing}
    if path.suffix == ".safetensors":
        header = read_header(path)
        counts = {"parameters": header.num_values, "types": sorted(set(header.dtypes.values()))}
        return _by_keys(path, header.shapes) | counts
    if path.suffix == ".json":
        return {"what": f"{UNKNOWN}: a JSON file", "load": "name the folder in which it lies"}
    try:
        tensors = read_state_dict(path, WRAPPERS, device="meta")
    except CheckpointError as error:
        return {"what": f"{UNKNOWN}: {error}", "load": "cannot be loaded"}
    types = sorted({str(one.dtype).removeprefix("torch.") for one in tensors.values()})
    counts = {"parameters": sum(one.numel() for one in tensors.values()), "types": types}
    return _by_keys(path, tensors) | counts


def _by_keys(path: Path, keys: Iterable[str]) -> Facts:
    """What keys are, by `SIGNS`."""
    listed = list(keys)
    for what, family, signs in SIGNS:
        if all(any(key.startswith(sign) for key in listed) for sign in signs):
            facts = {"what": f"a {what}", "family": family, "tensors": len(listed)}
            return facts | {"load": _how(path, what, family)}
    shown = ", ".join(sorted(listed)[:3]) or "none"
    return {
        "what": f"{UNKNOWN}: {len(listed)} tensors ({shown}, ...)",
        "tensors": len(listed),
        "load": "docs/extending.md says how to wrap a network of your own",
    }


def _how(path: Path, what: str, family: str) -> str:
    """The line that loads a file of a family."""
    if family == "text":
        return f'arvision.generate("{path.parent}", ["a prompt"]), with config.json and tokenizer'
    if family == "chameleon":
        return f'arvision.load("FOLDER OF A CHAMELEON", decoder="{path}")'
    transformer, tokenizer = (
        (path, "FILE") if what.endswith(("transformer", "network")) else ("FILE", path)
    )
    line = f"arvision convert --from {family} --transformer {transformer}"
    return f"{line} --tokenizer {tokenizer} --out FOLDER"


def _folder(folder: Path) -> Facts:
    """A folder, by its index."""
    index = next((folder / name for name in INDEXES if (folder / name).exists()), None)
    if index is None:
        shards = sorted(folder.glob(f"*{INDEX}"))
        if len(shards) == 1:
            return _file(shards[0])
        shown = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        return {"what": f"{UNKNOWN}: a folder with {shown}", "load": "cannot be loaded"}
    facts = _by_index(index, str(folder))
    if index.name == "model_index.json":
        return facts | {"parts": _parts(folder)}
    return facts | _weights(folder)


def _by_index(index: Path, place: str) -> Facts:
    """What `model_index.json` or `config.json` says; `place` is what a load line names."""
    content = read_json(index, str(index))
    load = f'arvision.load("{place}")'
    if index.name == "model_index.json":
        name = str(content.get("_class_name"))
        if name in (*IMAGE_PIPELINES, "ARPipeline"):
            return {"what": f"a pipeline ({name})", "load": load}
        return {"what": f"{UNKNOWN}: a pipeline of diffusers ({name})", "load": "with diffusers"}
    if "fm_head_dim" in content:
        line = f"arvision convert --from nextstep --transformer {place} --out FOLDER"
        return {
            "what": "a NextStep model in its authors' layout",
            "family": "nextstep",
            "load": line,
        }
    classes = [str(one) for one in content.get("architectures") or []]
    kind = str(content.get("model_type"))
    if any(one.startswith(("Janus", "Emu3ForCond", "Chameleon")) for one in classes):
        return {"what": f"an image model of transformers ({', '.join(classes)})", "load": load}
    if any(one.startswith("GlmImage") for one in classes):
        what = "the network of GLM-Image without its diffusion decoder: it gives codes, no pictures"
        return {"what": what, "load": load}
    if any(one.endswith(("ForCausalLM", "LMHeadModel")) for one in classes):
        line = f'arvision.generate("{place}", ["a prompt"])'
        return {"what": f"a language model of transformers ({', '.join(classes)})", "load": line}
    named = ", ".join(classes) or kind
    code = ", by code of its repository, which arvision never runs" if "auto_map" in content else ""
    return {
        "what": f"{UNKNOWN}: a network ({named}){code}",
        "load": "docs/extending.md says how to wrap a network of your own",
    }


def _parts(folder: Path) -> dict[str, str]:
    """Parts of a pipeline, with their classes and sizes."""
    content = read_json(folder / "model_index.json", str(folder / "model_index.json"))
    found = {}
    for part, value in content.items():
        if isinstance(value, list) and len(value) == 2 and value[0] is not None:
            size = _weights(folder / part).get("parameters")
            words = "" if size is None else f", {size:,} parameters"
            is_there = (folder / part).is_dir()
            found[part] = f"{value[1]}{words}" if is_there else f"{value[1]}, not in this folder"
    return found


def _weights(folder: Path) -> Facts:
    """Numbers and types of the safetensors in a folder, and files that cannot be read."""
    total, types, faults = 0, set(), []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            header = read_header(path)
        except ArvisionError as error:
            faults.append(str(error))
            continue
        total, types = total + header.num_values, types | set(header.dtypes.values())
    facts: Facts = {"parameters": total, "types": sorted(types)} if total else {}
    return facts | ({"broken": faults} if faults else {})


def _repository(repo: str, known: KnownModel | None) -> Facts:
    """A repository of the hub, by its index alone; what is known of it, where the hub is silent."""
    published = {} if known is None else _known(known)
    if known is not None and not known.load.startswith("arvision.load"):
        return published
    several = [one for one in known_models() if one.hub == repo]
    if known is None and several:
        names = ", ".join(one.name for one in several)
        return {
            "what": f"{len(several)} published models: {names}",
            "load": f"`arvision info {several[0].name}` and so on tell each",
        }
    try:
        index = fetch_index(Source(repo))
    except ArvisionError as error:
        if known is None:
            raise
        return published | {"note": str(error)}
    found: Mapping[str, Any] = _by_index(index, repo)
    return {**published, **found, "load": published.get("load", found["load"])}


def as_lines(facts: Facts) -> list[str]:
    """Facts as lines for a terminal."""
    lines = []
    for key, value in facts.items():
        if value in (None, [], {}):
            continue
        if isinstance(value, Mapping):
            value = "; ".join(f"{name} {one}" for name, one in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"{key + ':':12}{value}")
    return lines
