"""Write the measured tables of the README from `benchmarks/results`.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .common import RESULTS

README = RESULTS.parent.parent / "README.md"


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


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


def time_table(record: dict[str, Any]) -> str:
    """Wall time per image at batch 1, both thread counts."""
    lines = [
        "| model | threads | sampler | ms per image, median (min to max) | speed-up over `ar` |"
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    for model in ("llamagen-fashion", "llamagen-fashion-t2i"):
        for threads, rows in record[model]["wall_time"].items():
            for name, row in rows.items():
                low, mid, high = (1e3 * row[key] for key in ("min", "median", "max"))
                lines.append(
                    f"| `{model}` | {threads} | {name} | {mid:.0f} ({low:.0f} to {high:.0f}) | "
                    f"{row['speed_up']:.2f}x |"
                )
    return "\n".join(lines)


def machine(record: dict[str, Any]) -> str:
    """One line about where the figures come from."""
    where = record["environment"]
    return (
        f"Machine: {where['cpu']}, {where['cores']} shared cores, torch {where['torch']}, "
        f"{where['date']}, commit {where['commit']}; {record.get('dtype', 'float32')}."
    )


def fill(text: str, name: str, content: str) -> str:
    """Put `content` between the markers `<!-- name -->` and `<!-- /name -->`."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one pair of markers {name!r} in {README}, found {count}")
    return filled


def main() -> None:
    """Update the README in place."""
    record = _load("samplers")
    text = README.read_text()
    text = fill(text, "passes", passes_table(record) + "\n\n" + machine(record))
    text = fill(text, "time", time_table(record))
    Path(README).write_text(text)
    print(f"updated {README}")


if __name__ == "__main__":
    main()
