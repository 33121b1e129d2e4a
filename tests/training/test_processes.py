"""Two processes that share a training, as `torchrun` starts them: forked here, since imports cost more."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

import arvision
from arvision import InputError
from arvision.models import LlamaGenTokenizer, VARTokenizer
from arvision.training.finetune import FinetuneSettings, finetune
from arvision.training.llamagen_tokenizer import TokenizerObjective
from arvision.training.loop import FitConfig, Objective, batch_indices, fit
from arvision.training.own import train
from arvision.training.own_recipes import OwnSettings
from arvision.training.processes import joined
from arvision.training.var import VARTokenizerObjective

pytestmark = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="forks of a process with an accelerator"
)
FORK = multiprocessing.get_context("fork")
SHAPE = {"ch": 32, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "codebook_size": 16}
FIT = FitConfig(steps=6, batch_size=8, log_every=1, save_every=2, warmup=1)


def _work(rank: int, port: int, size: int, function: Callable[[], Any], answers: Any) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        answer: Any = function()
    except Exception as error:
        answer = error
    answers.put((rank, answer))
    answers.close()
    answers.join_thread()
    PartialState().destroy_process_group()


def in_two(function: Callable[[], Any]) -> list[Any]:
    """What a function gives (or raises) in each of two processes that share their work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = FORK.Queue()
    workers = [
        FORK.Process(target=_work, args=(rank, port, 2, function, answers)) for rank in range(2)
    ]
    try:
        for worker in workers:
            worker.start()
        found = dict(answers.get(timeout=120) for _ in workers)
        for worker in workers:
            worker.join(30)
    finally:
        for worker in workers:
            worker.kill()
    return [found[0], found[1]]


def objective_of(kind: str, plain: int = 2) -> Objective:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8)
    if kind == "llamagen":
        tokenizer: Any = LlamaGenTokenizer(**SHAPE, z_channels=32, num_recorded=0)
        return TokenizerObjective(tokenizer, images, unquantised_steps=plain)
    tokenizer = VARTokenizer(**SHAPE, z_channels=16, patch_nums=(1, 2, 4))
    return VARTokenizerObjective(tokenizer, images, unquantised_steps=plain)


@pytest.mark.parametrize("kind", ["llamagen", "var"])
def test_processes_have_one_codebook_and_go_on_as_if_never_stopped(kind, tmp_path):
    def run(folder: str, stop_after: int | None = None) -> tuple[dict[str, Any], list[Any]]:
        objective, seen = objective_of(kind), []
        read = objective.inputs

        def inputs(indices, generator):
            seen.append(indices.tolist())
            return read(indices, generator)

        objective.inputs = inputs  # type: ignore[method-assign]
        fit(objective, FIT, tmp_path / folder, progress=False, stop_after=stop_after)
        return {k: v.numpy() for k, v in objective.state_dict().items()}, seen

    (first, mine), (second, theirs) = in_two(lambda: run("whole"))
    assert all((first[name] == second[name]).all() for name in first)
    assert first["steps_done"] == 6
    # Together they see what one process would, each sample once.
    for step, (even, odd) in enumerate(zip(mine, theirs, strict=True)):
        assert even + odd == [
            *batch_indices(step, 8, 24, 0)[0::2].tolist(),
            *batch_indices(step, 8, 24, 0)[1::2].tolist(),
        ]
    in_two(lambda: run("parts", 3))
    again = in_two(lambda: run("parts"))
    for state, seen in again:
        assert len(seen) == 3
        assert all((first[name] == state[name]).all() for name in first)


def test_two_processes_have_the_gradient_of_one(tmp_path):
    def run(folder: str) -> dict[str, Any]:
        objective = objective_of("llamagen", plain=100)
        config = replace(FIT, steps=1)
        fit(objective, config, tmp_path / folder, progress=False)
        own = objective.named_parameters()
        return {name: part.grad.numpy() for name, part in own if part.grad is not None}

    alone, found = run("one"), in_two(lambda: run("two"))
    for gradients in found:
        assert gradients.keys() == alone.keys()
        for name, value in gradients.items():
            torch.testing.assert_close(
                torch.from_numpy(value), torch.from_numpy(alone[name]), atol=1e-6, rtol=1e-3
            )


def test_each_process_draws_its_own_noise(tmp_path):
    class Noisy(Objective):
        num_items = 8

        def __init__(self):
            super().__init__()
            self.weight, self.drawn = torch.nn.Parameter(torch.zeros(1)), []

        def inputs(self, indices, generator):
            return {"noise": torch.randn(len(indices), generator=generator)}

        def loss(self, inputs, chance):
            self.drawn += [inputs["noise"].tolist(), chance.randn(2).tolist()]
            return {"loss": (self.weight - inputs["noise"]).square().mean()}

    def run() -> list[Any]:
        objective = Noisy()
        fit(objective, FIT, tmp_path, progress=False)
        return objective.drawn

    first, second = in_two(run)
    numbers = [number for part in first + second for number in part]
    assert len(set(numbers)) == len(numbers) == 2 * 6 * (4 + 2)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    config = FitConfig(steps=1, batch_size=7)
    answers = in_two(lambda: fit(objective_of("llamagen"), config, tmp_path, progress=False))
    for answer in answers:
        assert isinstance(answer, InputError)
        assert str(answer) == "batch_size 7 of 2 processes: expected a multiple"


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tones")
    for index in range(12):
        name, level = [("dark", 40), ("light", 200)][index % 2]
        (folder / name).mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (level + index,) * 3).save(folder / name / f"{index}.png")
    return folder


def test_train_and_finetune_by_two(tones, tmp_path):
    settings = OwnSettings(
        size=16,
        factor=4,
        steps=4,
        hidden_size=32,
        num_layers=1,
        codebook_size=16,
        batch_size=4,
        sample_every=2,
    )

    def both() -> tuple[int, dict[str, Any], dict[str, Any]]:
        made = train(tones, tmp_path / "made", settings, progress=False)
        joined().wait_for_everyone()
        pipe = arvision.load(tmp_path / "made", device="cpu")
        more = FinetuneSettings(steps=2, batch_size=4, sample_every=1)
        given = {"name": "made", "progress": False}
        return joined().num_processes, made, finetune(pipe, tones, tmp_path / "more", more, **given)

    (num, made, tuned), other = in_two(both)
    assert num == 2
    assert other == (2, {}, {})
    assert made["pictures"] == tuned["pictures"] == 11
    assert made["steps"] == {"tokenizer": 4, "transformer": 4}
    for name in ("made", "more"):
        picture = arvision.load(tmp_path / name, device="cpu")("dark", seed=0, progress=False)
        assert picture.images[0].size == (16, 16)
