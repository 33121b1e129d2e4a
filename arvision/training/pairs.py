"""Pairs to distil from: the noise of an image, and the tokens that the teacher makes of it.

With `arvision.decoding.flow` a teacher is a function from (condition, Gaussian noise) to tokens. The
noise is itself a function of (seed, image), so a pair is the number of a condition and tokens; whoever
knows the seed can compute the noise again. Pairs lie in shards, each complete in itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..contracts import ScaleModel, codebook_of
from ..decoding.drafter import NoDrafter
from ..decoding.flow import DEFAULT_EVALUATIONS, FlowMap, flow_noise, flow_pick, flow_rule
from ..decoding.logits import Shaping
from ..decoding.loop import FixedWindow, decode_tokens
from ..decoding.noise import Noise
from ..decoding.run import Run
from ..decoding.scale_loop import decode_scales
from ..errors import CheckpointError, InputError
from ..files import replacing


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """What the tokens of a pair depend on, besides the teacher's weights.

    Attributes:
        guidance_scale: of the teacher.
        temperature: of the teacher.
        top_k: of the teacher.
        top_p: of the teacher.
        num_evaluations: of the flow-matching map.
        seed: image k has the identity (seed, k).
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_evaluations: int = DEFAULT_EVALUATIONS
    seed: int = 0

    def shaping(self) -> Shaping:
        """From guided logits to the law that is distilled."""
        return Shaping(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


@dataclass(frozen=True)
class Pairs:
    """Numbers of conditions [M] int64 (the classes of a class-conditional teacher) and the teacher's
    tokens [M, N] int64; pair k is image k of the seed."""

    labels: Tensor
    tokens: Tensor


def teacher_hash(model: Any) -> str:
    """SHA-256 of the teacher's weights and codebook, as float32, in hexadecimal."""
    digest = hashlib.sha256()
    parts = {**model.transformer.state_dict(), "codebook": model.codebook}
    if getattr(model, "captions", None) is not None:
        parts |= model.captions.text_encoder.state_dict(prefix="text_encoder.")
    for name in sorted(parts):
        tensor = parts[name].detach().cpu().float().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def teacher_tokens(
    model: Any, conditions: Sequence[Any], seeds: list[tuple[int, int]], settings: PairSettings
) -> Tensor:
    """What the teacher makes of the noise of the images `seeds`, [B, N] int64, for their conditions.

    Raises:
        InputError: a model without a codebook.
    """
    codebook = codebook_of(model)
    if codebook is None:
        raise InputError("the teacher has no codebook, so noise cannot flow to its codes")
    flow_map = FlowMap(codebook, settings.num_evaluations)
    run = Run(len(conditions), model.num_tokens, seeds, guidance_scale=settings.guidance_scale)
    shape = settings.shaping()
    if isinstance(model, ScaleModel):
        return decode_scales(model, conditions, run, shape=shape, pick=flow_pick(flow_map)).tokens
    return decode_tokens(
        model,
        conditions,
        run,
        drafter=NoDrafter(),
        rule=flow_rule(flow_map),
        shape=shape,
        policy=FixedWindow(1),
    ).tokens


def pair_noise(seed: int, images: Tensor, num_tokens: int, width: int) -> Tensor:
    """Noise [B, N, D] float32 of the images [B] of a seed, as the teacher saw it."""
    noise = Noise([(seed, image) for image in images.tolist()])
    positions = torch.arange(num_tokens).expand(len(images), num_tokens)
    return flow_noise(noise, positions, width).float()


@torch.no_grad()
def generate_pairs(
    model: Any,
    conditions: Sequence[Any],
    settings: PairSettings,
    folder: Path,
    num: int,
    *,
    shard_size: int = 256,
    process: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> None:
    """Write at least `num` pairs into `folder`, shard by shard; what lies there is not made again.

    Every shard is full, so that more pairs can be asked for later.

    Args:
        model: teacher, a token or scale model with a codebook.
        conditions: classes or captions, which take turns.
        settings: see `PairSettings`.
        folder: of the shards `pairs-<first>-<size>.safetensors`.
        num: pairs wanted.
        shard_size: pairs of a shard, which are also one batch of the teacher.
        process: (rank, world size): processes take turns at the shards.
        progress: show a bar on stderr.

    Raises:
        CheckpointError: a shard of another teacher, other settings, or a damaged one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header = _header(model, conditions, settings)
    starts = range(0, num, shard_size)[process[0] :: process[1]]
    for first in tqdm(starts, disable=not progress, desc="pairs", unit="shard"):
        path = folder / f"pairs-{first:07d}-{shard_size}.safetensors"
        if path.exists():
            _read_shard(path, header)
            continue
        images = torch.arange(first, first + shard_size)
        labels = images % len(conditions)
        seeds = [(settings.seed, image) for image in images.tolist()]
        asked = [conditions[label] for label in labels.tolist()]
        tokens = teacher_tokens(model, asked, seeds, settings)
        content = {"labels": labels.int(), "tokens": tokens.cpu().int()}
        with replacing(path, durable=True) as temporary:
            save_file(content, temporary, metadata=header | {"sha256": _digest(content)})


def read_pairs(
    model: Any, conditions: Sequence[Any], settings: PairSettings, folder: Path, num: int
) -> Pairs:
    """The first `num` pairs of a folder, in the order of their images.

    Raises:
        CheckpointError: no shards, too few, a gap between them, a damaged shard, or one of another
            teacher, other captions or other settings.
    """
    paths = sorted(folder.glob("pairs-*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: no pair shards (pairs-*.safetensors)")
    header = _header(model, conditions, settings)
    labels, tokens, known = [], [], 0
    for path in paths:
        first = int(path.stem.split("-")[1])
        if first != known:
            raise CheckpointError(f"{folder}: pairs {known}..{first - 1} are missing")
        content = _read_shard(path, header)
        labels.append(content["labels"].long())
        tokens.append(content["tokens"].long())
        known += len(labels[-1])
        if known >= num:
            return Pairs(torch.cat(labels)[:num], torch.cat(tokens)[:num])
    raise CheckpointError(f"{folder}: {known} pairs, expected {num}")


def _header(model: Any, conditions: Sequence[Any], settings: PairSettings) -> dict[str, str]:
    header = {"teacher": teacher_hash(model), "settings": json.dumps(asdict(settings))}
    if isinstance(conditions[0], str):  # classes are their own numbers
        header["captions"] = hashlib.sha256("\n".join(conditions).encode()).hexdigest()
    return header


def _digest(content: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(content):
        digest.update(content[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_shard(path: Path, header: dict[str, str]) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as shard:
            found = shard.metadata() or {}
            content = {name: shard.get_tensor(name) for name in ("labels", "tokens")}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); is it complete? Delete it to make it again"
        ) from error
    for name, value in header.items():
        if found.get(name) != value:
            raise CheckpointError(
                f"{path}: a pair shard with {name} {found.get(name)}, expected {value}"
            )
    if found.get("sha256") != _digest(content):
        raise CheckpointError(
            f"{path}: is damaged (its sha256 does not fit); delete it to make it again"
        )
    if path.stem.split("-")[2] != str(len(content["tokens"])):
        raise CheckpointError(
            f"{path}: holds {len(content['tokens'])} pairs, not what its name says"
        )
    return content
