"""`arvision.evaluate`: draw the samples of a protocol, score them, and write the report."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .api import load, sample
from .decoding.teacher_forcing import teacher_forced
from .errors import InputError, as_integer, check_count, shown
from .eval.distributed import local_device, processes
from .eval.evaluate import choose_metrics
from .eval.features import Extractor, get_extractor
from .eval.full_report import full_report
from .eval.generate import GenerateConfig, Made, generate
from .eval.protocols import get_pixels, get_protocol
from .eval.reference import prepare_reference
from .eval.report import write_report
from .eval.shards import MOST_SAMPLES, ShardFolder, config_hash
from .eval.sources import TensorSource
from .files import user_path
from .folders import ASSETS
from .networks import bare
from .pipeline import ARPipeline
from .prompt_files import read_prompts
from .samplers import get_sampler
from .samplers.base import join_options, parse_sampler
from .training.data import load_fashion

SETTINGS = ("guidance_scale", "temperature", "top_k", "top_p")
REFERENCES = {"fashion/v1": "fashion-test"}
"""Protocols whose reference has a name; that of the others is a file of the user's."""


def evaluate(
    model: str | Path | ARPipeline,
    *,
    out: str | Path,
    protocol: str = "adm-in256",
    sampler: str = "ar",
    num: int | None = None,
    reference: Any = None,
    extractor: str | nn.Module | None = None,
    extractor_options: dict[str, Any] | None = None,
    metrics: Sequence[str] | str | None = None,
    seed: int = 0,
    pixels: str = "plain",
    prompts: str | Path | None = None,
    per_prompt: int = 1,
    num_classes: int | None = None,
    batch_size: int = 32,
    dtype: str | None = None,
    progress: bool = True,
    **sampler_options: Any,
) -> dict[str, Any]:
    """Draw samples as a protocol says, score them against a reference, and write the report.

    What `arvision eval generate` and `arvision eval report` do. Samples lie in `out/samples`, the
    report in `out/report.json` and `out/report.md`. Call it again to resume. Under `torchrun` all
    processes call it and share the work.

    Args:
        model: an embedded name, a folder, a hub id, or a loaded pipeline.
        out: folder, see above.
        protocol: "adm-in256", "coco-30k", "fashion" or "free", see `arvision.eval.protocols`.
        sampler: a name, see `list_samplers`, or one with options: "sjd:window=32".
        num: images; None for the protocol's number.
        reference: "fashion-test", or what `arvision.eval.evaluate` takes: statistics, a file or a
            folder of images, a run, images in memory; None where the protocol names one.
        extractor: a name or a module, see `arvision.eval.get_extractor`; None for the protocol's.
        extractor_options: of a named extractor, such as {"size": 64} or {"weights": "file.pth"}.
        metrics: see `arvision.eval.evaluate`; None for what the extractor can give and the
            reference allows.
        seed: image k has the identity (seed, k).
        pixels: how floats become bytes: "plain", "llamagen", "var", "mar" or "to256".
        prompts: file of captions: text, JSON lines or JSON.
        per_prompt: images of each caption.
        num_classes: instead of the protocol's.
        batch_size: images drawn at once; does not change them.
        dtype: of a model given by name, such as "bfloat16"; recorded.
        progress: bars on stderr.
        **sampler_options: sampler and sampling options, such as `window=32` or `top_k=100`.

    Returns:
        The report; empty in processes other than the first.

    Raises:
        InputError: anything unknown or out of range, before the first image.
        MissingDependencyError: the extractor needs a package that is not installed.

    """
    chosen = get_protocol(protocol)
    goal = REFERENCES.get(chosen.id) if reference is None else reference
    if goal is None:
        raise InputError(f"protocol {chosen.id} has no reference of its own: give reference=PATH")
    with processes():
        opened = open_reference(goal)
        options = {"device": local_device(), **(extractor_options or {})}
        network = get_extractor(chosen.extractor if extractor is None else extractor, **options)
        opened = prepare_reference(opened, network, allow_jpeg=True)
        wanted = choose_metrics(metrics, network, opened, as_integer(num))
        shards = draw_samples(
            model,
            user_path(out) / "samples",
            sampler,
            protocol=protocol,
            num=num,
            num_classes=num_classes,
            seed=seed,
            pixels=pixels,
            prompts=None if prompts is None else user_path(prompts),
            per_prompt=per_prompt,
            batch_size=batch_size,
            dtype=dtype,
            options=sampler_options,
            progress=progress,
        )
        return report(str(shards.folder), opened, network, out, metrics=wanted, progress=progress)


def report(
    samples: Any, reference: Any, extractor: Extractor, out: str | Path, **options: Any
) -> dict[str, Any]:
    """Score samples and write `report.json` and `report.md` into `out`.

    Args:
        samples: a source, a path or a tensor.
        reference: likewise; see `open_reference`.
        extractor: see `arvision.eval.get_extractor`.
        out: folder.
        **options: of `arvision.eval.full_report.full_report`.

    Returns:
        The report; empty in processes other than the first, which write nothing.
    """
    found = full_report(samples, reference, extractor, **options)
    if found is None:
        return {}
    write_report(found, out)
    return found


