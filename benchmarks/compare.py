"""Which figures have become worse between two states of the records, by more than noise.

    python -m benchmarks.compare HEAD~3 benchmarks/results
    python -m benchmarks.compare before/elementwise.json benchmarks/results/elementwise.json --all

A and B are record files, folders of records, or git revisions, which stand for their benchmarks/results. A figure's
noise is how far its repetitions within a run lay apart (of four and more, their quartiles), at least 5 %; where there
was one only, it is 15 % of times and ratios, 5 % of memory and errors, 2 % of scores and shares. A figure is worse or
better where it changed by more than the noise of both, √(a² + b²).

Records of different machines, or that do not name theirs, need --across-machines; then times and memory are left out,
and ratios, errors and scores are compared. Exit status: 0 no figure is worse, 1 some are, 2 nothing can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.figures import OF_A_MACHINE, Figure, figures_of, reader_of
from benchmarks.records import PROVENANCE, RESULTS, ROOT, git

Record = dict[str, Any]
Verdict = Literal["worse", "better", "same"]
SAME_MACHINE: Final = ("cpu", "isa", "cores", "threads", "gpu")
"""Facts that two runs share if their times compare."""


class Incomparable(Exception):
    """Why nothing can be compared."""


@dataclass(frozen=True)
class Change:
    """A figure before and after."""

    record: str
    before: Figure
    after: Figure

    @property
    def noise(self) -> float:
        return math.hypot(self.before.noise, self.after.noise)

    @property
    def gain(self) -> float:
        """By how much it is better, as a share of the smaller of both; negative if it is worse, ±inf against 0."""
        old, new = self.before.value, self.after.value
        if old == new:
            return 0.0
        better = (new > old) == self.after.higher_is_better
        low, high = sorted((abs(old), abs(new)))
        size = (high - low) / low if low else math.inf
        return size if better else -size

    @property
    def verdict(self) -> Verdict:
        if abs(self.gain) <= self.noise:
            return "same"
        return "better" if self.gain > 0 else "worse"


def read(place: str) -> dict[str, Record]:
    """Records by name, of a file, a folder, or a git revision.

    Raises:
        Incomparable: There is nothing of that kind, or no record in it, or one that is no JSON object.
    """
    path = Path(place)
    if path.is_dir():
        texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(path.glob("*.json"))}
    elif path.is_file():
        texts = {path.stem: path.read_text(encoding="utf-8")}
    else:
        folder = RESULTS.relative_to(ROOT).as_posix()
        listed = git(ROOT, "ls-tree", "--name-only", place, "--", f"{folder}/")
        if listed is None:
            raise Incomparable(f"{place}: neither a file, nor a folder, nor a revision that git knows")
        files = [Path(line) for line in listed.splitlines() if line.endswith(".json")]
        texts = {file.stem: git(ROOT, "show", f"{place}:{file.as_posix()}") or "" for file in files}
    texts = {name: text for name, text in texts.items() if reader_of(name) is not None}
    if not texts:
        raise Incomparable(f"{place}: no record there")
    return {name: _parsed(f"{place}: {name}", text) for name, text in texts.items()}


def _parsed(where: str, text: str) -> Record:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise Incomparable(f"{where}: no JSON: {error}") from error
    if not isinstance(record, dict):
        raise Incomparable(f"{where}: a JSON object is needed")
    return record


def is_same_machine(a: Record, b: Record) -> bool:
    """Whether both records name the same machine."""
    facts = [record.get(PROVENANCE, {}).get("machine") for record in (a, b)]
    if not all(facts):
        return False
    one, other = ({key: machine.get(key) for key in SAME_MACHINE} for machine in facts)
    return one == other


def changes(before: Mapping[str, Record], after: Mapping[str, Record], across: bool) -> tuple[list[Change], list[str]]:
    """Every figure that both have, and a line for each record that could not be compared.

    Args:
        across: Compare records of different machines too, by what does not depend on a machine.
    """
    found, notes = [], []
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name], after[name]
        if not (same := is_same_machine(old, new)) and not across:
            notes.append(f"{name}: the machines differ or are not named; --across-machines compares ratios and errors")
            continue
        try:
            figures, others = figures_of(name, old), figures_of(name, new)
        except ValueError as error:
            notes.append(str(error))
            continue
        shared = [key for key in figures if key in others and (same or figures[key].unit not in OF_A_MACHINE)]
        found += [Change(name, figures[key], others[key]) for key in shared]
        if gone := len(figures.keys() - others.keys()):
            notes.append(f"{name}: {gone} figures are not there any more")
    return found, notes


def shown(figure: Figure) -> str:
    """The value with its unit."""
    value = figure.value
    if figure.unit == "s":
        return f"{value:.3g} s" if value >= 0.1 else f"{value * 1e3:.3g} ms"
    if figure.unit == "bytes":
        return f"{value / 1e9:.3g} GB"
    return f"{value:.3g}{'×' if figure.unit == '×' else ''}"


def show(console: Console, found: Sequence[Change], everything: bool) -> None:
    """Print what is worse, then what is better, then, if asked for, the rest."""
    table = Table("record", "figure", "before", "after", "change", "noise", "")
    for change in sorted(found, key=lambda c: (c.verdict != "worse", c.verdict != "better", c.gain)):
        if change.verdict == "same" and not everything:
            continue
        old, new = change.before.value, change.after.value
        moved = f"{(new - old) / abs(old):+.0%}" if old else "from 0"
        style = {"worse": "red", "better": "green", "same": ""}[change.verdict]
        table.add_row(
            change.record,
            Text(change.before.name),  # in which rich would take brackets for markup
            shown(change.before),
            shown(change.after),
            moved,
            f"{change.noise:.0%}",
            change.verdict,
            style=style,
        )
    if table.row_count:
        console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", help="before: a file, a folder, or a git revision")
    parser.add_argument("b", metavar="B", help="after")
    parser.add_argument("--across-machines", action="store_true", help="compare what does not depend on the machine")
    parser.add_argument("--all", action="store_true", help="show figures that are the same too")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        found, notes = changes(read(options.a), read(options.b), options.across_machines)
    except Incomparable as error:
        print(error, file=sys.stderr)
        return 2
    show(console, found, options.all)
    for note in notes:
        console.print(f"not compared: {note}", highlight=False)
    counts = {verdict: sum(c.verdict == verdict for c in found) for verdict in ("worse", "better", "same")}
    if not found:
        print(f"{options.a} and {options.b} have no figure in common that can be compared", file=sys.stderr)
        return 2
    console.print(f"{len(found)} figures: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    return 1 if counts["worse"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
