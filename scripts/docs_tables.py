"""Writes the tables of the documentation that are made from the library itself and from records of benchmarks.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. tests/test_docs_api.py compares what stands there with
what `python scripts/docs_tables.py` would write.
"""

from __future__ import annotations

import functools
import json
import re
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


def record_table() -> str:
    """What `make bench` has recorded of each op: medians, and their ratios to the yardstick of the same run."""
    rows = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["benchmarks"]
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


TABLES: Final[dict[str, tuple[str, Callable[[], str]]]] = {
    "methods": ("docs/api/methods.md", method_table),
    "ops": ("docs/kernels.md", record_table),
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
