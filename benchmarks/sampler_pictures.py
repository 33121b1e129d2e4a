"""Draw the picture at the head of each sampler's page: one image as it is drawn, and when each of its places was final.

python -m benchmarks.sampler_pictures          writes docs/images/samplers/NAME.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import arvision

FOLDER = Path(__file__).parent.parent / "docs" / "images" / "samplers"
SHOWN = 4
"""Parts of the way, between which a preview is shown."""
DRAWS = {
    "ar": ("llamagen-fashion", "ar"),
    "sjd": ("llamagen-fashion", "sjd:window=16"),
    "draft": ("llamagen-fashion", "draft"),
    "gsd": ("llamagen-fashion", "gsd"),
    "lantern": ("llamagen-fashion", "lantern"),
    "zipar": ("llamagen-fashion", "zipar"),
    "pjd": ("llamagen-fashion", "pjd"),
    "cspd": ("mar-fashion", "cspd"),
    "csjd": ("mar-fashion", "csjd"),
    "code": ("var-fashion-small", "code:draft=var-fashion"),
    "dd": ("llamagen-fashion-dd", "dd:steps=2"),
}
"""Page to model and sampler."""


def draw(name: str) -> None:
    """One page's picture."""
    import matplotlib.pyplot as plt

    model, sampler = DRAWS[name]
    pipe = arvision.load(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.sampler = arvision.get_sampler(sampler)
    seen: list[tuple[int, Any]] = []

    def watch(pipe: Any, step: int, timestep: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        if "preview" in kwargs:
            seen.append((step, kwargs["preview"][0]))
        return {}

    out = pipe("sneaker", seed=3, callback_on_step_end=watch, preview_every=1)
    stats = out.stats
    places = torch.linspace(0, len(seen) - 1, SHOWN + 1)[1:-1].round().int().tolist()
    shown = [seen[place] for place in sorted(set(places) - {len(seen) - 1})]
    grid = getattr(pipe.model, "grid", None)
    has_map = bool(stats.get("commit_pass")) and grid is not None
    columns = len(shown) + 1 + has_map
    figure, axes = plt.subplots(1, columns, figsize=(2 * columns, 2.4), dpi=80)
    for axis, (step, picture) in zip(axes, shown, strict=False):
        axis.imshow(picture, cmap="gray")
        axis.set_title(f"after pass {step - seen[-1][0] + stats.forward_passes}", fontsize=9)
    axes[len(shown)].imshow(out.images[0], cmap="gray")
    axes[len(shown)].set_title(f"done: {stats.forward_passes} passes", fontsize=9)
    if has_map and grid is not None:
        made = torch.tensor(stats.commit_pass[0]).view(*grid)
        shade = axes[-1].imshow(made, cmap="viridis")
        figure.colorbar(shade, ax=axes[-1], fraction=0.046)
        axes[-1].set_title("pass of each place", fontsize=9)
    for axis in axes:
        axis.axis("off")
    figure.tight_layout()
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png", pil_kwargs={"optimize": True})
    plt.close(figure)
    print(name, stats.forward_passes, len(seen), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for page in DRAWS:
        draw(page)
