"""The benchmark's tables in Markdown; `make quality` writes them into benchmarks/results/quality.md.

They come from the records alone. What the figures mean is written by hand, in docs/quality.md
and docs/quality_prompts.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.quality.calibrated import REFERENCE
from benchmarks.quality.comparison import Comparison, Interval, compare, exceeds, holm, interval, standard_error
from benchmarks.quality.hypotheses import CALIBRATED, HYPOTHESES
from benchmarks.quality.records import RecordName
from benchmarks.quality.results import COLUMNS, Results
from benchmarks.quality.world import KINDS_OF
from benchmarks.records import write_aside
from resm_kernels import methods

_HEADS = {
    "models": "model",
    "default": "method, defaults",
    "tuned": "method, tuned",
    REFERENCE: "model",
    "calibrated:fresh": "calibration",
    "searched": "merge",
}


def score_table(results: Results, groups: Sequence[str]) -> str:
    """One row per model: mean ± half the 95 % interval of every column; the best mean of a column is bold."""
    rows = [(group, name, row) for group in groups for name, row in results.group(group).items()]
    cells = {row: [interval(results.values(row, column)) for column in COLUMNS] for _, _, row in rows}
    best = [max(values[i].mean for values in cells.values()) for i in range(len(COLUMNS))]
    last = _LAST_COLUMNS.get(groups[-1].partition(":")[0])
    lines = [_line([_HEADS.get(groups[0], "RESM"), *COLUMNS, *([last.head] if last else [])])]
    lines.append(_line(["---", *["---:"] * len(COLUMNS), *([last.rule] if last else [])]))
    for _, name, row in rows:
        shown = [_interval(v, bold=v.mean == top) for v, top in zip(cells[row], best, strict=True)]
        lines.append(_line([_title(name), *shown, *([last.cell(results, row)] if last else [])]))
    return "\n".join(lines)


class _LastColumn(NamedTuple):
    """What a table has behind the scores: its head, the rule below, and each row's cell."""

    head: str
    rule: str
    cell: Callable[[Results, str], str]


def margins(results: Results, ours: str, theirs: str) -> list[float]:
    """Of each seed: the standard error of the difference of two averages, as if other questions were asked of each."""
    errors_of_differences = []
    for i, questions in enumerate(results.questions):
        errors = [standard_error(results.rows[row][i], questions["test"], KINDS_OF) for row in (ours, theirs)]
        errors_of_differences.append(math.hypot(*errors))
    return errors_of_differences


def comparisons(results: Results, ours: str, rows: Iterable[str]) -> dict[str, tuple[Comparison, float]]:
    """Our row's average against others', with p corrected for all of them."""
    differences = {
        row: compare(results.values(ours, "average"), results.values(row, "average"), margins(results, ours, row))
        for row in rows
        if row != ours
    }
    corrected = holm([c.p for c in differences.values()])
    return {row: (c, p) for (row, c), p in zip(differences.items(), corrected, strict=True)}


def resm_table(results: Results, group: str) -> str:
    """RESM of one group against all of it, and against the models that were trained."""
    rows = [*results.group(group).values(), *results.group("models").values()]
    return comparison_table(results, f"RESM ({group})", f"{group}/resm", rows)


def comparison_table(results: Results, name: str, ours: str, rows: Iterable[str]) -> str:
    """One row against others, the hardest rival first."""
    compared = comparisons(results, ours, rows)
    lines = [_line([f"{name} against", "Δ average", "win/tie/loss", "p", "Δ worst"])]
    lines.append(_line(["---", *["---:"] * 4]))
    for row, (c, p) in sorted(compared.items(), key=lambda item: item[1][0].difference.mean):
        worst = interval(_differences(results, ours, row, "worst"))
        counts = f"{c.wins}/{c.ties}/{c.losses}"
        lines.append(_line([_title(row.split("/", 1)[1]), _signed(c.difference), counts, _p(p), _signed(worst)]))
    return "\n".join(lines)


