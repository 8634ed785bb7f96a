"""What the pages of families.py, adapters.py and extractions.py have in common: a section for each kind of model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

KINDS: Final = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "encoder-decoder": "Encoders with decoders",
    "image": "Image models",
    "image and text": "Models of images and text",
}
"""The heading of each kind; a family is called KIND: NAME."""


def by_kind(head: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    """A section with a table for each kind of model; the first cell of a row is the family."""
    given = [(*row[0].split(": ", 1), *row[1:]) for row in rows]
    sections = []
    for kind, title in KINDS.items():
        if own := [row[1:] for row in given if row[0] == kind]:
            sections.append(f"## {title}\n\n{table(head, own)}")
    return "\n\n".join(sections)


def table(head: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    """A table of Markdown; a bar within a cell is written as one that ends no cell."""
    names = list(head)
    lines = [names, ["---"] * len(names), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def left_out(title: str, families: Iterable[tuple[str, str]]) -> str:
    """The last section: the families that are not in the tables, and why."""
    rows = [(*name.split(": ", 1), why) for name, why in families]
    if not rows:
        return f"## {title}\n\nNone."
    return (
        f"## {title}\n\nModels that do not get small by the rule of the script, or that transformers cannot load "
        f"itself.\n\n{table(['kind', 'model', 'why'], rows)}"
    )
