"""What do students of Distilled Decoding give for their one or two passes?

python -m benchmarks.dd [--images 1000] [--part quality|time] [--only llamagen-fashion-t2i] [--runs runs]

For each teacher and student, on the same classes: passes, agreement with the teacher's tokens for the
same noise, Frechet distance of the project's classifier features (not FID) from the real test images
and from an independent run of the teacher, class consistency, precision and recall (k = 3, against as
many test images). Beside them the teacher again and the baselines of the paper: "skip", the teacher stops early and
the rest is drawn from the marginal law of each position given the class; "one step, independent", all
tokens are drawn from these marginals (taken from the teacher's own samples, so that this is the best
sampler of its kind); and "untrained", the student before its training. A teacher of captions is asked for
"a <garment>". A student that is not in the package is looked for in --runs. Time: wall time per image at batch 1, decoder excluded and included, medians of
alternating rounds.

Paper: Liu et al., "Distilled Decoding 1", 2024, table 1 (LlamaGen-L 217.8x, VAR-d16 6.3x at one step).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import arvision
from arvision import get_sampler
from arvision.eval import frechet_from_features, precision_recall, to_uint8
from arvision.eval.classifier import class_consistency, load_classifier
from arvision.folders import embedded_models
from arvision.training.captions import GARMENTS
from arvision.training.data import load_fashion
from arvision.training.distill import student_family

from .common import alternate, load, save, summary

STUDENTS = {
    "llamagen-fashion": "llamagen-fashion-dd",
    "llamagen-fashion-t2i": "llamagen-fashion-t2i-dd",
    "var-fashion": "var-fashion-dd",
}
SKIPS = {"llamagen-fashion": (26, 39), "llamagen-fashion-t2i": (26, 39), "var-fashion": (1, 2)}
"""Units that the teacher leaves out, in the proportions of the paper's table."""

MIXED = {"llamagen-fashion": (4, 11), "llamagen-fashion-t2i": (4, 11), "var-fashion": (3,)}
"""Steps beyond the student's own, with teacher."""


