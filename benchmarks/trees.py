"""What do trees save over chains, is all of it exact, and where do the weights come from?

python -m benchmarks.trees                    all parts, and docs/images/drift-tree.png
python -m benchmarks.trees --part passes      tokens per pass over trees x candidates
python -m benchmarks.trees --part weights     mismatch weights, fitted on other images
python -m benchmarks.trees --part law         enumerated law of our trees, and of SJD-PAC, as we read it
python -m benchmarks.trees --part picture     the tree of one pass, drawn
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import arvision
from arvision import get_sampler
from arvision.decoding.drift import DriftDrafter, mismatch_weights
from arvision.decoding.jacobi import first_laws
from arvision.decoding.noise import Noise
from arvision.decoding.teacher_forcing import teacher_forced
from arvision.testing import DroppingTableModel, draw_joint, law_p_value

from .common import RESULTS, load, save
from .pac import pac
from .samplers import PROMPTS

PICTURE = RESULTS.parent.parent / "docs" / "images" / "drift-tree.png"
SIZES = (16, 32, 64)


def fitted(window: int, weights: list[float]) -> Any:
    """`sjd` with a drift tree, first laws from above, and mismatch weights of the caller's."""
    sampler: Any = get_sampler("sjd", tree="drift", window=window, init="above")
    sampler.drafter = lambda model: DriftDrafter(
        first_laws("above", model.grid, None), model.grid[1], weights=weights
    )
    return sampler


def methods(weights: list[float] | None) -> dict[str, Callable[[int], Any]]:
    """Samplers by their name in the table, given the number of candidates."""
    made: dict[str, Callable[[int], Any]] = {
        "chain, maximal": lambda t: get_sampler("sjd", window=t, coupling="maximal"),
        "PAC K 3, repaired": lambda t: pac(t, released=False),
        "static tree": lambda t: get_sampler("sjd", window=t, coupling="maximal", tree="static"),
        "chain, gumbel": lambda t: get_sampler("sjd", window=t),
        "chain, memory": lambda t: get_sampler("sjd", window=t, init="memory"),
        "drift, prior": lambda t: get_sampler("sjd", window=t, tree="drift"),
        "drift, above": lambda t: get_sampler("sjd", window=t, tree="drift", init="above"),
        "drift, memory": lambda t: get_sampler("sjd", window=t, tree="drift", init="memory"),
    }
    if weights is not None:
        made["drift, above, fitted weights"] = lambda t: fitted(t, weights)
    return made


def passes(
    pipe: Any, prompts: list, num: int, seed: int, batch: int, made: dict[str, Any]
) -> list[dict[str, Any]]:
    """Tokens per pass of methods `made`, and how many images equal `ar`'s."""
    model, scale = pipe.model, pipe.config["guidance_scale"]
    conditions = [prompts[k % len(prompts)] for k in range(num)]
    seeds = [(seed, k) for k in range(num)]
    plain = get_sampler("ar")(model, conditions, seeds=seeds, guidance_scale=scale).tokens
    rows = []
    for name, make in made.items():
        for size in SIZES:
            sampler = make(size)
            total = candidates = equal = 0
            for first in range(0, num, batch):
                part = slice(first, first + batch)
                out = sampler(model, conditions[part], seeds=seeds[part], guidance_scale=scale)
                total += sum(out.stats.passes_per_image)
                candidates += out.stats.candidates
                equal += int((out.tokens == plain[part]).all(1).sum())
            row = {"method": name, "candidates": size, "seed": seed, "images": num, "batch": batch}
            row["tokens_per_pass"] = num * model.num_tokens / total
            row["mean_candidates"] = candidates / total
            row["equal_to_ar"] = equal
            rows.append(row)
            print(
                f"  {name:30} {size:3}: {row['tokens_per_pass']:.2f} tokens per pass, "
                f"{row['mean_candidates']:.0f} candidates, {equal} of {num} equal to ar",
                flush=True,
            )
    return rows


