"""The grid of a report: which row and which column a tensor belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from resm_kernels.tensor_names import is_before_layers, layer_position, module_kind, module_names

BEFORE: Final = "embeddings"
"""The row of all tensors that are used before the layers."""
AFTER: Final = "final"
"""The row of all tensors that are used after the layers."""

_DECODERS: Final = ("decoder", "text_decoder")
"""The parts of a model that read what its other parts make, and come after these, whatever the order of the files."""


@dataclass(frozen=True)
class Grid:
    """Rows and columns in the order in which they are shown, and the place of each tensor as (row, column)."""

    rows: list[str]
    columns: list[str]
    places: Mapping[str, tuple[str, str]]


def make_grid(names: Iterable[str]) -> Grid:
    """Return the grid of a model's tensors: a row for each layer, a column for each kind of module.

    The rows of a model with several stacks of layers say which one they belong to: the part of the model, as recipes
    name it under `modules`, or the stack's name, which may be empty, where a part has several stacks. Columns are in
    the order of the model's files: kinds before the layers, within them, and after them.
    """
    names = list(names)
    kinds = {name: module_kind(name) for name in names}
    stacks = {name: _stack(name) for name in names if kinds[name].layer is not None}
    parts = module_names(names)
    labels = _labels(stacks, parts)
    rows: dict[str, tuple[int, int]] = {}
    columns: dict[str, int] = {}
    places: dict[str, tuple[str, str]] = {}
    decoding = {stack for name, stack in stacks.items() if parts[name] in _DECODERS}
    order = sorted(dict.fromkeys(stacks.values()), key=decoding.__contains__)
    for name in names:
        kind, layer = kinds[name]
        if layer is not None:
            row, depth, group = f"{labels[stacks[name]]}{layer}", (1 + order.index(stacks[name]), layer), 1
        elif is_before_layers(name):
            row, depth, group = BEFORE, (0, 0), 0
        else:
            row, depth, group = AFTER, (1 + len(order), 0), 2
        rows[row] = depth
        columns[kind] = min(group, columns.get(kind, group))
        places[name] = row, kind
    return Grid(sorted(rows, key=lambda row: rows[row]), sorted(columns, key=lambda kind: columns[kind]), places)


def _stack(name: str) -> str:
    """Return the modules before the number of the layer, as `module_kind` finds it."""
    if (position := layer_position(name)) is not None:
        return position.stack.removesuffix(".")
    parts = name.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit())])


def _labels(stacks: Mapping[str, str], parts: Mapping[str, str]) -> dict[str, str]:
    """Return for each stack what stands before the numbers of its layers."""
    of_part: dict[str, set[str]] = {}
    for name, stack in stacks.items():
        of_part.setdefault(parts[name], set()).add(stack)
    if len(set(stacks.values())) < 2:
        return dict.fromkeys(stacks.values(), "")
    return {
        stack: f"{parts[name] if len(of_part[parts[name]]) == 1 else stack} ".lstrip() for name, stack in stacks.items()
    }
