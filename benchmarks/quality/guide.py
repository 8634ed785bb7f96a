"""The tables of docs/which_method.md and docs/quality_prompts.md, written between marks from the published records.

    python -m benchmarks.quality.guide

`make quality` runs it. All other text of the pages is written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.quality import results, tables
from benchmarks.quality.comparison import interval
from benchmarks.quality.records import RECORDS, RecordName
from benchmarks.quality.results import Results
from benchmarks.records import write_aside
from resm_kernels import methods

ROOT: Final = Path(__file__).resolve().parents[2]
GUIDE: Final = ROOT / "docs" / "which_method.md"
PROMPTS: Final = ROOT / "docs" / "quality_prompts.md"
COLUMNS: Final = ("average", "worst")


def published(size: str = "small") -> dict[RecordName, Results]:
    """The records of models of one size that lie in benchmarks/results."""
    files = {record: results.file_of(ROOT / "benchmarks" / "results", size, record) for record in RECORDS}
    return {record: results.read(file) for record, file in files.items() if file.is_file()}


def weights_alone(development: Results) -> str:
    """Every method at its default and at the best point of its grid, the best default average first."""
    default, tuned = development.group("default"), development.group("tuned")
    trained = development.group("models")
    # A trained model or a method without a grid has one figure.
    names: dict[str, tuple[str, str | None]] = {
        name: (trained[name], None) for name in ("mix-uniform", "helpful", "base")
    }
    names |= {name: (row, tuned.get(name)) for name, row in default.items() if name in methods.names()}
    means = {name: interval(development.values(row, "average")).mean for name, (row, _) in names.items()}
    heads = ["merge", *(f"{column}, {which}" for which in ("default", "tuned") for column in COLUMNS)]
    lines = [_line(heads), _line(["---", *["---:"] * (2 * len(COLUMNS))])]
    for name in sorted(names, key=lambda name: -means[name]):
        cells = [_mean(development, row, column) for row in names[name] for column in COLUMNS]
        lines.append(_line([_title(name), *cells]))
    return f"{tables.about(development)}\n\n" + "\n".join(lines)


def larger_models(record: Results) -> str:
    """Every merge of a record of calibrated merges: means alone, because two seeds have no useful interval."""
    lines = [_line(["merge", *COLUMNS]), _line(["---", *["---:"] * len(COLUMNS)])]
    for row in record.rows:
        lines.append(_line([row.split("/", 1)[1], *(_mean(record, row, column) for column in COLUMNS)]))
    return f"{tables.about(record)}\n\n" + "\n".join(lines)


def pages() -> dict[Path, dict[str, str]]:
    """The tables of each page, by their marks."""
    small, medium = published(), published("medium")
    return {
        GUIDE: {
            "weights-alone": weights_alone(small["development"]),
            "searched": tables.all_tables(small)["searched"],
            "calibrated": tables.all_tables(small)["calibrated-confirmation"],
        },
        PROMPTS: {"larger": larger_models(medium["calibrated-confirmation"])},
    }


def written(page: str, parts: Mapping[str, str]) -> str:
    """The page with these tables between its marks."""
    for name, table in parts.items():
        mark = f"<!-- benchmarks.quality.guide: {name} -->"
        before, found, after = page.partition(mark)
        _, end, rest = after.partition("<!-- end -->")
        if not (found and end):
            raise ValueError(f"the page has no {mark} with an end; need one")
        page = f"{before}{mark}\n{table}\n{end}{rest}"
    return page


def _mean(development: Results, row: str | None, column: str) -> str:
    return "–" if row is None else f"{interval(development.values(row, column)).mean:.1f}"


def _title(name: str) -> str:
    described = {"mix-uniform": "*one model trained on all data*", "helpful": "*the helpful expert*", "base": "*base*"}
    return described.get(name) or methods.get(name).title


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for page, parts in pages().items():
        write_aside(page, written(page.read_text(), parts))