def draw_samples(
    model: str | Path | ARPipeline,
    out: Path,
    sampler: str,
    *,
    protocol: str,
    num: int | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    pixels: str = "plain",
    prompts: Path | None = None,
    per_prompt: int = 1,
    batch_size: int = 32,
    dtype: str | None = None,
    options: dict[str, Any],
    progress: bool,
) -> ShardFolder:
    """Names to objects, then `arvision.eval.generate`; returns its folder. See `evaluate`.

    What the model recommends (guidance, temperature, ...) and the dtype it was loaded in go into
    the run's settings, because they decide its bytes.
    """
    chosen, preset = get_protocol(protocol), get_pixels(pixels)
    captions, digest = read_captions(prompts, per_prompt)
    classes = num_classes if num_classes is not None else chosen.num_classes
    if captions is None and classes is None:
        raise InputError(
            f"protocol {chosen.id} draws captions: give --prompts FILE (prompts=FILE in Python)"
        )
    count = num if num is not None else len(captions) if captions else chosen.num
    if captions is not None and not 2 <= count <= len(captions):
        raise InputError(f"num is {count}: expected 2 to {len(captions)}, the number of captions")
    sampler, written = parse_sampler(sampler)
    options = join_options(sampler, written, dict(options))
    if isinstance(model, ARPipeline):
        if dtype is not None:
            raise InputError("dtype belongs to load: this pipeline is loaded already")
        pipe = model
    else:
        pipe = load(model, device=local_device(), dtype=dtype)
    own = {name: value for name, value in options.items() if name not in SETTINGS}
    pipe.check_sampler(get_sampler(sampler, **own))
    settings = {name: pipe.config[name] for name in SETTINGS} | options
    config = GenerateConfig(
        model=_name_of(model),
        sampler=sampler,
        options={**settings, "dtype": str(pipe.dtype).removeprefix("torch.")},
        num=count,
        num_classes=None if captions else classes,
        seed=seed,
        protocol=chosen.id,
        pixels=pixels,
        prompts_sha256=digest,
        weights_sha256=weights_sha256(pipe),
    )
    idle = get_sampler(sampler, **own).without_effect(pipe.model)
    acting = {n: v for n, v in settings.items() if n in options or n not in idle}
    make = _maker(pipe, sampler, acting, lambda x: chosen.check_size(preset(x), pixels))
    texts = captions[:count] if captions else None
    return generate(make, config, out, prompts=texts, batch_size=batch_size, progress=progress)


def _name_of(model: str | Path | ARPipeline) -> str:
    """What a run's record calls a model; its weights' hash, not the name, says what it is."""
    if not isinstance(model, ARPipeline):
        return str(model)
    place = model.name_or_path
    if place is None:
        return type(bare(model.transformer)).__name__
    return Path(place).name if Path(place).parent == ASSETS else str(place)


def weights_sha256(pipe: Any) -> str:
    """A hash of all weights of a pipeline, as loaded."""
    digest = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            for name, value in sorted(bare(module).state_dict().items()):
                digest.update(f"{part}.{name}{list(value.shape)}{value.dtype}".encode())
                flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
                digest.update(flat.cpu().numpy().data)
    return digest.hexdigest()[:16]


def read_captions(prompts: Path | None, per_prompt: int) -> tuple[list[str] | None, str | None]:
    """Captions, each repeated, and the hash of all of them."""
    if prompts is None:
        if per_prompt != 1:
            raise InputError(f"per_prompt {shown(per_prompt)} without prompts: expected them too")
        return None, None
    records = read_prompts(prompts)
    if check_count("per_prompt", per_prompt) * len(records) > MOST_SAMPLES:
        raise InputError(
            f"{len(records):,} prompts with {shown(per_prompt)} images each: expected at most "
            f"{MOST_SAMPLES:,} images in one run"
        )
    texts = [record["prompt"] for record in records for _ in range(per_prompt)]
    return texts, config_hash({"prompts": texts})


def _maker(pipe: Any, sampler: str, settings: dict[str, Any], to_pixels: Any) -> Any:
    """A maker around a loaded pipeline; sampling and sampler settings share one list."""

    def make(indices: Any, labels: Any, seeds: Any) -> Made:
        out = sample(
            pipe,
            list(labels),
            sampler,
            seed=[tuple(pair) for pair in seeds],
            progress=False,
            output_type="pt",
            **settings,
        )
        images = torch.as_tensor(out.images)
        passes = float(out.stats["forward_passes"])
        return Made(to_pixels(images), out.tokens, {"forward_passes": passes, "batches": 1.0})

    return make


def open_reference(where: Any) -> Any:
    """The Fashion-MNIST images by name; any other reference stays what it is.

    Raises:
        InputError: no data set, or no such path.
    """
    if not isinstance(where, (str, Path)):
        return where
    name = str(where)
    if name in ("fashion-test", "fashion-train"):
        images, labels = load_fashion(name.removeprefix("fashion-"))
        return TensorSource(images.unsqueeze(1), labels.tolist(), name)
    if not os.path.exists(user_path(where)):
        raise InputError(
            f"reference {name[:300]} does not exist: expected an .npz file, a folder of images, "
            "fashion-test or fashion-train"
        )
    return where


def likelihood(model: str, baseline: Path) -> Any:
    """Log-likelihood of token sequences under the base model, at the baseline's guidance."""
    options = ShardFolder(baseline).config["options"]
    pipe = load(model)
    if pipe.kind != "token":
        raise InputError(f"{model} is a {pipe.kind} model: expected a token model for likelihoods")
    scale = options.get("guidance_scale", pipe.config["guidance_scale"])
    temperature = options.get("temperature", pipe.config["temperature"])

    @torch.inference_mode()
    def log_likelihood(tokens: Any, labels: Any) -> Any:
        sequence = torch.as_tensor(tokens).to(pipe.model.device)
        logits = teacher_forced(pipe.model, list(labels), sequence, scale) / max(temperature, 1e-6)
        logp = logits.float().log_softmax(-1).gather(2, sequence[..., None])
        return logp[..., 0].sum(1).cpu().numpy()

    return log_likelihood
