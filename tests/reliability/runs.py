"""Runs in miniature that the soak kills: this process forks one for each line of its input.

python runs.py < lines "KIND OUT"; it prints "ready", then for each line the child's process id and
its exit status, negative for a signal.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "eval"), str(HERE.parent)]

import maker  # noqa: E402 # pyright: ignore[reportMissingImports]

from arvision import comparison  # noqa: E402
from arvision.eval import get_extractor  # noqa: E402
from arvision.eval.generate import generate  # noqa: E402
from arvision.eval.sources import ShardSource, TensorSource  # noqa: E402
from arvision.eval.writers import export_layout, write_npz, write_pictures, write_tar  # noqa: E402
from arvision.evaluation import report  # noqa: E402
from arvision.pipeline import ARPipeline  # noqa: E402
from arvision.testing import tiny_llamagen  # noqa: E402
from arvision.training.distill import DistillSettings, distill  # noqa: E402
from arvision.training.loop import FitConfig, Objective, fit  # noqa: E402

NUM = 2600


def run_generate(out: Path) -> None:
    """Six blocks of noise pictures."""
    generate(
        lambda i, x, s: maker.make(i, x, s, 0.02),
        maker.config(NUM),
        out,
        batch_size=100,
        progress=False,
    )


def run_report(out: Path) -> None:
    """Scores of one set of pictures against another, written several times over."""
    draw = torch.Generator().manual_seed(0)
    first, second = (
        torch.randint(256, (700, 3, 16, 16), dtype=torch.uint8, generator=draw) for _ in range(2)
    )
    network = get_extractor("random-conv", dim=16)
    for _ in range(3):
        report(TensorSource(first), TensorSource(second), network, out, progress=False)


def run_compare(out: Path) -> None:
    """Two samplers of a tiny model, with sheet, map and tables."""
    pipe = ARPipeline.from_model(tiny_llamagen(grid=(4, 4)), guidance_scale=2.0)
    comparison.compare(pipe, [0, 1, 2], ["ar", "sjd:window=4"], num_images=4).write(out)


class Line(Objective):
    """A line through numbered points, with noise from the loop's generator."""

    num_items = 64

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(2, 1)
        torch.nn.init.zeros_(self.line.weight)

    def forward(self, indices: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        x = torch.stack([indices.float(), indices.float() ** 0.5], 1) / 8
        x = x + 0.1 * torch.randn(x.shape, generator=generator)
        return {"loss": (self.line(x)[:, 0] - x.sum(1)).square().mean()}


def run_train(out: Path) -> None:
    """A training whose checkpoints follow each other closely."""
    torch.manual_seed(0)
    objective = Line()
    fit(
        objective,
        FitConfig(steps=300, batch_size=8, save_every=10, log_every=10, average_decay=0.9),
        out,
        progress=False,
    )
    save_file({k: v.clone() for k, v in objective.state_dict().items()}, out / "line.safetensors")


def run_distill(out: Path) -> None:
    """A student of a tiny teacher: pairs, training, publishing."""
    settings = DistillSettings(
        num_pairs=240,
        num_held_out=24,
        shard_size=60,
        num_card=10,
        sheet_every=100,
        fit=FitConfig(steps=40, batch_size=16, learning_rate=5e-3, save_every=10, log_every=10),
    )
    distill(out.parent.parent / "tiny", out, settings, progress=False)


def run_export(out: Path) -> None:
    """All layouts of a finished run."""
    samples = out.parent.parent / "samples"
    source = ShardSource(samples)
    records = [{"prompt": f"a {number}", "style": "photo"} for number in range(len(source))]
    if not (out / "a.npz").exists():
        write_npz(source, out / "a.npz")
    if not (out / "a.tar").exists():
        write_tar(source, out / "a.tar")
    if not (out / "png").exists():
        write_pictures(source, out / "png")
    if not (out / "geneval").exists():
        export_layout("geneval", source, records, out / "geneval")


RUNS = {
    "generate": run_generate,
    "report": run_report,
    "compare": run_compare,
    "train": run_train,
    "distill": run_distill,
    "export": run_export,
}


def main() -> None:
    """Fork a run for each line."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("ready", flush=True)
    for line in sys.stdin:
        kind, out = line.rstrip("\n").split(" ", 1)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                RUNS[kind](Path(out))
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        print(child, flush=True)
        _, found = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(found), flush=True)


if __name__ == "__main__":
    main()
