"""All seeds' records as one file: every row of every seed, every grid, every choice. Tables come from it alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import resm_kernels
from benchmarks.quality.candidates import Candidate, Row
from benchmarks.quality.measure import chosen
from benchmarks.quality.records import Record, RecordName, Scores
from benchmarks.records import write_aside

COLUMNS: Final = ("helpful", "honest", "harmless", "average", "worst")


@dataclass(frozen=True)
class Results:
    """What a record holds.

    Attributes:
        size, record: Which models; one of `records.RECORDS`.
        seeds: In ascending order; lists below follow it.
        version: Of the library.
        questions: Of each seed, by split and kind.
        rows: By group and name ("tuned/resm"): the test scores of each seed, with all kinds.
        chosen: For the same rows, what was chosen at each seed, in words.
        grids: Of rows with a choice, by name: each point in words, and its validation averages.
        layers: Of each seed, what RESM with β = 1 sees in the matrices.
        seconds: Of each seed, processor seconds by what they went into.
        provenance: Where the figures come from; see `benchmarks.records`. Records of before it have none.
        costs: Of rows of merges in a record of calibrated merges, by name: the processor seconds at each seed of all
            that the row merges, its prompts' answers included; its training of experts and its choices not.
    """

    size: str
    record: str
    seeds: list[int]
    version: str
    questions: list[dict[str, dict[str, int]]]
    rows: dict[str, list[Scores]]
    chosen: dict[str, list[str]]
    grids: dict[str, dict[str, list[Scores]]]
    layers: list[list[dict[str, Any]]]
    seconds: list[dict[str, float]]
    costs: dict[str, list[float]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def values(self, row: str, column: str) -> list[float]:
        """One score of a row at each seed."""
        return [scores[column] for scores in self.rows[row]]

    def group(self, name: str) -> dict[str, str]:
        """The rows of a group: the name within it, and in `rows`."""
        return {row.split("/", 1)[1]: row for row in self.rows if row.split("/", 1)[0] == name}


def collect(
    size: str, record: RecordName, rows: Sequence[Row], records: Mapping[int, Record], provenance: dict[str, Any]
) -> Results:
    """One file of several seeds' records."""
    seeds = sorted(records)
    ordered = [records[seed] for seed in seeds]

    def per_seed(row: Row) -> Iterable[tuple[Candidate, Record]]:
        return ((chosen(row, measured), measured) for measured in ordered)

    names = {f"{row.group}/{row.name}": row for row in rows}
    several = {name: row for name, row in names.items() if len(row.candidates) > 1}
    return Results(
        size=size,
        record=record,
        seeds=seeds,
        version=resm_kernels.__version__,
        questions=[measured.questions for measured in ordered],
        rows={name: [measured.test[c.key] for c, measured in per_seed(row)] for name, row in names.items()},
        chosen={name: [c.describe() for c, _ in per_seed(row)] for name, row in several.items()},
        grids={
            name: {c.describe(): [_headline(measured.valid[c.key]) for measured in ordered] for c in row.candidates}
            for name, row in several.items()
        },
        layers=[measured.layers for measured in ordered],
        seconds=[measured.seconds for measured in ordered],
        costs={
            name: [round(sum(measured.costs[c.key] for c in row.candidates), 2) for measured in ordered]
            for name, row in names.items()
            if record.startswith("calibrated") and row.candidates[0].method
        },
        provenance=provenance,
    )


def _headline(scores: Scores) -> Scores:
    return {name: scores[name] for name in COLUMNS}


def file_of(folder: Path, size: str, record: RecordName) -> Path:
    """`quality.json` for small models' development seeds; others say what they are."""
    parts = ["quality", *([size] if size != "small" else []), *([record] if record != "development" else [])]
    return folder / ("_".join(parts).replace("-", "_") + ".json")


def save(results: Results, file: Path) -> None:
    """One line for each entry of the large tables, so that versions compare line by line."""
    lines = []
    for key, value in vars(results).items():
        if isinstance(value, dict):
            inner = ",\n".join(f"  {_compact(k)}: {_compact(v)}" for k, v in value.items())
            lines.append(f" {_compact(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {_compact(key)}: {_compact(value)}")
    write_aside(file, "{\n" + ",\n".join(lines) + "\n}\n")


def read(file: Path) -> Results:
    return Results(**json.loads(file.read_text()))


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