class Study:
    """One teacher with its student.

    Args:
        name: of the teacher.
        num: images of a draw.
        runs: where students are that the package lacks.
    """

    def __init__(self, name: str, num: int, runs: Path) -> None:
        images, _ = load_fashion("test")  # first: a missing data set shows before hours of work
        self.name, self.classes = name, torch.arange(num) % 10
        self.pipe = arvision.load(name, device="cpu")
        student = STUDENTS[name]
        known = student in embedded_models()
        self.student = arvision.load(student if known else runs / student, device="cpu")
        self.is_text = self.pipe.transformer.config.get("caption_dim") is not None
        self.laws = {key: self.pipe.config[key] for key in ("temperature", "top_k", "top_p")}
        self.ends = (0, *self.student.model.unit_ends)
        self.classifier = load_classifier()
        self.teacher = self.draw(self.pipe, get_sampler("ar", noise="flow", **self.laws), seed=0)
        other = self.draw(self.pipe, get_sampler("ar", **self.laws), seed=1)
        self.reference, self.marginals = self.features(other), self._by_class(other)
        self.real = self._features(images[:, None].expand(-1, 3, -1, -1))

    def draw(self, pipe: Any, sampler: Any, seed: int, batch_size: int = 125) -> Tensor:
        """Tokens [num, N] of all classes."""
        parts = []
        for part in torch.arange(len(self.classes)).split(batch_size):
            out = sampler(
                pipe.model,
                self.asked(self.classes[part]),
                seeds=[(seed, image) for image in part.tolist()],
                guidance_scale=pipe.config["guidance_scale"],
            )
            parts.append(out.tokens)
        return torch.cat(parts)

    def asked(self, classes: Tensor) -> list[Any]:
        """Classes, or captions of them."""
        labels = classes.tolist()
        return [f"a {GARMENTS[k][0]}" for k in labels] if self.is_text else labels

    def untrained(self) -> Tensor:
        """Tokens of the student before its training, in one step."""
        family = student_family(self.pipe)
        config = self.student.transformer.config
        own = {"intermediate_size": config["intermediate_size"]} if self.is_text else {}
        torch.manual_seed(0)
        student = family.from_teacher(self.pipe.model, config["timesteps"], **own)
        parts = []
        for part in torch.arange(len(self.classes)).split(125):
            seeds = [(0, image) for image in part.tolist()]
            parts.append(self.dd(1)(student, self.asked(self.classes[part]), seeds=seeds).tokens)
        return torch.cat(parts)

    def dd(self, steps: int) -> Any:
        """The sampler with so many steps."""
        return get_sampler("dd", steps=steps, **self.laws).bind(teacher=self.pipe)

    def _by_class(self, tokens: Tensor) -> Tensor:
        return torch.stack([tokens[self.classes == label] for label in range(10)])

    def independent(self, kept: int, seed: int = 0) -> Tensor:
        """The teacher's first `kept` tokens, and the rest from the marginals of class and position."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(self.marginals.shape[1], self.teacher.shape, generator=generator)
        found = self.marginals[self.classes].gather(1, rows[:, None])[:, 0]
        return torch.cat([self.teacher[:, :kept], found[:, kept:]], dim=1)

    @torch.no_grad()
    def images(self, tokens: Tensor) -> Tensor:
        """Pictures of tokens, uint8."""
        parts = [self.pipe.model.decode(part) for part in tokens.split(125)]
        return to_uint8(torch.cat(parts), value_range="signed")

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.classifier.features(part) for part in images.split(500)]).double()

    def features(self, tokens: Tensor) -> Tensor:
        """Classifier features [num, F] float64."""
        return self._features(self.images(tokens))

    def measure(self, tokens: Tensor) -> dict[str, Any]:
        """The figures of the module's docstring."""
        features = self.features(tokens)
        shares = precision_recall(features, self.real[: len(features)])
        return {
            "agreement": float((tokens == self.teacher).double().mean()),
            "distance_to_test_images": frechet_from_features(features, self.real),
            "distance_to_teacher": frechet_from_features(features, self.reference),
            "class_consistency": float(class_consistency(self.images(tokens), self.classes)),
            "precision": float(shares["precision"]),
            "recall": float(shares["recall"]),
        }

    def quality(self) -> list[dict[str, Any]]:
        """A row for the teacher, each baseline and each number of steps."""
        units = len(self.ends) - 1
        again = self.draw(self.pipe, get_sampler("ar", noise="flow", **self.laws), seed=2)
        rows = [
            {"sampler": "teacher", "passes": units} | self.measure(self.teacher),
            {"sampler": "teacher, other noise", "passes": units} | self.measure(again),
        ]
        for skip in SKIPS[self.name]:
            tokens = self.independent(self.ends[units - skip])
            rows.append({"sampler": f"skip {skip}", "passes": units - skip} | self.measure(tokens))
        rows.append(
            {"sampler": "one step, independent", "passes": 1} | self.measure(self.independent(0))
        )
        rows.append({"sampler": "untrained", "passes": 1} | self.measure(self.untrained()))
        own = range(1, len(self.student.model.timesteps) + 1)
        for steps in (*own, *MIXED[self.name]):
            tokens = self.draw(self.student, self.dd(steps), seed=0)
            rows.append({"sampler": f"dd, steps={steps}", "passes": steps} | self.measure(tokens))
        for row in rows:
            print(
                self.name, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
            )
        return rows

    def time(self, rounds: int) -> dict[str, Any]:
        """Seconds per image at batch 1: the teacher, plain and by flow, and the student."""
        runs = {
            "teacher": (self.pipe, get_sampler("ar", **self.laws)),
            "teacher, flow": (self.pipe, get_sampler("ar", noise="flow", **self.laws)),
            "dd, steps=1": (self.student, self.dd(1)),
            "dd, steps=2": (self.student, self.dd(2)),
        }
        tasks, asked = {}, self.asked(torch.tensor([3]))
        for label, (pipe, sampler) in runs.items():
            model, scale = pipe.model, pipe.config["guidance_scale"]
            for decodes in (False, True):
                tasks[label + (", decoded" if decodes else "")] = _task(
                    model, sampler, scale, decodes, asked
                )
        found = {label: summary(seconds) for label, seconds in alternate(tasks, rounds).items()}
        for label, row in found.items():
            like = "teacher, decoded" if label.endswith("decoded") else "teacher"
            row["speed_up"] = found[like]["median"] / row["median"]
            print(
                self.name, torch.get_num_threads(), label, {k: round(v, 4) for k, v in row.items()}
            )
        return found


def _task(model: Any, sampler: Any, scale: float, decodes: bool, asked: list[Any]) -> Any:
    def run() -> None:
        out = sampler(model, asked, seeds=[(0, 3)], guidance_scale=scale)
        if decodes:
            model.decode(out.tokens if out.embeddings is None else out.embeddings)

    return run


def main() -> None:
    """Measure and write `results/dd.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--part", choices=("all", "quality", "time"), default="all")
    parser.add_argument("--only", choices=tuple(STUDENTS))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    record = load("dd")
    for name in [options.only] if options.only else STUDENTS:
        study = Study(name, options.images if options.part != "time" else 20, options.runs)
        mine = record.setdefault(name, {})
        if options.part != "time":
            mine |= {"images": options.images, "quality": study.quality()}
        if options.part != "quality":
            mine["seconds"] = {}
            for threads in (1, 2):
                torch.set_num_threads(threads)
                mine["seconds"][str(threads)] = study.time(options.rounds)
            torch.set_num_threads(1)
    save("dd", record)


if __name__ == "__main__":
    main()