def hypothesis_table(results: Sequence[Results]) -> str:
    """Every hypothesis on every record: the difference of averages, and p corrected for all of that record."""
    heads = ["claim"]
    columns = []
    for record in results:
        heads += [f"Δ average, {_seeds(record)}", "win/tie/loss", "p"]
        compared = []
        for h in HYPOTHESES:
            ours, theirs = record.values(h.better, "average"), record.values(h.worse, "average")
            compared.append(compare(ours, theirs, margins(record, h.better, h.worse)))
        columns.append(list(zip(compared, holm([c.p for c in compared]), strict=True)))
    lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
    for i, h in enumerate(HYPOTHESES):
        cells = [h.claim]
        for column in columns:
            c, p = column[i]
            cells += [_signed(c.difference), f"{c.wins}/{c.ties}/{c.losses}", _p(p)]
        lines.append(_line(cells))
    return "\n".join(lines)


def claim_table(results: Sequence[Results]) -> str:
    """Every claim about calibrated merges on every record: the difference in its column, and p of its margin.

    p is one-sided, and corrected for all claims of that record.
    """
    heads = ["claim", "column", "margin"]
    columns = []
    for record in results:
        heads += [f"Δ, {_seeds(record)}", "seeds beyond the margin", "p"]
        tested = []
        for h in CALIBRATED:
            assert h.margin is not None, h.claim
            tested.append(exceeds(record.values(h.better, h.column), record.values(h.worse, h.column), h.margin))
        columns.append(list(zip(tested, holm([t.p for t in tested]), strict=True)))
    lines = [_line(heads), _line(["---", "---", *["---:"] * (len(heads) - 2)])]
    for i, h in enumerate(CALIBRATED):
        cells = [h.claim, h.column, f"{h.margin:+g}"]
        for record, column in zip(results, columns, strict=True):
            test, p = column[i]
            cells += [_signed(test.difference), f"{test.above} of {len(record.seeds)}", _p(p)]
        lines.append(_line(cells))
    return "\n".join(lines)


TITLES: Final = {
    "default": "Defaults",
    "tuned": "Tuned on validation",
    "resm-default": "RESM against each method, at defaults",
    "resm-tuned": "RESM against each method, tuned",
    "ablation-ingredients": "RESM's ingredients",
    "ablation-vocabulary": "Embeddings: merged as any matrix, or averaged",
    "ablation-weights": "Rules for the experts' weights",
    "ablation-ranks": "Rules for ranks, with equal weights",
    "ablation-decompositions": "Exact and approximate subspaces, with β = 1",
    "ablation-scale": "Rules for λ",
    "ablation-experts": "Other numbers and kinds of experts",
    "hypotheses": "Fresh seeds",
    "calibrated-trained": "Calibrated merges",
    "calibrated-fresh": "Calibrated merges, fresh prompts",
    "calibrated-against": "Calibrated merges against others",
    "calibrated-confirmation": "Calibrated merges, fresh seeds",
    "calibrated-claims": "Calibrated merges, claims",
    "searched": "Merges whose parameters are searched for",
}
"""The heading of each table."""


def all_tables(records: Mapping[RecordName, Results]) -> dict[str, str]:
    """Every table of these records, by its name."""
    tables: dict[str, str] = {}
    if "development" in records:
        tables |= merge_tables(records["development"], records.get("confirmation"))
    if "calibrated" in records:
        tables |= calibrated_tables(records["calibrated"], records.get("calibrated-confirmation"))
    if "searched" in records:
        searched = records["searched"]
        tables["searched"] = f"{about(searched)}\n\n{score_table(searched, ['searched'])}"
    return tables


