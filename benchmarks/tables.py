"""Write the measured tables of the README and of docs/ from `benchmarks/results`.

python -m benchmarks.tables
"""

from __future__ import annotations

import re
from typing import Any

from .common import RESULTS, load
from .grid import larger_grid_table
from .image_systems import table as image_systems_table
from .rapid import rapid_table
from .text_prompts import PROMPTS
from .text_table import TABLE
from .trees import law_table, trees_table

SAMPLERS_PAGE = RESULTS.parent.parent / "docs" / "samplers.md"
README = RESULTS.parent.parent / "README.md"


def passes_table(record: dict[str, Any]) -> str:
    """Tokens per pass by coupling and window, both embedded models."""
    windows = (8, 16, 32, 64)
    lines = [
        "| model | coupling | " + " | ".join(f"window {w}" for w in windows) + " | same as `ar` |"
    ]
    lines.append("|" + " --- |" * (len(windows) + 3))
    for model in ("llamagen-fashion", "llamagen-fashion-t2i"):
        rows = record[model]["passes"]
        for coupling in ("gumbel", "maximal", "independent"):
            mine = {row["window"]: row for row in rows if row["coupling"] == coupling}
            cells = [f"{mine[w]['tokens_per_pass']:.2f}" for w in windows]
            same = f"{mine[16]['equal_to_ar']} of {mine[16]['images']}"
            lines.append(f"| `{model}` | {coupling} | " + " | ".join(cells) + f" | {same} |")
    return "\n".join(lines)


SHOWN = ("sjd gumbel 8", "sjd gumbel 16", "sjd gumbel 32", "sjd maximal 16")


def time_table(records: dict[str, dict[str, Any]]) -> str:
    """Wall time per image at batch 1 by dtype and thread count, medians, `ar` with its spread."""
    lines = [
        "| model | dtype | threads | `ar`, ms per image | " + " | ".join(SHOWN) + " |",
        "|" + " --- |" * (4 + len(SHOWN)),
    ]
    for model in ("llamagen-fashion", "llamagen-fashion-t2i"):
        for dtype, record in records.items():
            for threads, rows in record[model]["wall_time"].items():
                low, mid, high = (1e3 * rows["ar"][key] for key in ("min", "median", "max"))
                cells = [
                    f"{1e3 * rows[name]['median']:.0f} ({rows[name]['speed_up']:.2f}x)"
                    for name in SHOWN
                ]
                lines.append(
                    f"| `{model}` | {dtype} | {threads} | {mid:.0f} ({low:.0f} to {high:.0f}) | "
                    + " | ".join(cells)
                    + " |"
                )
    return "\n".join(lines)


def grid_table(record: dict[str, Any]) -> str:
    """Tokens per pass by coupling, way to start a position and window, both models."""
    rows = record["llamagen-fashion"]["grid"]
    windows = sorted({row["window"] for row in rows})
    lines = [
        "| coupling | init | " + " | ".join(f"window {w}" for w in windows) + " |",
        "|" + " --- |" * (len(windows) + 2),
    ]
    cells: dict[tuple[str, str], dict[int, list[float]]] = {}
    for model in ("llamagen-fashion", "llamagen-fashion-t2i"):
        for row in record[model]["grid"]:
            mine = cells.setdefault((row["coupling"], row["init"]), {})
            mine.setdefault(row["window"], []).append(row["tokens_per_pass"])
    for (coupling, init), values in cells.items():
        shown = [" / ".join(f"{value:.2f}" for value in values[w]) for w in windows]
        lines.append(f"| {coupling} | `{init}` | " + " | ".join(shown) + " |")
    models = f"`llamagen-fashion` / `llamagen-fashion-t2i`, {rows[0]['images']} images each. "
    return "\n".join(lines) + f"\n\n{models}{machine(record, 'grid')}"


def window_table(record: dict[str, Any]) -> str:
    """Wall time of fixed windows and "auto" beside `ar`, by batch."""
    by_batch = record["llamagen-fashion"]
    names = list(next(iter(by_batch.values()))["seconds_per_image"])
    lines = ["| batch | " + " | ".join(names) + " | auto over best fixed |"]
    lines.append("|" + " --- |" * (len(names) + 2))
    for batch, row in by_batch.items():
        times = row["seconds_per_image"]
        cells = [
            f"{1e3 * times[name]['median']:.1f} ({row['speed_up_over_ar'][name]:.2f}x)"
            for name in names
        ]
        share = f"{row['auto_over_best_fixed']:.2f} ({row['best_fixed']})"
        lines.append(f"| {batch} | " + " | ".join(cells) + f" | {share} |")
    return (
        "\n".join(lines) + "\n\n`llamagen-fashion`, float32, one thread, milliseconds per image "
        f"(speed-up over `ar`), medians of {next(iter(by_batch.values()))['rounds']}. "
        + machine(record)
    )


