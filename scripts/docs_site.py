"""The hook of mkdocs.yml by which the documentation's links work both in the repository and on the site.

Pages link to files outside of docs by their relative path (`../benchmarks/results/quality.png`), as the web view of a
repository wants it. The site has a copy of each of these files below `repository/`, and this hook writes links anew
to lead there: documents become pages, source files and data become pages that show them, everything else is copied.
A link to a file that does not exist is left as it is, so that `mkdocs build --strict` reports it.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
COPIES = "repository"
IN_NAVIGATION = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/quality.md")
LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".txt": "text"}
"""Text files of these kinds are shown on a page, in this language of the highlighter."""
LINK = re.compile(r"(```.*?```|`[^`\n]*`)|(\]\()(?!\w+:|#)([^)#\s]+)", re.DOTALL)
"""A piece of code, or the target of a link up to its anchor."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of the repository that pages link to, and those that these link to."""
    always = [("mkdocs.yml", "".join(f"]({name})" for name in IN_NAVIGATION))]
    waiting = always + [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    while waiting:
        place, text = waiting.pop()
        for target in _targets(place, text):
            if not (ROOT / target).is_file() or files.get_file_from_path(_on_site(target)):
                continue
            file = _copy(config, target)
            files.append(file)
            if target.endswith(".md"):
                waiting.append((target, file.content_string))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes the page's links to other files of the repository anew."""
    source = page.file.src_uri
    if source.startswith(f"{COPIES}/"):
        page.meta["search"] = {"exclude": True}  # else tables and sources crowd out what explains them
    place = source.removeprefix(f"{COPIES}/") if source.startswith(f"{COPIES}/") else f"docs/{source}"

    def rewritten(match: re.Match[str]) -> str:
        code, opening, link = match.groups()
        target = "" if code else _target(place, link)
        if code or not (ROOT / target).is_file():
            return match[0]
        return opening + posixpath.relpath(_on_site(target), posixpath.dirname(source) or ".")

    return LINK.sub(rewritten, markdown)


def _targets(place: str, text: str) -> list[str]:
    return [_target(place, match[3]) for match in LINK.finditer(text) if match[3]]


def _target(place: str, link: str) -> str:
    """The file that a link in the file `place` leads to, from the repository's root; of a folder, its README."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
    return f"{target}/README.md" if (ROOT / target / "README.md").is_file() else target


def _on_site(target: str) -> str:
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    shown = Path(target).suffix in LANGUAGES or os.path.basename(target) == "LICENSE"
    # mkdocs leaves out files below folders such as .github.
    visible = "/".join(part.removeprefix(".") for part in target.split("/"))
    return f"{COPIES}/{visible}" + (".md" if shown else "")


def _copy(config: MkDocsConfig, target: str) -> File:
    source = ROOT / target
    address = _on_site(target)
    if not address.endswith(".md") or target.endswith(".md"):
        return File.generated(config, address, abs_src_path=str(source))
    text = f"# {target}\n\n````` {LANGUAGES.get(source.suffix, 'text')}\n{source.read_text()}`````\n"
    return File.generated(config, address, content=text)
