"""Draws a report as one HTML file that needs no network: heat maps as tables, and curves by Vega-Lite.

This needs the extra `report`: jinja2 fills the template, and vl-convert-python brings the JavaScript of Vega and
Vega-Lite, which is embedded. Names and texts of a report may come from anywhere. They reach the page through jinja2's
escaping or as JSON without `<`, and the page allows only its own scripts, by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import os
import re
from collections import Counter
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from resm_kernels.checkpoint import format_bytes
from resm_kernels.checkpoint.durable import write_errors_named, write_whole
from resm_kernels.files import path_problem
from resm_kernels.report.data import Report

_ASSETS: Final = Path(__file__).parent / "assets"
_SCRIPTS: Final = ("charts.js", "page.js")
_SYMBOLS: Final = {"error": "✕", "warning": "▲", "note": "●"}
_MOST_LINKS: Final = 8
"""The most places of a warning that are shown at once; a click shows the others."""
_BESIDE: Final = 6
"""The most warnings that stand in one column, beside the recipe."""
_LABEL: Final = 26
"""The most characters of an expert's name in a heading or a legend; the page's head has all of it."""
_DIGITS: Final = 4
"""Significant digits of the numbers in the page: more than anything shows, and a third of their size as JSON."""
_EMPTY_PARTS: Final = ("", ".", "..")
_CONTROLS: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that show nothing themselves; those of writing direction would turn round the text beside a name."""


class PageError(ValueError):
    """A page cannot be made; the message names the cause and the need."""


def check_page(file: Path) -> None:
    """Raise PageError unless `write_page` can write to `file`; call it before the long work that the page shows."""
    _library("jinja2")
    _library("vl_convert")
    check_target("--out", file)


def check_target(option: str, file: Path) -> None:
    """Raise PageError, with the option's name, unless a file can be written there."""
    if str(file) == "-":
        raise PageError(f"{option}: got -, need the name of a file")
    if problem := path_problem(str(file)):
        raise PageError(f"{option}: {problem}")
    folder = file.absolute().parent
    if file.is_dir():
        raise PageError(f"{option}: got {file}, which is a folder; need the name of a file")
    if file.exists() and not file.is_file():
        # A pipe or a device, such as /dev/null, must not be replaced by a file of its name.
        raise PageError(f"{option}: got {file}, which is no regular file; need the name of a file")
    if not folder.is_dir():
        raise PageError(f"{option}: got {file}, need a file in an existing folder; {folder} is none")
    if not os.access(folder, os.W_OK):
        raise PageError(f"{option}: got {file}, need a file in a folder that may be written; {folder} may not")


def write_page(report: Report, file: Path) -> None:
    """Write a report's page; it appears when it is whole, and replaces a file of that name.

    Raises:
        PageError: As for `check_page`.
        CheckpointError: The file cannot be written, because the disk is full, for example.
    """
    check_page(file)
    text = page(report)
    with write_errors_named(file):
        write_whole(file, as_bytes(text))


def as_bytes(text: str) -> bytes:
    """Return a text as UTF-8.

    A file's name may hold bytes that are no UTF-8. Python keeps them as lone surrogates, which no file can hold and
    which are spelled out here.
    """
    return text.encode("utf-8", "backslashreplace")


def page(report: Report) -> str:
    """Return a report as a page.

    Raises:
        PageError: The extra `report` is not installed.
    """
    report = _spelled_out(report)
    jinja2 = _library("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    ids = {
        (cell.row, cell.column): f"c-{report.rows.index(cell.row)}-{report.columns.index(cell.column)}"
        for cell in report.cells
    }
    environment.filters["bytes"] = format_bytes
    environment.filters["breakable"] = _breakable
    environment.filters["with_code"] = _with_code
    environment.filters["cell_link"] = lambda cell: {"id": ids[tuple(cell)], "label": _place(*cell)}
    scripts = [_plotting_library(), *((_ASSETS / name).read_text("utf-8") for name in _SCRIPTS)]
    labels = short_names(report.experts)
    return str(
        environment.get_template("page.html").render(
            report=report,
            labels=labels,
            ids=ids,
            counts=describe_warnings(report),
            symbols=_SYMBOLS,
            most_links=_MOST_LINKS,
            beside=_BESIDE,
            longest=max((stage.seconds for stage in report.stages or ()), default=0) or 1,
            data=_data(report, labels),
            css=(_ASSETS / "page.css").read_text("utf-8"),
            licenses=(_ASSETS / "licenses.txt").read_text("utf-8"),
            scripts=scripts,
            script_sources=" ".join(_hash(script) for script in scripts),
        )
    )