def calibrated_tables(development: Results, confirmation: Results | None) -> dict[str, str]:
    """Calibrated merges by the draw of their prompts, the claims' rows against all that is no calibration, claims."""
    tables = {
        "calibrated-trained": f"{about(development)}\n\n{score_table(development, [REFERENCE, 'calibrated:trained'])}",
        "calibrated-fresh": score_table(development, ["calibrated:fresh"]),
    }
    fresh = [confirmation] if confirmation else []
    newest = confirmation or development
    against = [
        comparison_table(newest, f"{row.split('/', 1)[1]}, {_seeds(newest)},", row, newest.group(REFERENCE).values())
        for row in dict.fromkeys(h.better for h in CALIBRATED)
    ]
    tables["calibrated-against"] = "\n\n".join(against)
    for results in fresh:
        groups = [REFERENCE, "calibrated:trained", "calibrated:fresh"]
        tables["calibrated-confirmation"] = f"{about(results)}\n\n{score_table(results, groups)}"
    tables["calibrated-claims"] = claim_table([development, *fresh])
    return tables


def merge_tables(development: Results, confirmation: Results | None) -> dict[str, str]:
    """Everything about merges that see weights alone."""
    groups = dict.fromkeys(row.split("/", 1)[0] for row in development.rows if row.startswith("ablation:"))
    return {
        "default": score_table(development, ["models", "default"]),
        "tuned": score_table(development, ["tuned"]),
        "resm-default": resm_table(development, "default"),
        "resm-tuned": resm_table(development, "tuned"),
        **{group.replace(":", "-"): score_table(development, [group]) for group in groups},
        "hypotheses": hypothesis_table([development, *([confirmation] if confirmation else [])]),
    }


def about(results: Results) -> str:
    """One sentence that says how the record was made."""
    seconds = [round(sum(by_phase.values())) for by_phase in results.seconds]
    counts = [sum(questions["test"].values()) for questions in results.questions]
    return (
        f"Measured with resm-kernels {results.version}: {len(results.seeds)} seeds "
        f"({', '.join(map(str, results.seeds))}), size {results.size}; {_range(counts)} test questions a seed; "
        f"merging and asking took {_range(seconds)} processor seconds a seed."
    )


def write(file: Path, records: Mapping[RecordName, Results]) -> None:
    """Write all tables of these records into one Markdown file."""
    sections = [f"## {TITLES[name]}\n\n{table}" for name, table in all_tables(records).items()]
    head = (
        "# Tables of the 3H benchmark\n\n"
        "`make quality` writes this file from the records beside it, quality.json and quality_*.json; do not edit it. "
        "[docs/quality.md](../../docs/quality.md) and, for calibrated merges, "
        "[docs/quality_prompts.md](../../docs/quality_prompts.md) explain the columns and what follows from "
        "the figures.\n\n"
    )
    said = [about(records["development"])] if "development" in records else []
    write_aside(file, head + "\n\n".join([*said, *sections]) + "\n")


def _differences(results: Results, ours: str, theirs: str, column: str) -> list[float]:
    return [a - b for a, b in zip(results.values(ours, column), results.values(theirs, column), strict=True)]


def _most_often(results: Results, row: str) -> str:
    if row not in results.chosen:
        return "has no grid"
    choice, times = Counter(results.chosen[row]).most_common(1)[0]
    return f"{choice} ({times} of {len(results.seeds)})"


def _seconds(results: Results, row: str) -> str:
    return f"{interval(results.costs[row]).mean:.1f}" if row in results.costs else "–"


_LAST_COLUMNS: Final = {
    "tuned": _LastColumn("chosen most often", "---", _most_often),
    "calibrated": _LastColumn("seconds", "---:", _seconds),
    "searched": _LastColumn("chosen most often", "---", _most_often),
}
"""By the first part of a group's name."""


def _seeds(results: Results) -> str:
    seeds = results.seeds
    return f"seeds {seeds[0]}–{seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"


def _title(name: str) -> str:
    return methods.get(name).title if name in methods.names() else name


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(value: Interval, bold: bool) -> str:
    mean = f"**{value.mean:.1f}**" if bold else f"{value.mean:.1f}"
    return mean if math.isnan(value.half) else f"{mean} ± {value.half:.1f}"


def _signed(value: Interval) -> str:
    return f"{value.mean:+.1f}" if math.isnan(value.half) else f"{value.mean:+.1f} ± {value.half:.1f}"


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least} to {most}"
