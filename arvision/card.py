"""Model cards: the README.md beside a model, from one template for all families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_text

TEMPLATE = """\
---
{{ card_data }}
---
# {{ name }}

{{ description }}

{% for title, lines in facts %}- **{{ title }}**: {{ lines[0] }}
{% for line in lines[1:] %}  - {{ line }}
{% endfor %}{% endfor %}"""

DEMONSTRATION = "**A small demonstration model**: it exists so that"
FASHION = "Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; MIT licence)"

Facts = Mapping[str, str | Sequence[str]]
"""What a card says, by title: a line, or a line and what stands below it."""


def write_card(
    folder: str | Path,
    description: str,
    facts: Facts,
    *,
    tags: Sequence[str] = (),
    licence: str | None = None,
) -> None:
    """Write `README.md` into a model's folder.

    Args:
        folder: of the model; its name is the card's title.
        description: first paragraph, Markdown.
        facts: a list of titles and lines.
        tags: of the Hub.
        licence: identifier of the weights' licence, None where it is not known.
    """
    from huggingface_hub import ModelCard, ModelCardData

    place = Path(folder)
    data = ModelCardData(library_name="arvision", license=licence, tags=list(tags))
    rows = [(title, [text] if isinstance(text, str) else text) for title, text in facts.items()]
    card = ModelCard.from_template(
        data, template_str=TEMPLATE, name=place.name, description=description, facts=rows
    )
    write_text(place / "README.md", str(card).rstrip() + "\n")


def megabytes(folder: str | Path) -> str:
    """Size of all files of a folder, such as "7.4 MB"."""
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return f"{size / 1e6:.1f} MB"


def settings_in_words(config: Mapping[str, Any]) -> str:
    """A pipeline's recommended settings that differ from plain sampling, such as "guidance 3"."""
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    words = [f"guidance {_number(config['guidance_scale'])}"]
    words += [
        f"{name.replace('_', '-')} {_number(config[name])}"
        for name, value in plain.items()
        if config[name] != value
    ]
    return ", ".join(words)


def _number(value: Any) -> str:
    """ "3", or "1, 2, 3 (scale by scale)"."""
    if isinstance(value, Sequence):
        return f"{', '.join(f'{entry:g}' for entry in value)} (scale by scale)"
    return f"{value:g}"