def fit_weights(pipe: Any, prompts: list, num: int, seed: int) -> dict[str, Any]:
    """Weights from how often one wrong token, k back, leaves the best token what it was.

    A token of a drawn image is put out by another draw of its law, and the laws behind it are
    asked again. A share of best tokens p_k becomes the weight (p_far - p_k) / (p_far - p_1), where
    p_far is the median over k. The images are not those of `passes`.
    """
    model, scale = pipe.model, pipe.config["guidance_scale"]
    conditions = [prompts[k % len(prompts)] for k in range(num)]
    seeds = [(seed, k) for k in range(num)]
    tokens = get_sampler("ar")(model, conditions, seeds=seeds, guidance_scale=scale).tokens
    laws = teacher_forced(model, conditions, tokens, scale).log_softmax(-1)
    places = torch.arange(model.num_tokens).expand(num, -1)
    gumbel = Noise(seeds).gumbel(places, model.vocab_size, laws.dtype)
    other = (
        laws
        + Noise([(seed + 1, k) for k in range(num)]).gumbel(places, model.vocab_size, laws.dtype)
    ).argmax(-1)
    length = len(mismatch_weights(model.grid[1]))
    right, asked = torch.zeros(length), torch.zeros(length)
    for place in range(0, model.num_tokens - 1, 3):
        changed = other[:, place] != tokens[:, place]
        wrong = tokens.clone()
        wrong[:, place] = other[:, place]
        law = teacher_forced(model, conditions, wrong, scale).log_softmax(-1)
        best = (law + gumbel).argmax(-1)
        for back in range(1, min(length, model.num_tokens - 1 - place) + 1):
            same = best[:, place + back] == tokens[:, place + back]
            right[back - 1] += (same & changed).sum()
            asked[back - 1] += changed.sum()
    share = right / asked.clamp(min=1)
    far = share.median()
    weights = ((far - share) / (far - share[0])).clamp(min=0.02)
    return {
        "share": [round(float(x), 3) for x in share],
        "weights": [round(float(x), 3) for x in weights],
        "by_hand": mismatch_weights(model.grid[1]),
        "images": num,
        "seed": seed,
    }


def law() -> list[dict[str, Any]]:
    """Chi-square p-values of enumerated laws: V 6, N 4, K 3, 20,000 draws."""
    rows = []
    cases = {
        "chain, maximal": get_sampler("sjd", window=8, coupling="maximal"),
        "SJD-PAC, as we read it": pac(16, released=True),
        "SJD-PAC repaired": pac(16, released=False),
        "static tree": get_sampler("sjd", window=16, coupling="maximal", tree="static"),
        "drift tree": get_sampler("sjd", window=16, tree="drift", init="above"),
    }
    for sharpness in (1.5, 3.0):
        for name, sampler in cases.items():
            model = DroppingTableModel(6, 4, seed=0, sharpness=sharpness, grid=(2, 2))
            samples = draw_joint(sampler, model, 20_000, seed=1)
            joint = model.joint(sampler.shaping())
            counts = torch.bincount(samples, minlength=len(joint)).double()
            distance = float((counts / counts.sum() - joint).abs().sum() / 2)
            floor = float((joint * (1 - joint) / 20_000).sqrt().sum() * (2 / torch.pi) ** 0.5 / 2)
            row = {"method": name, "sharpness": sharpness, "p": law_p_value(samples, joint)}
            rows.append(row | {"tv": distance, "floor": floor})
            print(f"  {name:20} sharpness {sharpness}: p {row['p']:.2g}, TV {distance:.3f}")
    return rows