def lossy_table(record: dict[str, Any]) -> str:
    """Every sampler beside plain sampling."""
    lines = [
        "| sampler | lossless | passes | tokens per pass | agreement | marginal KL | "
        "nats per token | feature distance | class consistency |",
        "|" + " --- |" * 9,
    ]
    for row in record["samplers"]:
        low, high = row["class_consistency_interval"]
        speed = ("", "")
        if "passes" in row:
            speed = (f"{row['passes']:.1f}", f"{row['tokens_per_pass']:.2f}")
        lines.append(
            f"| `{row['sampler']}` | {'yes' if row['lossless'] else 'no'} | {speed[0]} | {speed[1]} "
            f"| {row['agreement']:.2f} | {row['marginal_kl']:.3f} | {row['log_likelihood']:.2f} +- "
            f"{row['log_likelihood_error']:.2f} | {row['feature_distance']:.2f} | "
            f"{row['class_consistency']:.3f} [{low:.2f}, {high:.2f}] |"
        )
    return "\n".join(lines) + f"\n\n{record['images']} images each. {machine(record)}"


def dd_tables(record: dict[str, Any]) -> str:
    """Quality and time of students beside their teachers, a table of each for every teacher."""
    parts = []
    for teacher, row in record.items():
        if teacher == "environment":
            continue
        lines = [
            f"`{teacher}`, {row['images']} images:",
            "",
            "| | passes | agreement with the teacher | distance to test images | distance to the teacher | "
            "class consistency | precision | recall |",
            "|" + " --- |" * 8,
        ]
        for found in row["quality"]:
            shares = " | ".join(
                f"{found[k]:.3f}" for k in ("class_consistency", "precision", "recall")
            )
            lines.append(
                f"| {found['sampler']} | {found['passes']} | {found['agreement']:.3f} | "
                f"{found['distance_to_test_images']:.2f} | {found['distance_to_teacher']:.2f} | {shares} |"
            )
        lines += ["", "| threads | " + " | ".join(next(iter(row["seconds"].values()))) + " |"]
        lines.append("|" + " --- |" * (1 + len(next(iter(row["seconds"].values())))))
        for threads, times in row["seconds"].items():
            cells = [f"{1e3 * t['median']:.1f} ms ({t['speed_up']:.1f}x)" for t in times.values()]
            lines.append(f"| {threads} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, machine(record)])


def cspd_tables(record: dict[str, Any]) -> str:
    """Continuous speculative decoding beside plain sampling."""
    times = record["seconds"]
    lines = [
        "| sampler | law | passes | acceptance | feature distance | class consistency | "
        + " | ".join(f"ms per image, batch {b}" for b in times)
        + " |",
        "|" + " --- |" * (6 + len(times)),
    ]
    for row in record["quality"]:
        share = "" if row["acceptance"] is None else f"{row['acceptance']:.2f}"
        cells = [
            f"{1e3 * t[row['sampler']]['median']:.0f} ({t[row['sampler']]['speed_up']:.2f}x)"
            if row["sampler"] in t
            else ""
            for t in times.values()
        ]
        law = "exact" if row["lossless"] else "lossy"
        if "num_iter" in row["sampler"]:
            law = "its own"  # exact for another schedule than the reference's
        lines.append(
            f"| `{row['sampler']}` | {law} | {row['passes']:.1f} | "
            f"{share} | {row['distance']:.2f} | {row['class_consistency']:.3f} | "
            + " | ".join(cells)
            + " |"
        )
    head = ", ".join(f"{1e3 * t['median']:.0f} ms for {n}" for n, t in record["head"].items())
    return (
        "\n".join(lines) + f"\n\n{record['images']} images for the quality; times are medians of "
        f"{record['rounds']}. The head's reverse loop: {head} latents. {machine(record, 'time')}"
    )


def text_table(record: dict[str, Any]) -> str:
    """Tokens per pass and time per token by kind of prompt."""
    kinds = record["kinds"]
    lines = ["| | " + " | ".join(kinds) + " | equal to greedy |", "|" + " --- |" * (len(kinds) + 2)]
    for name in next(iter(kinds.values())):
        rows = [kinds[kind][name] for kind in kinds]
        cells = [f"{r['tokens_per_pass']:.2f} ({r['milliseconds_per_token']:.0f} ms)" for r in rows]
        equal = [r["equal"].split(" of ") for r in rows]
        same = f"{sum(int(e[0]) for e in equal)} of {sum(int(e[1]) for e in equal)}"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {same} |")
    return "\n".join(lines) + f"\n\n{record['tokens']} tokens, {record['dtype']}. {machine(record)}"


ELSEWHERE: dict[str | None, str] = {
    None: "for images",
    "": "below",
    "parallel": "2.9 on a small network (1.0 untrained), see there",
}
"""Where systems are measured that have no row in the record."""


def systems_table(record: dict[str, Any]) -> str:
    """Every text-side system: where it lives, and what it gave beside the row it builds on."""
    lines = [
        f"| system | where | tokens per pass: {' / '.join(PROMPTS)} | CPU ms per token | MB | fitted, s "
        "| lossless |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for system, where, name, is_lossless in TABLE:
        found = record["systems"].get(name)
        cells = [ELSEWHERE.get(name, "not measured"), "", "", ""]
        if found is not None:
            fits = found.get("fits", {}).values()
            cells = [
                " / ".join(f"{found[kind]:.2f}" for kind in PROMPTS),
                f"{found['milliseconds']:.0f}" if "milliseconds" in found else "",
                f"{found['bytes'] / 1e6:.0f}" if "bytes" in found else "",
                f"{sum(fits):.0f}" if fits else "",
            ]
        lines.append(f"| {system} | {where} | {' | '.join(cells)} | {is_lossless} |")
    return (
        "\n".join(lines)
        + f"\n\n{record['per_kind']} prompts of each kind, {record['tokens']} tokens "
        f"at most. {machine(record)}"
    )


def completion_table(record: dict[str, Any]) -> str:
    """Continuations of one prompt: their perplexity, how much they differ, passes."""
    lines = [
        f"| {record['k']} continuations by | perplexity, all | perplexity, the best | different tokens | "
        "passes | s |",
        "|" + " --- |" * 6,
    ]
    for row in record["ways"]:
        lines.append(
            f"| {row['way']} | {row['perplexity']:.2f} | {row['best']:.2f} | "
            f"{100 * row['distinct']:.0f} % | {row['passes']:.0f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines) + (
        f"\n\n{record['prompts']} prompts, {record['tokens']} tokens each. {machine(record)}"
    )


def lengths_table(record: dict[str, Any]) -> str:
    """A batch with fixed lengths of drafts, and with those that SmartSpec finds."""
    lines = ["| drafts | passes | tokens per pass | drafts given | s |", "|" + " --- |" * 5]
    for row in record["rows"]:
        lines.append(
            f"| {row['lengths']} | {row['passes']} | {row['tokens_per_pass']:.2f} | {row['drafts']} | "
            f"{row['seconds']:.1f} |"
        )
    return "\n".join(lines) + f"\n\n{record['tokens']} tokens. {machine(record)}"


def machine(record: dict[str, Any], part: str = "") -> str:
    """One line about where the figures, or those of one part, come from."""
    where = record.get("environments", {}).get(part, record["environment"])
    return (
        f"Machine: {where['cpu']}, {where['cores']} shared cores, torch {where['torch']}, "
        f"{where['date']}, commit {where['commit']}."
    )


def fill(text: str, name: str, content: str) -> str:
    """Put `content` between the markers `<!-- name -->` and `<!-- /name -->`."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one pair of markers {name!r}, found {count}")
    return filled


def main() -> None:
    """Update the README and the pages in place."""
    record = load("samplers")
    text = README.read_text()
    text = fill(text, "passes", passes_table(record) + "\n\n" + machine(record, "passes"))
    README.write_text(text)
    records = {"float32": record, "bfloat16": load("samplers_bfloat16")}
    path = SAMPLERS_PAGE.with_name("performance.md")
    times = time_table(records) + "\n\n" + machine(record, "time")
    path.write_text(fill(path.read_text(), "time", times))
    page = fill(SAMPLERS_PAGE.read_text(), "lossy", lossy_table(load("lossy")))
    SAMPLERS_PAGE.write_text(page)
    path = SAMPLERS_PAGE.with_suffix("") / "sjd.md"
    page = fill(path.read_text(), "grid", grid_table(record))
    path.write_text(fill(page, "window", window_table(load("window"))))
    pages = (
        ("distillation", "dd", dd_tables),
        ("mar", "cspd", cspd_tables),
        ("text", "text", text_table),
        ("text-systems", "text_systems", systems_table),
        ("text-systems", "rapid", rapid_table),
        ("text", "completion", completion_table),
        ("text-systems", "lengths", lengths_table),
        ("systems", "image_systems", image_systems_table),
    )
    trees = load("trees")
    path = SAMPLERS_PAGE.with_name("trees.md")
    page = fill(path.read_text(), "trees", f"{trees_table(trees)} {machine(trees, 'passes')}")
    page = fill(page, "trees_law", law_table(trees))
    if grid := load("trees_grid"):
        page = fill(page, "trees_grid", f"{larger_grid_table(grid)} {machine(grid, 'passes')}")
    path.write_text(page)
    for name, marker, table in pages:
        path = SAMPLERS_PAGE.with_name(f"{name}.md")
        if load(marker):
            path.write_text(fill(path.read_text(), marker, table(load(marker))))
    print(f"updated {README} and docs")


if __name__ == "__main__":
    main()
