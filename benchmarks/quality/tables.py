"""The tables of docs/quality.md, in Markdown, between markers; the prose around them is written by hand."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from comparison import Comparison, Interval, compare, holm, interval, standard_error
from hypotheses import HYPOTHESES
from records import write_aside
from results import COLUMNS, Results
from world import KINDS_OF

from resm_kernels import methods

_HEADS = {"models": "model", "default": "method, defaults", "tuned": "method, tuned"}


def score_table(results: Results, groups: Sequence[str]) -> str:
    """One row per model: mean ± half the 95 % interval of every column; the best mean of a column is bold."""
    rows = [(group, name, row) for group in groups for name, row in results.group(group).items()]
    cells = {row: [interval(results.values(row, column)) for column in COLUMNS] for _, _, row in rows}
    best = [max(values[i].mean for values in cells.values()) for i in range(len(COLUMNS))]
    tuned = "tuned" in groups
    lines = [_line([_HEADS.get(groups[0], "RESM"), *COLUMNS, *(["chosen most often"] if tuned else [])])]
    lines.append(_line(["---", *["---:"] * len(COLUMNS), *(["---"] if tuned else [])]))
    for _, name, row in rows:
        shown = [_interval(v, bold=v.mean == top) for v, top in zip(cells[row], best, strict=True)]
        lines.append(_line([_title(name), *shown, *([_most_often(results, row)] if tuned else [])]))
    return "\n".join(lines)


def margins(results: Results, ours: str, theirs: str) -> list[float]:
    """Of each seed: the standard error of the difference of two averages, as if other questions were asked of each."""
    found = []
    for i, questions in enumerate(results.questions):
        errors = [standard_error(results.rows[row][i], questions["test"], KINDS_OF) for row in (ours, theirs)]
        found.append(math.hypot(*errors))
    return found


def comparisons(results: Results, ours: str, rows: Iterable[str]) -> dict[str, tuple[Comparison, float]]:
    """Our row's average against others', with p corrected for all of them."""
    found = {
        row: compare(results.values(ours, "average"), results.values(row, "average"), margins(results, ours, row))
        for row in rows
        if row != ours
    }
    corrected = holm([c.p for c in found.values()])
    return {row: (c, p) for (row, c), p in zip(found.items(), corrected, strict=True)}


def comparison_table(results: Results, group: str) -> str:
    """RESM of one group against all of it, and against the models that were trained."""
    ours = f"{group}/resm"
    rows = [*results.group(group).values(), *results.group("models").values()]
    found = comparisons(results, ours, rows)
    lines = [_line([f"RESM ({group}) against", "Δ average", "win/tie/loss", "p", "Δ worst"])]
    lines.append(_line(["---", *["---:"] * 4]))
    for row, (c, p) in sorted(found.items(), key=lambda item: item[1][0].difference.mean):
        worst = interval(_differences(results, ours, row, "worst"))
        counts = f"{c.wins}/{c.ties}/{c.losses}"
        lines.append(_line([_title(row.split("/", 1)[1]), _signed(c.difference), counts, _p(p), _signed(worst)]))
    return "\n".join(lines)


def hypothesis_table(results: Sequence[Results]) -> str:
    """Every hypothesis on every record: the difference of averages, and p corrected for all of that record."""
    heads = ["claim"]
    columns = []
    for own in results:
        seeds = f"seeds {own.seeds[0]}–{own.seeds[-1]}" if len(own.seeds) > 1 else f"seed {own.seeds[0]}"
        heads += [f"Δ average, {seeds}", "win/tie/loss", "p"]
        found = []
        for h in HYPOTHESES:
            ours, theirs = own.values(h.better, "average"), own.values(h.worse, "average")
            found.append(compare(ours, theirs, margins(own, h.better, h.worse)))
        columns.append(list(zip(found, holm([c.p for c in found]), strict=True)))
    lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
    for i, h in enumerate(HYPOTHESES):
        cells = [h.claim]
        for column in columns:
            c, p = column[i]
            cells += [_signed(c.difference), f"{c.wins}/{c.ties}/{c.losses}", _p(p)]
        lines.append(_line(cells))
    return "\n".join(lines)


def all_tables(development: Results, confirmation: Results | None) -> dict[str, str]:
    """Every table of the page by its marker."""
    groups = dict.fromkeys(row.split("/", 1)[0] for row in development.rows if row.startswith("ablation:"))
    found = {
        "default": score_table(development, ["models", "default"]),
        "tuned": score_table(development, ["tuned"]),
        "resm-default": comparison_table(development, "default"),
        "resm-tuned": comparison_table(development, "tuned"),
        **{group.replace(":", "-"): score_table(development, [group]) for group in groups},
        "hypotheses": hypothesis_table([development, *([confirmation] if confirmation else [])]),
    }
    about = f"{len(development.seeds)} seeds ({', '.join(map(str, development.seeds))}), size {development.size}"
    spent = [sum(seconds.values()) for seconds in development.seconds]
    counts = [sum(q["test"].values()) for q in development.questions]
    found["about"] = (
        f"Measured with resm-kernels {development.version}: {about}; {_range(counts)} test questions a seed; "
        f"merging and asking took {_range([round(s) for s in spent])} processor seconds a seed."
    )
    return found


def fill(page: Path, tables: dict[str, str]) -> None:
    """Put the tables between the page's markers, `<!-- table: NAME -->` and `<!-- end -->`; all must be there."""
    text = page.read_text()
    marked = re.findall(r"<!-- table: (\S+) -->", text)
    if sorted(marked) != sorted(tables):
        odd = sorted(set(marked) ^ set(tables)) or marked
        raise ValueError(f"{page}: tables and markers differ in {', '.join(odd)}; need one marker for each table")

    def put(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{tables[match[1]]}\n<!-- end -->"

    write_aside(page, re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", put, text, flags=re.DOTALL))


def _differences(results: Results, ours: str, theirs: str, column: str) -> list[float]:
    return [a - b for a, b in zip(results.values(ours, column), results.values(theirs, column), strict=True)]


def _most_often(results: Results, row: str) -> str:
    if row not in results.chosen:
        return "has no grid"
    choice, times = Counter(results.chosen[row]).most_common(1)[0]
    return f"{choice} ({times} of {len(results.seeds)})"


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