def picture(path: Path = PICTURE) -> None:
    """The tree of one pass on `llamagen-fashion`, beside the chain that has the same candidates."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    model = arvision.load("llamagen-fashion", device="cpu").model
    plain = get_sampler("ar")(model, [9], seeds=[3], guidance_scale=3.0).tokens[0].tolist()
    figure, axes = pyplot.subplots(2, 1, figsize=(9, 6.4), height_ratios=[1, 3])
    _draw(axes[0], _tree_of_pass(model, {}), plain, "a chain: one guess for every position")
    options = {"tree": "drift", "init": "above"}
    title = "a drift tree: more guesses where laws are old"
    _draw(axes[1], _tree_of_pass(model, options), plain, title)
    axes[1].set_xlabel("positions behind the last known token (black); green: what `ar` draws")
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def _draw(axis: Any, found: tuple[list[int], list[int], int], plain: list[int], title: str) -> None:
    """Candidates by depth, each path on a line of its own."""
    drafts, parents, start = found
    children: dict[int, list[int]] = {}
    depth, right = {-1: 0}, {-1}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
        depth[node] = depth[parent] + 1
        if parent in right and drafts[node] == plain[start + depth[node] - 1]:
            right.add(node)
    place: dict[int, int] = {}
    num_lines = _lay(-1, 0, children, place) + 1
    for node in range(-1, len(parents)):
        is_right = node in right
        at = depth[node], -place[node]
        if node >= 0:
            above = depth[parents[node]], -place[parents[node]]
            colour, width = ("#1b7837", 2.5) if is_right else ("#bbbbbb", 1)
            axis.plot(*zip(above, at, strict=True), color=colour, lw=width, zorder=1)
        colour = "#222222" if node < 0 else "#1b7837" if is_right else "#dddddd"
        axis.scatter(*at, s=60, color=colour, edgecolors="#555555", zorder=2)
    axis.set_title(f"{title}; this pass makes {len(right)} tokens final", fontsize=10)
    axis.set_ylim(-num_lines + 0.3, 0.7)
    axis.set_xlim(-0.6, 31.6)
    axis.set_yticks([])
    axis.set_xticks(range(0, 32, 2))
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)


def _lay(node: int, line: int, children: dict[int, list[int]], place: dict[int, int]) -> int:
    """Put a candidate and all below it on lines from `line` on; the last line taken."""
    place[node], last = line, line
    for number, child in enumerate(children.get(node, [])):
        last = _lay(child, line if number == 0 else last + 1, children, place)
    return last


def _tree_of_pass(model: Any, options: dict[str, Any]) -> tuple[list[int], list[int], int]:
    """Drafts, parents and first position of the pass of 32 candidates behind 20 known tokens."""
    sampler: Any = get_sampler("sjd", window=32, **options)
    drafter = sampler.drafter(model)
    seen: list[tuple[list[int], list[int], int]] = []
    inner = drafter.propose

    def propose(tokens: Any, lengths: Any, num: int, number: int) -> Any:
        tree = inner(tokens, lengths, num, number)
        parents = range(-1, num - 1) if tree.parents is None else tree.parents[0].tolist()
        seen.append((tree.tokens[0].tolist(), list(parents), int(lengths[0])))
        return tree

    drafter.propose = propose
    sampler.drafter = lambda model: drafter
    sampler(model, [9], seeds=[3], guidance_scale=3.0)
    return next(found for found in seen if found[2] >= 20)


def trees_table(record: dict[str, Any]) -> str:
    """Tokens per pass by method and candidates, both models, mean over seeds."""
    head = [f"{size} candidates" for size in SIZES]
    lines = [
        "| method | " + " | ".join(head) + " | same as `ar` |",
        "|" + " --- |" * (len(SIZES) + 2),
    ]
    names = list(dict.fromkeys(row["method"] for row in record["passes"]["llamagen-fashion"]))
    most = max(row["images"] for rows in record["passes"].values() for row in rows)
    for name in names:
        cells, same = [], []
        for size in SIZES:
            values = []
            for model in PROMPTS:
                rows = [
                    row
                    for row in record["passes"][model]
                    if row["method"] == name and row["candidates"] == size
                ]
                passes = [row["tokens_per_pass"] for row in rows]
                mean = len(passes) / sum(1 / value for value in passes) if passes else None
                few = "*" if rows and rows[0]["images"] < most else ""
                values.append("-" if mean is None else f"{mean:.2f}{few}")
                same += [(row["equal_to_ar"], row["images"]) for row in rows]
            cells.append(" / ".join(values))
        equal = f"{sum(a for a, _ in same)} of {sum(b for _, b in same)}"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {equal} |")
    rows = record["passes"]["llamagen-fashion"]
    count = len({row["seed"] for row in rows})
    seeds = "1 seed" if count == 1 else f"{count} seeds"
    return "\n".join(lines) + (
        f"\n\n`llamagen-fashion` / `llamagen-fashion-t2i`, {seeds} of {rows[0]['images']} images "
        f"each in batches of {rows[0]['batch']} (* 20 images), float32, guidance 3."
    )


def law_table(record: dict[str, Any]) -> str:
    """Enumerated laws."""
    lines = ["| sampler | tables | p | TV | TV of exact draws |", "|" + " --- |" * 5]
    for row in record["law"]:
        kind = "plain" if row["sharpness"] < 2 else "sharper"
        p = f"{row['p']:.2g}" if row["p"] > 0 else "below 1e-300"
        lines.append(f"| {row['method']} | {kind} | {p} | {row['tv']:.3f} | {row['floor']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write `results/trees.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["passes", "weights", "law", "picture"], default=None)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--methods", nargs="*", help="names in the table; all by default")
    parser.add_argument("--models", nargs="*", default=list(PROMPTS))
    options = parser.parse_args()
    parts = [options.part] if options.part else ["weights", "law", "passes", "picture"]
    record: dict[str, Any] = load("trees")
    torch.set_num_threads(1)
    if "law" in parts:
        record["law"] = law()
    if "picture" in parts:
        picture()
    for model in options.models:
        if not {"passes", "weights"} & set(parts):
            continue
        print(model)
        pipe = arvision.load(model, device="cpu")
        prompts = PROMPTS[model]
        if "weights" in parts:
            record.setdefault("weights", {})[model] = fit_weights(pipe, prompts, 20, 77)
            print("  share right", record["weights"][model]["share"])
            print("  fitted", record["weights"][model]["weights"])
        if "passes" in parts:
            found = record.get("weights", {}).get(model)
            made = methods(None if found is None else found["weights"])
            names = [name for name in options.methods or made if name in made]
            known = record.setdefault("passes", {}).setdefault(model, [])
            for seed in options.seeds:
                chosen = {name: made[name] for name in names}
                rows = passes(pipe, prompts, options.images, seed, options.batch, chosen)
                known[:] = [r for r in known if r["seed"] != seed or r["method"] not in names]
                known += rows
                save("trees", record, ["passes"])
    if done := [part for part in parts if part in ("weights", "law")]:
        save("trees", record, done)


if __name__ == "__main__":
    main()
