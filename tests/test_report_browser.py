"""The page of a report in a browser: no errors, both schemes and widths, the keyboard, the panel of a cell."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reports

from resm_kernels.report import Report
from resm_kernels.report.measures import MEASURES
from resm_kernels.report.page import write_page

api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra `test`")
for _module in ("jinja2", "vl_convert"):
    pytest.importorskip(_module, reason="a report's page needs the extra `report`")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: install chromium (scripts/browser.sh)")

Open = Callable[..., Any]
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
MAKERS: dict[str, Callable[[], Report]] = {
    "small": lambda: reports.report(3),
    "worst": reports.worst,
    "hostile": reports.hostile,
}
EMPTY = replace(reports.report(1), cells=[], rows=[], columns=[], measures=[], warnings=[])
"""The report of a recipe whose models are all missing."""


def frozen() -> Report:
    """A report of a model with two stacks of layers, on adapters that change nothing in the second one."""
    whole = reports.report(3)
    cells = []
    for stack, cell in itertools.product(("text_decoder", "vision_tower"), whole.cells):
        row = f"{stack} {cell.row}" if cell.row.isdigit() else cell.row
        values, spectra = cell.values, cell.spectra
        if stack == "vision_tower" and row != cell.row and spectra is not None:
            values = {**values, "change": [0.0] * 3}
            spectra = replace(spectra, values=[[0.0] * len(own) for own in spectra.values])
        cells.append(replace(cell, row=row, values=values, spectra=spectra))
    cells = list({(cell.row, cell.column): cell for cell in cells}.values())
    rows = list(dict.fromkeys(cell.row for cell in cells))
    return replace(whole, rows=rows, cells=cells, warnings=[])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    written = {name: make() for name, make in MAKERS.items()} | {"empty": EMPTY, "frozen": frozen()}
    for name, report in written.items():
        write_page(report, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in written}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        # Containers, where tests run as root, give the browser no sandbox of its own.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, files: dict[str, Path]) -> Iterator[Open]:
    """`open_page(name, scheme)` opens a page. At the test's end, nothing was said, asked for or loaded."""
    said: list[str] = []
    contexts = []

    def start(name: str, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": WIDTHS[0], "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
        tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else said.append(r.url))
        tab.goto(files[name].as_uri())
        return tab

    yield start
    for context in contexts:
        context.close()
    assert said == []


def show(tab: Any, cell: str) -> None:
    tab.evaluate("delete document.getElementById('detail').dataset.drawn")
    tab.locator(f"#{cell}").click()
    tab.wait_for_selector(f"#detail[data-drawn={cell}]")


@pytest.mark.parametrize("name", MAKERS)
def test_fits_both_widths_in_both_schemes(open_page: Open, name: str) -> None:
    tab = open_page(name)
    cells = tab.locator("[role=gridcell]")
    cell = cells.nth(min(2, cells.count() - 1)).get_attribute("id")
    fits = "e => e.scrollWidth <= e.clientWidth"
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        for scheme in SCHEMES:
            tab.emulate_media(color_scheme=scheme)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            show(tab, cell)
            assert tab.evaluate(f"[...document.querySelectorAll('#detail, .chart')].every({fits})")
            tab.locator("#close").click()


