"""Writes the tables of the documentation that are made from the library itself and from records of benchmarks.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. tests/test_docs_api.py compares what stands there with
what `python scripts/docs_tables.py` would write.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from resm_kernels import methods, ops
from resm_kernels.methods import REQUIRED, Method

ROOT: Final = Path(__file__).resolve().parent.parent
TABLE: Final = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def method_table() -> str:
    """Every method with its function, what it needs, and its parameters with their defaults."""
    rows = []
    for name in methods.names():
        method = methods.get(name)
        if not _function(method).__module__.startswith("resm_kernels."):
            continue  # a package of the user's
        rows.append([f"`{name}`", method.title, _link(method), _needs(method), _parameters(method)])
    return table(["name", "method", "function", "needs", "parameters and defaults"], rows)


def _function(method: Method) -> Callable[..., Any]:
    function = method.function
    return function.func if isinstance(function, functools.partial) else function


def _link(method: Method) -> str:
    function = _function(method)
    return f"[`{function.__name__}`][{function.__module__}.{function.__qualname__}]"


def _needs(method: Method) -> str:
    parts = ["base"] if method.needs_base else []
    if method.max_experts is not None:
        parts.append(f"{method.min_experts} expert" + "s" * (method.min_experts > 1))
    elif method.min_experts > 1:
        parts.append(f"{method.min_experts} experts or more")
    if method.statistics is not None:
        parts.append("Gram matrices" if method.statistics == "gram" else "Fisher informations")
    return ", ".join(parts)


def _parameters(method: Method) -> str:
    def default(value: Any) -> str:
        if value is REQUIRED:
            return "(required)"
        return json.dumps(value) if isinstance(value, (bool, type(None))) else f"{value}"

    return ", ".join(f"`{p.name}` {default(p.default)}" for p in method.parameters if not p.ignored)


def _record(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    return content


def record_table() -> str:
    """What `make bench` has recorded of each op: medians, and their ratios to the yardstick of the same run."""
    rows = _record("cpu")["benchmarks"]
    yardsticks = {row["group"]: _case(row) for row in rows if row["yardstick"]}
    lines = [
        [
            f"`{row['group']}`",
            _case(row),
            f"{row['median_ms']:.3g} ms",
            f"{row['ratio']:.2g} × {yardsticks[row['group']]}",
        ]
        for row in rows
        if row["group"] in ops.dispatch_table() and not row["yardstick"]
    ]
    return table(["op", "case", "median", "compared with"], sorted(lines, key=lambda line: line[0]))


def _case(row: dict[str, Any]) -> str:
    name, _, case = row["name"].removeprefix("bench_").removesuffix("]").partition("[")
    words = name.removeprefix(row["group"]).strip("_").replace("_", " ")
    return ", ".join(part for part in (words, case) if part) or "all"


def accuracy_table() -> str:
    """What an accuracy does to the merged task vectors and to the scores of the example's models."""
    rows = _record("accuracy")["records"]
    exact = {row["recipe"]: row["scores"] for row in rows if row["accuracy"] == 0}
    lines = []
    for row in rows:
        if row["accuracy"] == 0 or row["recipe"] not in ("resm", "tsvm"):
            continue
        same = exact[row["recipe"]]
        moved = max(abs(row["scores"][split][key] - same[split][key]) for split in same for key in same[split])
        lines.append([f"`{row['recipe']}`", f"{row['accuracy']:g}", f"{row['difference']:.2%}", f"{moved:.1f} points"])
    head = ["method", "`accuracy`", "the merged task vectors move by", "a score moves by at most"]
    return table(head, lines)


def rounding_table() -> str:
    """What rounding keeps of dense changes of normal weights, and how near scales are to the best of each block."""
    rows = _record("rounding")["records"]
    sizes = list(dict.fromkeys(row["steps"] for row in rows))
    lines = []
    for form in dict.fromkeys(row["format"] for row in rows):
        kept = {
            row["steps"]: row["kept"]
            for row in rows
            if (row["format"], row["base"], row["task vector"]) == (form, "normal", "dense")
        }
        worst = max(row["error to ideal"] for row in rows if row["format"] == form)
        lines.append([form, *(f"{kept[size]:.2f}" for size in sizes), f"{worst:.4f}"])
    head = [
        "format",
        *(f"kept at {size:g} step{'s' * (size != 1)}" for size in sizes),
        "error at most, the best scale's being 1",
    ]
    return table(head, lines)


def ray_table() -> str:
    """Times of a merge with workers and without, and what estimates were worth."""
    record = _record("ray")
    times = [[way, f"{statistics.median(seconds):.1f} s"] for way, seconds in record["seconds"].items()]
    times.append(["start of the cluster, which the others leave out", f"{record['start']:.1f} s"])
    return table(["RESM of a small Llama by", "time"], times)


def estimate_table() -> str:
    """How long merges took, and what `--dry-run` had estimated."""
    estimates = {name: e for name, e in _record("ray")["estimates"].items() if name != "machine"}
    lines = [
        [f"`{name}`", f"{e['estimated']:.2g} s", f"{e['measured']:.2g} s", f"{e['ratio']:.2f}"]
        for name, e in estimates.items()
    ]
    return table(["method", "estimate", "measured", "measured / estimate"], lines)


TABLES: Final[dict[str, tuple[str, Callable[[], str]]]] = {
    "methods": ("docs/api/methods.md", method_table),
    "ops": ("docs/kernels.md", record_table),
    "accuracy": ("docs/spectral.md", accuracy_table),
    "rounding": ("docs/recipes.md", rounding_table),
    "ray": ("docs/ray.md", ray_table),
    "estimates": ("docs/ray.md", estimate_table),
}
"""The page of each table, and what makes it."""


def written(text: str) -> str:
    """A page's text with its tables written anew."""
    return TABLE.sub(lambda m: m[1] + TABLES[m[2]][1]() + m[3], text)


def main() -> None:
    for page in {page for page, _ in TABLES.values()}:
        path = ROOT / page
        path.write_text(written(path.read_text()))


if __name__ == "__main__":
    main()
