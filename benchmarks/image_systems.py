"""What does every image-side system give beside the one it builds on? One run, one table.

python -m benchmarks.image_systems [--images 128] [--rounds 3] [--only "zipar;lazymar"] [--runs runs/image-systems]

Each system draws the same classes (captions) as its predecessor on the embedded models at their recommended
settings. Tokens (latents, scales' tokens) per pass; processor seconds of one thread per token at batch 1,
decoder excluded, medians of alternating rounds (others on the machine matter less to them than to wall
time); weights in memory, drafts and students included; and distances from an independent plain run of the
same model: Frechet distance of the project's classifier features (not FID) and share of pictures that show
what was asked for. "chance" is a second plain run. Students that are not in the package are looked for in
--runs. A row is saved as soon as it is measured, so that a second call with --only adds to it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import arvision
from arvision import get_sampler
from arvision.errors import ArvisionError
from arvision.eval import frechet_from_features, to_uint8
from arvision.eval.classifier import class_consistency, load_classifier
from arvision.folders import embedded_models

from .common import load, save, summary


@dataclass(frozen=True)
class System:
    """A row: its name, what it builds on, the model that draws, its sampler, and what training it took."""

    name: str
    before: str | None
    model: str
    spec: str
    published: str = ""
    trained: str = "none"
    teacher: str | None = None


SYSTEMS = (
    System("ar", None, "llamagen-fashion", "ar"),
    System("sjd", "ar", "llamagen-fashion", "sjd:coupling=maximal", "SJD with maximal coupling"),
    System("sjd tree", "sjd", "llamagen-fashion", "sjd:coupling=maximal:tree=static:window=32"),
    System("draft", "sjd", "llamagen-fashion", "draft", "DistillSpec draft", "57 min"),
    System("zipar", "ar", "llamagen-fashion", "zipar", "ZipAR, first version"),
    System("zipar 1", "ar", "llamagen-fashion", "zipar:local_window=1", "the same, window 1"),
    System(
        "zipar adaptive", "zipar", "llamagen-fashion", "zipar:window=adaptive", "ZipAR, ICML 2025"
    ),
    System("lantern", "sjd", "llamagen-fashion", "lantern", "bound of the whole step (ours)"),
    System(
        "lantern draft", "lantern", "llamagen-fashion", "lantern:bound=draft", "LANTERN's bound"
    ),
    System(
        "lantern factor",
        "lantern draft",
        "llamagen-fashion",
        "lantern:bound=factor:neighbours=10",
        "LANTERN++'s bound",
    ),
    System(
        "lantern++",
        "lantern factor",
        "llamagen-fashion",
        "lantern:bound=factor:neighbours=10:tree=static:window=32",
        "LANTERN++: bound and static tree",
    ),
    System("dd", "ar", "llamagen-fashion-dd", "dd", "DD1, one step", "49 min", "llamagen-fashion"),
    System(
        "dd 2",
        "dd",
        "llamagen-fashion-dd",
        "dd:steps=2",
        "DD1, two steps",
        "49 min",
        "llamagen-fashion",
    ),
    System("ar, captions", None, "llamagen-fashion-t2i", "ar"),
    System("sjd, captions", "ar, captions", "llamagen-fashion-t2i", "sjd:coupling=maximal"),
    System(
        "dd, captions",
        "ar, captions",
        "llamagen-fashion-t2i-dd",
        "dd",
        "DD1, one step",
        "see the card",
        "llamagen-fashion-t2i",
    ),
    System(
        "dd 2, captions",
        "dd, captions",
        "llamagen-fashion-t2i-dd",
        "dd:steps=2",
        "DD1, two steps as published",
        "see the card",
        "llamagen-fashion-t2i",
    ),
    System("ar, scales", None, "var-fashion", "ar"),
    System("fastvar", "ar, scales", "var-fashion", "ar:prune=0.5", "FastVAR, all layers"),
    System(
        "fastvar outer",
        "fastvar",
        "var-fashion",
        "ar:prune=0.5:prune_whole=[1,1]",
        "FastVAR, outer layers whole",
    ),
    System("fastvar 0.25", "fastvar", "var-fashion", "ar:prune=0.25"),
    System("dd, scales", "ar, scales", "var-fashion-dd", "dd", "DD1", "see the card", "var-fashion"),
    System("ar, latents", None, "mar-fashion", "ar:num_iter=32"),
    System("token cache", "ar, latents", "mar-fashion", "ar:num_iter=32:refresh=2"),
    System(
        "lazymar",
        "token cache",
        "mar-fashion",
        "ar:num_iter=32:refresh=9:refresh_first=5:refresh_share=published:reuse_guidance=True"
        ":head_refresh=7",
        "LazyMAR, published settings",
    ),
    System(
        "lazymar, whole head",
        "lazymar",
        "mar-fashion",
        "ar:num_iter=32:refresh=9:refresh_first=5:refresh_share=published:reuse_guidance=True",
    ),
    System(
        "lazymar, head alone", "ar, latents", "mar-fashion", "ar:num_iter=32:head_refresh=7"
    ),
    System("disa", "ar, latents", "mar-fashion", "ar:num_iter=32:final_head_steps=20", "DiSA"),
    System("csjd", "ar, latents", "mar-fashion", "csjd:num_iter=32"),
    System("cspd", "csjd", "mar-fashion", "cspd", "CSpD", "see the card"),
)  # fmt: skip
LATENT_IMAGES = 32
"""Pictures of continuous models, which take seconds each."""

GARMENTS = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
            "ankle boot")  # fmt: skip


class Study:
    """Draws, and measures against a plain run of the model that a system stands for."""

    def __init__(self, images: int, runs: Path) -> None:
        self.num, self.runs, self.classifier = images, runs, load_classifier()
        self._plain: dict[str, Tensor] = {}

    def pipe(self, name: str) -> Any:
        """The model: embedded, or from the runs."""
        known = name in embedded_models()
        return arvision.load(name if known else self.runs / name, device="cpu")

    def asked(self, name: str, num: int) -> list[Any]:
        """Classes, or captions where the model takes these."""
        labels = [k % 10 for k in range(num)]
        return [f"a {GARMENTS[k]}" for k in labels] if "t2i" in name else labels

    def count(self, name: str) -> int:
        """Pictures drawn."""
        return min(self.num, LATENT_IMAGES) if name.startswith("mar") else self.num

    @torch.no_grad()
    def draw(self, name: str, spec: str, seed: int, batch_size: int = 64) -> tuple[Tensor, Any]:
        """Pictures [num, 3, H, W] uint8, and figures of all draws."""
        pipe, num = self.pipe(name), self.count(name)
        asked, pictures, total = self.asked(name, num), [], {"passes": 0.0, "tokens": 0}
        for first in range(0, num, batch_size):
            part = asked[first : first + batch_size]
            seeds = [(seed, first + k) for k in range(len(part))]
            out = pipe(
                part, sampler=self.sampler(spec), seed=seeds, output_type="pt", progress=False
            )
            pictures.append(to_uint8(out.images))
            total["passes"] += sum(out.stats.passes_per_image)
            total["tokens"] += out.stats.tokens * len(part)
            total["lossless"] = out.stats.lossless
        return torch.cat(pictures), total

    def sampler(self, spec: str) -> Any:
        """With a draft where it needs one that the model recommends."""
        if spec == "cspd":
            return get_sampler("cspd", draft="mar-fashion-draft")
        return get_sampler(spec)

    def features(self, pictures: Tensor) -> Tensor:
        """Of the classifier."""
        with torch.no_grad():
            return self.classifier.features(pictures).double()

    def reference(self, model: str) -> Tensor:
        """Features of an independent plain run."""
        if model not in self._plain:
            spec = "ar:num_iter=32" if model.startswith("mar") else "ar"
            self._plain[model] = self.features(self.draw(model, spec, seed=1)[0])
        return self._plain[model]

    def measure(self, system: System, seed: int = 0) -> dict[str, Any]:
        """Quality and passes of a system."""
        pictures, total = self.draw(system.model, system.spec, seed)
        labels = torch.arange(len(pictures)) % 10
        own = self.reference(system.teacher or system.model)
        return {
            "lossless": total["lossless"],
            "tokens_per_pass": total["tokens"] / total["passes"],
            "distance": frechet_from_features(self.features(pictures), own),
            "consistency": float(class_consistency(pictures, labels)),
            "images": len(pictures),
        }

    def megabytes(self, system: System) -> float:
        """Weights that the system holds, of a draft beside its target too."""
        names = {system.model}
        names |= {"llamagen-fashion-draft"} if system.spec == "draft" else set()
        names |= {"mar-fashion-draft"} if system.spec == "cspd" else set()
        networks = [self.pipe(name).transformer for name in names]
        return sum(p.numel() * p.element_size() for n in networks for p in n.parameters()) / 1e6

    def seconds(self, systems: list[System], rounds: int) -> dict[str, list[float]]:
        """Processor seconds per token of each system, alternating, after one draw that does not count."""
        found: dict[str, list[float]] = {system.name: [] for system in systems}
        for number in range(rounds + 1):
            for system in systems if number % 2 else systems[::-1]:
                pipe, asked = self.pipe(system.model), self.asked(system.model, 10)
                sampler = self.sampler(system.spec)
                options = {"seed": [(number, 0)], "output_type": "latent", "progress": False}
                started = time.process_time()
                out = pipe([asked[number % 10]], sampler=sampler, **options)
                spent = time.process_time() - started
                if number:
                    found[system.name].append(spent / out.stats.tokens)
        return found


def table(record: dict[str, Any]) -> str:
    """The table of docs/systems.md."""
    rows = record["systems"]
    lines = [
        "| system | option | beside | tokens per pass | ms per token | weights | law | feature distance | shows it "
        "| trained |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for system in SYSTEMS:
        row = rows.get(system.name)
        if row is None:
            continue
        time_each = f"{1000 * row['seconds']['median']:.2f}" if "seconds" in row else ""
        before = rows.get(system.before or "")
        if before and time_each and "seconds" in before:
            time_each += f" ({before['seconds']['median'] / row['seconds']['median']:.2f}x)"
        law = "exact" if row["lossless"] else "lossy"
        title = system.name + (f": {system.published}" if system.published else "")
        lines.append(
            f"| {title} | `{system.model}`, `{system.spec}` | {system.before or ''} "
            f"| {row['tokens_per_pass']:.2f} | {time_each} | {row['megabytes']:.1f} MB | {law} "
            f"| {row['distance']:.2f} | {row['consistency']:.3f} | {system.trained} |"
        )
    where = record["environment"]
    lines.append("")
    lines.append(
        f"Machine: {where['cpu']}, {where['cores']} shared cores, torch {where['torch']}, {where['date']}, "
        f"commit {where['commit']}; pictures per row: "
        f"{', '.join(map(str, sorted({row['images'] for row in rows.values()})))}."
    )
    return "\n".join(lines)


def main() -> None:
    """Measure and write `results/image_systems.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="names with semicolons between")
    parser.add_argument("--skip-quality", action="store_true", help="times alone")
    parser.add_argument("--runs", type=Path, default=Path("runs/image-systems"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    study, record = Study(options.images, options.runs), load("image_systems")
    rows: dict[str, Any] = record.setdefault("systems", {})
    wanted = [s for s in SYSTEMS if options.only is None or s.name in options.only.split(";")]
    for system in wanted:
        mine = rows.setdefault(system.name, {})
        try:
            if not options.skip_quality:
                mine |= study.measure(system)
            mine["megabytes"] = study.megabytes(system)
        except ArvisionError as error:
            print(f"{system.name}: left out, {error}", flush=True)
            del rows[system.name]
            continue
        print(system.name, {k: round(v, 3) for k, v in mine.items() if k != "seconds"}, flush=True)
        save("image_systems", record)
    measured = [system for system in wanted if system.name in rows]
    for model in dict.fromkeys(system.teacher or system.model for system in measured):
        group = [system for system in measured if (system.teacher or system.model) == model]
        for name, spent in study.seconds(group, options.rounds).items():
            rows[name]["seconds"] = summary(spent)
        save("image_systems", record)
    print(table(record))


if __name__ == "__main__":
    main()
