"""What joins evaluation to pipelines: samples of a model, its likelihood, named references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SETTINGS = ("guidance_scale", "temperature", "top_k", "top_p")


def draw_samples(
    model: str,
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
) -> Any:
    """Names to objects, then `arvision.eval.generate`; returns its folder.

    What the model recommends (guidance, temperature, ...) and the dtype it was loaded in go into
    the run's settings, because they decide its bytes.
    """
    from ..api import load
    from ..errors import InputError
    from ..eval.distributed import local_device
    from ..eval.generate import GenerateConfig
    from ..eval.generate import generate as run
    from ..eval.protocols import get_pixels, get_protocol
    from ..samplers.base import join_options, parse_sampler

    chosen, preset = get_protocol(protocol), get_pixels(pixels)
    captions, digest = read_captions(prompts, per_prompt)
    classes = num_classes if num_classes is not None else chosen.num_classes
    if captions is None and classes is None:
        raise InputError(f"protocol {chosen.id} draws captions: give --prompts FILE")
    count = num if num is not None else len(captions) if captions else chosen.num
    if captions is not None and not 2 <= count <= len(captions):
        raise InputError(f"num is {count}: expected 2 to {len(captions)}, the number of captions")
    sampler, own = parse_sampler(sampler)
    options = join_options(sampler, own, dict(options))
    pipe = load(model, device=local_device(), dtype=dtype)
    settings = {name: pipe.config[name] for name in SETTINGS} | options
    config = GenerateConfig(
        model=model,
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
    make = _maker(pipe, sampler, settings, lambda x: chosen.check_size(preset(x), pixels))
    texts = captions[:count] if captions else None
    return run(make, config, out, prompts=texts, batch_size=batch_size, progress=progress)


def weights_sha256(pipe: Any) -> str:
    """A hash of all weights of a pipeline, as loaded."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            for name, value in sorted(module.state_dict().items()):
                digest.update(f"{part}.{name}{list(value.shape)}{value.dtype}".encode())
                flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
                digest.update(flat.cpu().numpy().data)
    return digest.hexdigest()[:16]


def read_captions(prompts: Path | None, per_prompt: int) -> tuple[list[str] | None, str | None]:
    """Captions, each repeated, and the hash of all of them."""
    if prompts is None:
        return None, None
    from ..eval.shards import config_hash
    from ..eval.writers import read_prompts

    texts = [r["prompt"] for r in read_prompts(prompts) for _ in range(per_prompt)]
    return texts, config_hash({"prompts": texts})


def _maker(pipe: Any, sampler: str, settings: dict[str, Any], to_pixels: Any) -> Any:
    """A maker around a loaded pipeline; sampling and sampler settings share one list."""
    import torch

    from ..api import sample
    from ..eval.generate import Made

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


def open_reference(where: str) -> Any:
    """The Fashion-MNIST images by name; any other reference stays the path that it is.

    Raises:
        InputError: no data set, or no such path.
    """
    from ..errors import InputError

    if where in ("fashion-test", "fashion-train"):
        from ..eval.sources import TensorSource
        from ..training.data import load_fashion

        images, labels = load_fashion(where.removeprefix("fashion-"))
        return TensorSource(images.unsqueeze(1), labels.tolist(), where)
    if not Path(where).exists():
        raise InputError(
            f"reference {where} does not exist: expected an .npz file, a folder of images, "
            "fashion-test or fashion-train"
        )
    return where


def likelihood(model: str, baseline: Path) -> Any:
    """Log-likelihood of token sequences under the base model, at the baseline's guidance."""
    import torch

    from ..api import load
    from ..decoding.teacher_forcing import teacher_forced
    from ..errors import InputError
    from ..eval.shards import ShardFolder

    options = ShardFolder(baseline).config["options"]
    pipe = load(model)
    if pipe.kind != "token":
        raise InputError(f"{model} is a {pipe.kind} model: expected a token model for likelihoods")
    scale = options.get("guidance_scale", pipe.config["guidance_scale"])
    temperature = options.get("temperature", pipe.config["temperature"])

    @torch.inference_mode()
    def log_likelihood(tokens: Any, labels: Any) -> Any:
        sequence = torch.as_tensor(tokens).to(pipe.device)
        logits = teacher_forced(pipe.model, list(labels), sequence, scale) / max(temperature, 1e-6)
        logp = logits.float().log_softmax(-1).gather(2, sequence[..., None])
        return logp[..., 0].sum(1).cpu().numpy()

    return log_likelihood
