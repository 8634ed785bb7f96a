"""The tables of docs/which_method.md, written between its marks from the published records.

    python -m benchmarks.quality.guide

`make quality` runs it. All other text of the page is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.quality import results, tables
from benchmarks.quality.comparison import interval
from benchmarks.quality.records import RECORDS, RecordName, write_aside
from benchmarks.quality.results import Results
from resm_kernels import methods

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "which_method.md"
COLUMNS: Final = ("average", "worst")


def published() -> dict[RecordName, Results]:
    """The records of the smallest models that lie in benchmarks/results."""
    files = {record: results.file_of(ROOT / "benchmarks" / "results", "small", record) for record in RECORDS}
    return {record: results.read(file) for record, file in files.items() if file.is_file()}


def weights_alone(development: Results) -> str:
    """Every method at its default and at the best point of its grid, the best default average first."""
    default, tuned = development.group("default"), development.group("tuned")
    trained = development.group("models")
    # A trained model or a method without a grid has one figure.
    names = {name: (trained[name], None) for name in ("mix-uniform", "helpful", "base")}
    names |= {name: (row, tuned.get(name)) for name, row in default.items() if name in methods.names()}
    means = {name: interval(development.values(row, "average")).mean for name, (row, _) in names.items()}
    heads = ["merge", *(f"{column}, {which}" for which in ("default", "tuned") for column in COLUMNS)]
    lines = [_line(heads), _line(["---", *["---:"] * (2 * len(COLUMNS))])]
    for name in sorted(names, key=lambda name: -means[name]):
        cells = [_mean(development, row, column) for row in names[name] for column in COLUMNS]
        lines.append(_line([_title(name), *cells]))
    return f"{tables.about(development)}\n\n" + "\n".join(lines)


def written(page: str, records: Mapping[RecordName, Results]) -> str:
    """The page with these records' tables between its marks."""
    parts = {
        "weights-alone": weights_alone(records["development"]),
        "calibrated": tables.all_tables(records)["calibrated-confirmation"],
    }
    for name, table in parts.items():
        mark = f"<!-- benchmarks.quality.guide: {name} -->"
        page, count = re.subn(f"{mark}.*?<!-- end -->", lambda _: f"{mark}\n{table}\n<!-- end -->", page, flags=re.S)  # noqa: B023
        if count != 1:
            raise ValueError(f"{PAGE}: has {mark} {count} times, need it once")
    return page


def _mean(development: Results, row: str | None, column: str) -> str:
    return "–" if row is None else f"{interval(development.values(row, column)).mean:.1f}"


def _title(name: str) -> str:
    described = {"mix-uniform": "*one model trained on all data*", "helpful": "*the helpful expert*", "base": "*base*"}
    return described.get(name) or methods.get(name).title


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    write_aside(PAGE, written(PAGE.read_text(), published()))