CONTRASTS = """() => {
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const level = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(Number).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/rgba\\(.*, 0\\)|transparent/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility() || element.closest("script, svg, :disabled")) continue;
    const [a, b] = [level(getComputedStyle(element).color), level(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) low.push(`${contrast.toFixed(2)} ${element.tagName} ${element.textContent}`);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_contrasts_with_what_is_behind_it(open_page: Open, scheme: str) -> None:
    tab = open_page("small", scheme=scheme)
    keys = [measure.key for measure in MEASURES]
    for key in ("change", "cosine", "sparsity"):  # one of each scale
        tab.locator(f"input[name=measure][value='{keys.index(key)}']").check(force=True)
        assert tab.evaluate(CONTRASTS) == []
    show(tab, "c-2-2")
    assert tab.evaluate(CONTRASTS) == []


def test_keyboard(open_page: Open) -> None:
    tab = open_page("small")
    focused = lambda: tab.evaluate("document.activeElement.id")  # noqa: E731
    tab.locator("input[name=expert]:checked").focus()
    tab.keyboard.press("Tab")
    steps = [("", "c-0-0"), ("ArrowDown", "c-0-0"), ("Control+End", "c-4-11"), ("Control+Home", "c-0-0")]
    steps += [("ArrowRight", "c-0-0")]
    for key, expected in steps:
        if key:
            tab.keyboard.press(key)
        assert focused() == expected, key
    tab.locator("#c-1-1").focus()
    for key, expected in [
        ("ArrowRight", "c-1-2"),
        ("ArrowDown", "c-2-2"),
        ("End", "c-2-9"),
        ("ArrowRight", "c-2-9"),
        ("Home", "c-2-1"),
        ("PageDown", "c-3-1"),
        ("ArrowUp", "c-2-1"),
        ("ArrowRight", "c-2-2"),
    ]:
        tab.keyboard.press(key)
        assert focused() == expected, key
    outline = tab.evaluate("getComputedStyle(document.activeElement).outline")
    assert "3px" in outline and "none" not in outline
    assert tab.locator("#status").inner_text().startswith("layer 1 · q_proj: 0.")
    assert tab.locator("#grid [tabindex='0']").count() == 1
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#detail[data-drawn=c-2-2]")
    assert tab.evaluate("document.getElementById('detail').contains(document.activeElement)")
    tab.keyboard.press("Escape")
    assert not tab.locator("#detail").is_visible() and focused() == "c-2-2"


def test_a_click_shows_the_spectra(open_page: Open) -> None:
    tab = open_page("small")
    show(tab, "c-2-2")
    panel = tab.locator("#detail")
    assert panel.get_attribute("open") is not None
    text = panel.inner_text()
    assert "layer 1 · q_proj" in text and "model.layers.1.self_attn.q_proj.weight" in text and "effective rank" in text
    chart = panel.locator(".chart").first
    assert "Model-8B-helpful" in chart.get_attribute("aria-label")
    lines = chart.locator("svg path[stroke-dasharray]")
    assert lines.count() >= 2 and chart.locator("svg").bounding_box()["width"] > 400
    panel.get_by_text("All points of the curves").click()
    assert "4096" in panel.locator("details").first.inner_text()
    tab.locator("#next").click()
    tab.wait_for_selector("#detail[data-drawn=c-3-2]")
    assert "layer 2 · q_proj" in panel.inner_text() and tab.locator("#next").is_disabled()
    tab.locator("#close").click()
    assert not panel.is_visible()


def test_layers_are_compared_within_their_stack(open_page: Open) -> None:
    tab = open_page("frozen")
    panel = tab.locator("#detail")
    for row, cell, drawn in (("text_decoder 1", "up_proj", True), ("vision_tower 1", "up_proj", False)):
        heading = tab.locator("#grid tbody tr").filter(has_text=row)
        place = heading.locator("td").nth(reports.COLUMNS.index(cell)).get_attribute("id")
        show(tab, place)
        assert (panel.locator(".chart").count() == 2) is drawn
        assert ("no expert changes this cell's tensors" in panel.inner_text()) is not drawn
        tab.locator("#close").click()


def test_print_has_the_whole_map_on_white(open_page: Open) -> None:
    tab = open_page("small", "dark")
    tab.set_viewport_size({"width": 700, "height": 900})
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 247)"
    assert tab.evaluate("document.getElementById('grid').scrollWidth <= document.body.clientWidth")
    assert tab.evaluate("getComputedStyle(document.getElementById('c-2-2')).printColorAdjust") == "exact"


def test_a_cell_without_values_says_why(open_page: Open) -> None:
    tab = open_page("small")
    cell = tab.locator("#c-1-3")
    assert cell.inner_text() == "!" and "not finite" in cell.get_attribute("title")
    partly = tab.locator("#c-1-4")
    assert partly.inner_text().startswith("! 0.") and "not finite" in partly.get_attribute("title")
    partly.hover()
    assert "not finite" in tab.locator("#status").inner_text()
    show(tab, "c-1-3")
    assert "not finite" in tab.locator("#detail-problem").inner_text()


def test_measures_and_experts_are_chosen(open_page: Open) -> None:
    tab = open_page("small")
    cell = tab.locator("#c-2-2")
    one = (cell.inner_text(), tab.locator("#ticks").inner_text())
    tab.get_by_label("Model-8B-honest").check(force=True)
    two = (cell.inner_text(), tab.locator("#ticks").inner_text())
    assert one[0] != two[0] and one[1] == two[1]  # experts share the colours, so that they can be compared
    tab.get_by_label("Change kept in rounding").check(force=True)
    (kept,) = [measure for measure in MEASURES if measure.key == "kept"]
    assert 0 <= float(cell.inner_text()) <= 1
    assert tab.locator("#measure-help").inner_text() == kept.help
    assert tab.locator("#legend-unit").inner_text() == kept.unit
    assert not tab.locator("#who").is_visible()


def test_links_of_warnings_lead_to_cells(open_page: Open) -> None:
    tab = open_page("small")
    tab.locator("a[data-cell=c-1-3]").click()
    assert tab.evaluate("document.activeElement.id") == "c-1-3"
    box = tab.locator("#c-1-3").bounding_box()
    assert box and 0 <= box["y"] <= 900


def test_the_button_changes_the_scheme(open_page: Open) -> None:
    tab = open_page("small", scheme="dark")
    colours = "[getComputedStyle(document.body).backgroundColor, document.getElementById('c-2-2').style.background]"
    before = tab.evaluate(colours)
    tab.get_by_role("button", name="Light theme").click()
    after = tab.evaluate(colours)
    assert before[0] != after[0] and before[1] != after[1]
    tab.get_by_role("button", name="Dark theme").click()
    assert tab.evaluate(colours) == before


def test_a_report_without_cells_says_so(open_page: Open) -> None:
    tab = open_page("empty", "dark")
    assert "No tensor could be measured" in tab.locator("#map").inner_text()
    assert not tab.locator("#grid").is_visible()
    tab.get_by_role("button", name="Light theme").click()
    assert tab.evaluate(CONTRASTS) == []


def test_hostile_names_run_nothing(open_page: Open) -> None:
    tab = open_page("hostile")
    show(tab, "c-0-0")
    assert tab.locator("img").count() == 0
    assert reports.HOSTILE.replace("\u2028", "") in tab.locator("#detail-problem").inner_text().replace("\u2028", "")
