"""The page of a report: valid, self-contained, small, and free of whatever hostile names try to put into it."""

from __future__ import annotations

import html.parser
import importlib
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reports

from resm_kernels.report import Report, ReportWarning
from resm_kernels.report.page import PageError, check_page, page, short_names, write_page

for _module in ("jinja2", "vl_convert"):
    pytest.importorskip(_module, reason="a report's page needs the extra `report`")

VOID = {"meta", "link", "input", "wbr", "br", "hr", "img"}
LOADS = {"src", "href", "srcset", "action", "poster", "data", "formaction", "background"}


class Elements(html.parser.HTMLParser):
    """All elements of a page with their attributes and texts; it asserts that every element is closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def large() -> tuple[Report, str]:
    report = reports.report(32)
    return report, page(report)


def data_of(elements: Elements) -> Any:
    return next(json.loads(text) for text in elements.texts["script"] if text.startswith("{"))


def test_is_valid_self_contained_and_small(large: tuple[Report, str]) -> None:
    report, text = large
    elements = Elements(text)
    assert len(text.encode()) < 3e6
    assert len(report.cells) == 32 * 9 + 3 and sum(cell.spectra is not None for cell in report.cells) == 32 * 7 - 1
    for tag, attributes in elements.found:
        for name in LOADS & attributes.keys():
            assert re.match(r"#|data:,$", attributes[name] or "#"), (tag, name, attributes[name])
        assert not [name for name in attributes if name.startswith("on")]
    style = "".join(elements.texts["style"])
    assert "url(" not in style and "@import" not in style
    ids = [a["id"] for _, a in elements.found if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in elements.found:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) is None or attributes[name] in ids


def test_policy_allows_the_pages_own_scripts_alone(large: tuple[Report, str]) -> None:
    policy = next(a["content"] for a in Elements(large[1]).all("meta") if "http-equiv" in a)
    assert policy and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.count("'sha256-") == 3 and "unsafe-eval" not in policy and "http" not in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]


def test_every_cell_is_reachable(large: tuple[Report, str]) -> None:
    report, text = large
    elements = Elements(text)
    cells = [a for a in elements.all("td") if a.get("role") == "gridcell"]
    expected = {f"c-{report.rows.index(c.row)}-{report.columns.index(c.column)}" for c in report.cells}
    assert {a["id"] for a in cells} == expected and len(cells) == len(expected)
    assert all(a["tabindex"] == "-1" for a in cells)  # the script gives one of them the way in by Tab
    links = {a["data-cell"] for a in elements.all("a") if "data-cell" in a}
    assert links == {f"c-{report.rows.index(r)}-{report.columns.index(c)}" for w in report.warnings for r, c in w.cells}


def test_says_what_a_report_says(large: tuple[Report, str]) -> None:
    report, text = large
    words = " ".join(part for name, parts in Elements(text).texts.items() if name != "script" for part in parts)
    said = [report.title, report.method, report.base, report.out, *report.experts, report.version, *report.machine]
    said += [part for w in report.warnings for part in (w.severity, w.kind, w.text, w.todo)]
    said += [line for line in report.recipe.splitlines() if line] + [stage.name for stage in report.stages or []]
    said += [measure.title for measure in report.measures] + ["5.4 GB", "412.50", "1 error, 1 warning, 1 note"]
    assert [part for part in said if part is None or part not in words] == []
    assert words.index(report.warnings[0].text) < words.index(report.recipe.splitlines()[1])


def test_numbers_are_those_of_the_report_to_four_digits(large: tuple[Report, str]) -> None:
    report, text = large
    data = data_of(Elements(text))
    assert data["rows"] == report.rows and data["columns"] == report.columns
    for cell, shown in zip(report.cells, data["cells"], strict=True):
        assert shown["tensors"] == cell.tensors and shown["problem"] == cell.problem
        assert shown["values"].keys() == cell.values.keys()
        for key, value in cell.values.items():
            numbers = value if isinstance(value, list) else [value]
            written = shown["values"][key] if isinstance(value, list) else [shown["values"][key]]
            assert written == [None if n is None else pytest.approx(n, rel=5e-4) for n in numbers]


def test_hostile_names_stay_text() -> None:
    report = reports.hostile()
    text = page(report)
    elements = Elements(text)
    assert not elements.all("img") and text.count("<script") == 4
    assert "\u2028" not in "".join(elements.texts["script"])
    assert "<!--" not in text  # within a script it would swallow the end tag
    data = data_of(elements)
    assert data["experts"][0] == data["cells"][0]["tensors"][0] == data["measures"][0]["help"] == reports.HOSTILE
    assert reports.HOSTILE in elements.texts["h1"] and "{{ 7*7 }}" in elements.texts["title"][0]
    assert "49" not in elements.texts["title"][0]


def test_controls_are_spelled_out() -> None:
    """A name must not turn round the sentence that it stands in, nor look like another name."""
    name = "a\u202eb\u2066\x1b"
    report = reports.report(1, [name], warnings=[ReportWarning("note", name, f"{name} is odd.", "Rename it.")])
    elements = Elements(page(replace(report, recipe=f"# {name}\n")))
    words = "".join(part for tag, parts in elements.texts.items() if tag != "script" for part in parts)
    assert not {"\u202e", "\u2066", "\x1b"} & {*words}
    assert "a\\u202eb\\u2066\\u001b is odd." in words and "# a\\u202eb" in words
    assert data_of(elements)["experts"] == ["a\\u202eb\\u2066\\u001b"]


def test_a_report_on_a_recipe_says_that_nothing_ran(tmp_path: Path) -> None:
    report = reports.report(1, warnings=[])
    bare = replace(report, out=None, base=None, stages=None, memory=None, machine={})
    file = tmp_path / "merge.html"
    file.write_text("the page before")
    write_page(bare, file)
    words = file.read_text()
    assert (
        "No run is recorded" in words
        and "Nothing was found" in words
        and "A recipe that merges 3 experts with" in words
    )
    assert [path.name for path in tmp_path.iterdir()] == ["merge.html"]


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("run `resm-kernels verify`.", "run <code>resm-kernels verify</code>."),
        ("`<b>` and `a", "`&lt;b&gt;` and `a"),
        ("`<b>`", "<code>&lt;b&gt;</code>"),
    ],
)
def test_commands_in_warnings_are_code(text: str, html: str) -> None:
    assert f"<p>{html}</p>" in page(reports.report(1, warnings=[ReportWarning("note", "kind", text, "")]))


def test_names_that_are_no_unicode_are_shown(tmp_path: Path) -> None:
    report = reports.report(1, ["models/\udcff"])
    write_page(report, tmp_path / "merge.html")
    assert "models/\\udcff" in (tmp_path / "merge.html").read_text("utf-8")


@pytest.mark.parametrize("library", ["jinja2", "vl_convert"])
def test_says_what_is_not_installed(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name) if name == library else ImportError

    monkeypatch.setattr(importlib, "import_module", lambda name: absent(name) if name == library else None)
    with pytest.raises(PageError, match=rf"needs {library}, .*pip install 'resm-kernels\[report\]'"):
        check_page(tmp_path / "merge.html")


def test_refuses_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PageError, match=r"--out: got .*, which is a folder; need the name of a file"):
        check_page(tmp_path)
    with pytest.raises(PageError, match="need a file in an existing folder"):
        check_page(tmp_path / "none" / "merge.html")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(PageError, match="need a file in a folder that may be written"):
        check_page(tmp_path / "merge.html")


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["lab/one", "lab/two"], ["one", "two"]),
        (["a/final", "b/final"], ["a/final", "b/final"]),
        (["./a/final/", "/b/final"], ["a/final", "b/final"]),
        (["lab/one", "lab/one"], ["one", "one (2)"]),
        (["lab/" + "a" * 40 + end for end in "12"], ["aaaaaaaa…" + "a" * 16 + end for end in "12"]),
        (["1" + "a" * 40, "a" * 9 + "1" + "a" * 40, "a" * 51], ["1" + "a" * 40, "a" * 9 + "1" + "a" * 40, "a" * 51]),
        ([".", ".."], [".", ".."]),
        ([], []),
    ],
)
def test_short_names_differ(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


def test_libraries_that_are_embedded_have_their_licences() -> None:
    text = page(reports.report(1))
    for words in (
        "Interactive Data Lab",
        "Mike Bostock",
        "Redistributions in binary form",
        "Cynthia Brewer",
        "Ariya Hidayat",
    ):
        assert words in text


def lightness(colour: str) -> float:
    """L* of a colour, such as #1f5f8b, in CIELAB."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


@pytest.mark.parametrize(("name", "turns"), [("low", 0), ("side", 1)])
def test_colours_of_values_get_lighter_or_darker_in_even_steps(name: str, turns: int) -> None:
    """So their order shows without any hue: to the colour-blind, and in print."""
    style = "".join(Elements(page(reports.report(1))).texts["style"])
    ramps = re.findall(rf"--{name}-\d: light-dark\((#\w{{6}}), (#\w{{6}})\)", style)
    assert len(ramps) == 5
    for scheme in zip(*ramps, strict=True):
        steps = [after - before for before, after in itertools.pairwise(map(lightness, scheme))]
        sizes = [abs(step) for step in steps]
        assert max(sizes) < 1.6 * min(sizes), sizes
        assert sum(before * after < 0 for before, after in itertools.pairwise(steps)) == turns
