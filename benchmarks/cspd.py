"""What do the faster ways of drawing latents give on `mar-fashion`? Passes, acceptance, time, distance.

python -m benchmarks.cspd [--images 100] [--rounds 5] [--batch 1 8] [--part all|quality|time|head]

Every sampler draws the same classes at the recommended settings, one latent per iteration; the draft of
`cspd` is `mar-fashion-draft`, the factor on the last deviations (`inner_temperature`) the released code's 42
where not said. Quality: passes of the target per image, share of judged drafts accepted, Frechet
distance of the project's classifier features (not FID) from an independent run of `ar`, beside that of
a second independent run of `ar`, and class consistency. Time: wall time per image without the decoder,
batch 1 and 8, medians of alternating rounds in one process on one thread. Head: the reverse loop of the
diffusion head for 1, 8 and 64 latents.

Paper: Wang et al., "Continuous Speculative Decoding for Autoregressive Image Generation", 2024 (2.33x
with MAR-H and MAR-B at batch 256).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import arvision
from arvision import get_sampler
from arvision.eval import frechet_from_features, to_uint8
from arvision.eval.classifier import class_consistency, load_classifier

from .common import alternate, load, save, summary

EXACT = "cspd:criterion=trajectory:context=batched"
SAMPLERS = (
    "ar",
    "ar:num_iter=32",
    "cspd:drafting=sequential",
    "cspd",
    "cspd:max_draft=2",
    "cspd:inner_temperature=150:max_draft=4",
    "cspd:criterion=trajectory:context=verified:max_draft=4",
    "cspd:context=batched:max_draft=4",
    f"{EXACT}:max_draft=4",
    "csjd",
    "csjd:criterion=tolerance",
    "csjd:criterion=tolerance:tolerance=0.3",
    "ar:refresh=4",
    "ar:refresh=4:reuse_guidance=true",
)


class Study:
    """The target, its draft, and how to draw and measure.

    Args:
        num: images of a draw.
        specs: samplers, "ar" among them.
    """

    def __init__(self, num: int, specs: Sequence[str] = SAMPLERS) -> None:
        self.specs = specs
        self.pipe = arvision.load("mar-fashion", device="cpu")
        self.draft = arvision.load("mar-fashion-draft", device="cpu")
        self.classes = torch.arange(num) % 10
        self.classifier = load_classifier()

    def sampler(self, spec: str) -> Any:
        """A sampler at the model's recommended temperature, with its draft."""
        sampler = get_sampler(spec).with_options(temperature=self.pipe.config["temperature"])
        return sampler.bind(draft=self.draft) if "draft" in sampler.needs else sampler

    def run(self, sampler: Any, first: int, count: int, seed: int) -> Any:
        """Samples of `count` classes from `first` on."""
        return sampler(
            self.pipe.model,
            self.classes[first : first + count].tolist(),
            seeds=[(seed, first + k) for k in range(count)],
            guidance_scale=self.pipe.config["guidance_scale"],
        )

    def draw(self, spec: str, seed: int, batch_size: int = 50) -> tuple[Tensor, dict[str, Any]]:
        """Classifier features of all classes, and passes, acceptance and class consistency."""
        sampler, images = self.sampler(spec), []
        totals = {
            "passes": 0,
            "head_steps": 0,
            "accepted": 0,
            "rejected": 0,
            "exhausted": 0,
            "nonfinite": 0,
        }
        for first in range(0, len(self.classes), batch_size):
            out = self.run(sampler, first, min(batch_size, len(self.classes) - first), seed)
            images.append(to_uint8(self.pipe.model.decode(out.tokens), value_range="signed"))
            for name in totals:
                found = (
                    sum(out.stats.passes_per_image) if name == "passes" else out.stats.get(name, 0)
                )
                totals[name] += found
        pixels = torch.cat(images)
        with torch.no_grad():
            features = self.classifier.features(pixels).double()
        judged = totals["accepted"] + totals["rejected"]
        return features, {
            "passes": totals["passes"] / len(self.classes),
            "acceptance": totals["accepted"] / judged if judged else None,
            "head_steps": totals["head_steps"] / len(range(0, len(self.classes), batch_size)),
            "exhausted": totals["exhausted"],
            "nonfinite": totals["nonfinite"],
            "class_consistency": float(class_consistency(pixels, self.classes)),
        }

    def quality(self) -> list[dict[str, Any]]:
        """A row per sampler, and one for a second run of `ar`."""
        reference, _ = self.draw("ar", seed=1)
        rows = []
        for spec, seed in (("ar", 2), *((spec, 0) for spec in self.specs)):
            features, row = self.draw(spec, seed)
            distance = frechet_from_features(features, reference)
            name = "ar, other seeds" if seed == 2 else spec
            is_exact = get_sampler(spec).is_exact
            rows.append({"sampler": name, "lossless": is_exact, "distance": distance} | row)
            print(
                {k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()},
                flush=True,
            )
        return rows

    def time(self, batch: int, rounds: int) -> dict[str, Any]:
        """Seconds per image of every sampler over at least four images, decoder excluded."""
        firsts = range(0, max(4, batch), batch)

        def draw(sampler: Any) -> None:
            for first in firsts:
                self.run(sampler, first, batch, 0)

        tasks = {spec: (lambda one=self.sampler(spec): draw(one)) for spec in self.specs}
        found = {}
        for spec, seconds in alternate(tasks, rounds).items():
            found[spec] = summary([value / (batch * len(firsts)) for value in seconds])
        for spec, row in found.items():
            row["speed_up"] = found["ar"]["median"] / row["median"]
            print(batch, spec, {k: round(v, 4) for k, v in row.items()}, flush=True)
        return found


@torch.no_grad()
def head_times(model: Any, rounds: int) -> dict[str, Any]:
    """Seconds of the head's reverse loop by number of latents."""
    width = model.transformer.config["hidden_size"]
    noise = torch.randn(model.head.num_steps, 64, model.latent_dim)
    z = torch.randn(64, width)
    tasks = {str(n): (lambda n=n: model.head.sample(z[:n], noise[:, :n])) for n in (1, 8, 64)}
    return {n: summary(seconds) for n, seconds in alternate(tasks, rounds).items()}


def main() -> None:
    """Measure and write `results/cspd.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--part", choices=("all", "quality", "time", "head"), default="all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record, study = load("cspd"), Study(options.images)
    parts = ["quality", "time", "head"] if options.part == "all" else [options.part]
    if "quality" in parts:
        record |= {"images": options.images, "quality": study.quality()}
    if "time" in parts:
        record["rounds"] = options.rounds
        seconds = {str(batch): study.time(batch, options.rounds) for batch in options.batch}
        record["seconds"] = record.get("seconds", {}) | seconds
    if "head" in parts:
        record["head"] = head_times(study.pipe.model, 15)
        print(record["head"])
    save("cspd", record, parts)


if __name__ == "__main__":
    main()
