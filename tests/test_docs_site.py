"""The site of the documentation: it builds without a warning, needs no network, and its links lead to files."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent


class References(HTMLParser):
    """What a page loads, and what it links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "a":
            self.linked += [href] if (href := given.get("href")) else []
        elif tag != "link" or given.get("rel") != "canonical":
            self.loaded += [value for name in ("src", "href") if (value := given.get(name))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs-material or mkdocstrings is not installed: pip install 'resm-kernels[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return folder


def test_pages_load_nothing_from_elsewhere_and_link_to_files(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        references = References(page)
        assert references.loaded
        assert not [where for where in references.loaded if urlsplit(where).netloc], page
        for where in references.loaded + references.linked:
            parts = urlsplit(where)
            if parts.scheme or not parts.path or page.name == "404.html":
                continue  # that page is for servers, and has addresses from their root
            assert (page.parent / unquote(parts.path)).is_file(), (page, where)


def test_links_out_of_the_documentation_lead_to_copies(site: Path) -> None:
    copies = site / "repository"
    picture = "benchmarks/results/quality.png"
    assert (copies / picture).read_bytes() == (ROOT / picture).read_bytes()
    assert '"repository/resm_kernels/linalg/routes.py.html"' in (site / "spectral.html").read_text()
    assert "SubspaceOptions" in (copies / "resm_kernels/linalg/routes.py.html").read_text()
    # Links of a copied document lead back to the pages.
    assert '"../../../quality.html"' in (copies / "benchmarks/results/quality.html").read_text()