def describe_warnings(report: Report) -> str:
    """Return how many warnings of each severity there are, such as `1 error, 2 notes`; empty if there are none."""
    counts: Counter[str] = Counter(warning.severity for warning in report.warnings)
    return ", ".join(f"{counts[s]} {s}{'s' if counts[s] > 1 else ''}" for s in _SYMBOLS if counts[s])


def short_names(names: list[str]) -> list[str]:
    """Return a short name for each: the last part of a path or of a name on the hub. No two of them are the same.

    If the last parts are, all have more parts, and a model that is named twice has numbers. A long name loses its
    middle if that leaves it different from the others.
    """
    parts = [[part for part in PurePosixPath(name).parts if part not in _EMPTY_PARTS] or [name] for name in names]
    for count in range(1, max(map(len, parts), default=1) + 1):
        short = ["/".join(part[-count:]) for part in parts]
        for candidates in ([_without_middle(name) for name in short], short):
            if len(set(candidates)) == len(set(names)):
                return _numbered(candidates)
    return _numbered(names)


def _numbered(names: list[str]) -> list[str]:
    """Return names with a number after each that was there before."""
    before = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, before, strict=True)]


def _without_middle(name: str) -> str:
    return name if len(name) <= _LABEL else f"{name[: _LABEL // 3]}…{name[-(2 * _LABEL // 3) :]}"


def _data(report: Report, labels: list[str]) -> dict[str, Any]:
    """Return what the page's own script needs of a report."""
    fields = ("experts", "rows", "columns", "measures", "cells")
    everything = asdict(report)
    return {"labels": labels, **{name: _rounded(everything[name]) for name in fields}}


def _spelled_out(data: Any) -> Any:
    """Return a report, or a part of one, in whose texts characters of `_CONTROLS` are spelled out."""
    if isinstance(data, str):
        return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", data)
    if isinstance(data, (list, tuple)):
        # Most of a report's parts are numbers, in lists.
        return type(data)(part if isinstance(part, float) else _spelled_out(part) for part in data)
    if isinstance(data, dict):
        return {_spelled_out(key): _spelled_out(value) for key, value in data.items()}
    if is_dataclass(data) and not isinstance(data, type):
        return replace(data, **{name: _spelled_out(value) for name, value in vars(data).items()})
    return data


def _rounded(data: Any) -> Any:
    if isinstance(data, float):
        return float(f"{data:.{_DIGITS}g}")
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    return [_rounded(value) for value in data] if isinstance(data, (list, tuple)) else data


def _place(row: str, column: str) -> str:
    return f"layer {row}, {column}" if row.isdigit() else f"{row}, {column}"


def _breakable(name: str) -> Any:
    """Return a name as HTML that may break after underscores and dots."""
    markup = _library("markupsafe")
    escaped = markup.escape(name)
    for mark in "_.":
        escaped = escaped.replace(mark, markup.Markup(f"{mark}<wbr>"))
    return escaped


def _with_code(text: str) -> Any:
    """Return a text as HTML in which what stands between backticks is code."""
    markup = _library("markupsafe")
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick without another: names may have one
        return markup.escape(text)
    return markup.Markup("").join(
        markup.Markup("<code>{}</code>").format(part) if i % 2 else markup.escape(part) for i, part in enumerate(parts)
    )


def _hash(script: str) -> str:
    """Return the source of a script in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@functools.cache
def _plotting_library() -> str:
    """Return the JavaScript of Vega, Vega-Lite and Vega-Embed; it takes a second to make."""
    return str(_library("vl_convert").javascript_bundle())


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise PageError(
            f"report: a page needs {name}, which is not installed; install it with `pip install 'resm-kernels[report]'`"
        ) from error
