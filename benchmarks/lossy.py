"""What do the samplers draw, next to plain sampling? Passes, agreement and four distances.

python -m benchmarks.lossy [--images 256] [--only zipar,lantern:tv=0.3]

Every sampler draws the same classes on `llamagen-fashion` at its recommended settings. Distances from
`ar` are taken against an independent `ar` run (other seeds); the row "ar, other seeds" shows what
chance alone gives. `--only` measures some and leaves the other rows as they are. KL of the token marginals (nats, add-half smoothing); mean log-likelihood of a token
under the guided model; Frechet distance of the project's classifier features (not FID); class
consistency under the same classifier.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import arvision
from arvision import get_sampler
from arvision.decoding.teacher_forcing import teacher_forced
from arvision.eval import frechet_distance, to_uint8
from arvision.eval.classifier import class_consistency, load_classifier

from .common import load, save

SAMPLERS = (
    "ar",
    "sjd",
    "sjd:coupling=maximal",
    "sjd:coupling=independent",
    "sjd:coupling=independent:reuse=0.5",
    "sjd:coupling=independent:reuse=0.1",
    "sjd:coupling=maximal:reuse=0.1",
    "gsd",
    "gsd:coupling=maximal",
    "gsd:max_distance=1.0",
    "lantern",
    "lantern:coupling=independent",
    "lantern:tv=0.3",
    "lantern:bound=draft",
    "lantern:bound=factor:neighbours=10",
    "lantern:bound=factor:neighbours=10:tree=static:window=32",
    "sjd:coupling=maximal:tree=static:window=32",
    "zipar",
    "zipar:local_window=1",
    "zipar:window=adaptive",
    "zipar:window=adaptive:local_window=2",
    "pjd",
    "pjd:local_window=1",
)


class Study:
    """Draws with one model, and measures draws against a reference.

    Args:
        pipe: the model.
        num: images of a draw.
    """

    def __init__(self, pipe: Any, num: int) -> None:
        self.model, self.scale = pipe.model, pipe.config["guidance_scale"]
        self.classes = [k % 10 for k in range(num)]
        self.classifier = load_classifier()
        self.reference = self.draw(get_sampler("ar"), seed=1)[0]
        self.plain: Tensor | None = None

    def draw(self, sampler: Any, seed: int, batch_size: int = 64) -> tuple[Tensor, float]:
        """Tokens of all classes, and passes per image."""
        tokens, passes = [], 0
        for first in range(0, len(self.classes), batch_size):
            batch = self.classes[first : first + batch_size]
            seeds = [(seed, first + k) for k in range(len(batch))]
            out = sampler(self.model, batch, seeds=seeds, guidance_scale=self.scale)
            tokens.append(out.tokens)
            passes += sum(out.stats.passes_per_image)
        return torch.cat(tokens), passes / len(self.classes)

    def images(self, tokens: Tensor) -> Tensor:
        """Pictures of tokens, uint8."""
        return to_uint8(self.model.decode(tokens), value_range="signed")

    def _moments(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features = self.classifier.features(self.images(tokens)).double()
        return features.mean(0), torch.cov(features.T)

    def _marginal(self, tokens: Tensor) -> Tensor:
        counts = torch.bincount(tokens.flatten(), minlength=self.model.vocab_size).double() + 0.5
        return counts / counts.sum()

    def log_likelihood(self, tokens: Tensor) -> Tensor:
        """Mean nats per token of each image under the guided model, [B]."""
        parts = []
        for first in range(0, len(tokens), 64):
            part = tokens[first : first + 64]
            classes = self.classes[first : first + 64]
            laws = teacher_forced(self.model, classes, part, self.scale).log_softmax(-1)
            parts.append(laws.gather(-1, part[..., None])[..., 0].mean(1))
        return torch.cat(parts)

    def measure(self, tokens: Tensor) -> dict[str, Any]:
        """The distances of the module's docstring."""
        mine, theirs = self._marginal(tokens), self._marginal(self.reference)
        likelihood = self.log_likelihood(tokens)
        consistency = class_consistency(self.images(tokens), torch.tensor(self.classes))
        plain = tokens if self.plain is None else self.plain
        return {
            "agreement": float((tokens == plain).double().mean()),
            "images_equal": int((tokens == plain).all(1).sum()),
            "marginal_kl": float((mine * (mine / theirs).log()).sum()),
            "log_likelihood": float(likelihood.mean()),
            "log_likelihood_error": float(likelihood.std() / len(tokens) ** 0.5),
            "feature_distance": float(
                frechet_distance(*self._moments(tokens), *self._moments(self.reference))
            ),
            "class_consistency": float(consistency),
            "class_consistency_interval": consistency.interval,
        }


def main() -> None:
    """Measure and write `results/lossy.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--only", help="specs, with commas between")
    options = parser.parse_args()
    wanted = SAMPLERS if options.only is None else options.only.split(",")
    study = Study(arvision.load("llamagen-fashion", device="cpu"), options.images)
    found = {}
    for spec in dict.fromkeys(["ar", *wanted]):
        sampler = get_sampler(spec)
        tokens, passes = study.draw(sampler, seed=0)
        row = {"sampler": spec, "lossless": sampler.is_exact, "passes": passes}
        row |= {"tokens_per_pass": study.model.num_tokens / passes} | study.measure(tokens)
        if spec == "ar":
            study.plain = tokens
        found[spec] = row
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    if options.only is None:
        other, passes = study.draw(get_sampler("ar"), seed=2)
        last = "ar, other seeds"
        found[last] = {"sampler": last, "lossless": True} | study.measure(other)
    old = {row["sampler"]: row for row in load("lossy").get("samplers", [])}
    rows = old | found
    order = [*SAMPLERS, "ar, other seeds"]
    rows = [rows[spec] for spec in order if spec in rows]
    save("lossy", {"images": options.images, "guidance_scale": study.scale, "samplers": rows})


if __name__ == "__main__":
    main()
