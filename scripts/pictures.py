"""Draws the pictures of the documentation that show a report: merges the example's models and opens the page.

    python scripts/pictures.py

It needs Chromium (scripts/browser.sh) and the extras `report` and `test`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from resm_kernels import merge_checkpoints
from resm_kernels.report import gather
from resm_kernels.report.page import write_page

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/report.png"
MOST_BYTES = 150_000


def main() -> None:
    os.chdir(ROOT)  # the recipe names its models from here
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merge_checkpoints("examples/3h/recipes/resm.yaml", folder / "merged")
        write_page(gather(folder / "merged"), folder / "merged.html")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1200, "height": 1000}, color_scheme="light")
            tab.goto((folder / "merged.html").as_uri())
            tab.locator("#c-2-2").focus()
            box = tab.locator("#map").evaluate("e => e.getBoundingClientRect().toJSON()")
            top = box["y"] + tab.evaluate("scrollY")
            clip = {"x": 0, "y": top + 1, "width": 1200, "height": box["height"]}
            tab.screenshot(path=PICTURE, clip=clip, full_page=True)
            browser.close()
    size = PICTURE.stat().st_size
    assert size <= MOST_BYTES, f"{PICTURE} has {size} bytes; need at most {MOST_BYTES}"
    print(f"{PICTURE.relative_to(ROOT)}: {size} bytes")


if __name__ == "__main__":
    main()
