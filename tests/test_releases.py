"""What a release says about itself agrees, and its forms and workflow are what GitHub can read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from resm_kernels._version import __version__

tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 has no reader of TOML")

ROOT = Path(__file__).resolve().parent.parent
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
HEADING = re.compile(r"^## (\d+\.\d+\.\d+) - (unreleased|\d{4}-\d{2}-\d{2})$")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_and_date_agree() -> None:
    headings = re.findall(r"^## .*$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    entries = [found.groups() for heading in headings if (found := HEADING.match(heading))]
    assert len(entries) == len(headings), "each heading needs the form `## 1.2.3 - 2026-01-31`, or `- unreleased`"
    versions = [tuple(map(int, version.split("."))) for version, _ in entries]
    dates = [date for _, date in entries[1:]]
    assert versions == sorted(set(versions), reverse=True)
    assert "unreleased" not in dates and dates == sorted(dates, reverse=True)
    version, date = entries[0]
    citation = read("CITATION.cff")
    assert version == citation["version"] == __version__.partition("+")[0]
    assert str(citation.get("date-released", "unreleased")) == date


def test_citation_has_what_the_format_requires() -> None:
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert all(author.keys() & {"name", "family-names"} for author in citation["authors"])
    assert citation["license"] == project()["license"]


@pytest.mark.parametrize("form", [f for f in FORMS if f.name != "config.yml"], ids=lambda form: form.stem)
def test_issue_forms_are_valid(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert content.keys() == {"name", "description", "labels", "body"}
    fields = [element for element in content["body"] if element["type"] != "markdown"]
    assert fields and len({field["id"] for field in fields}) == len(fields)
    for element in content["body"]:
        assert element["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert element["attributes"].get("value" if element["type"] == "markdown" else "label")
        assert (element["type"] == "dropdown") == bool(element["attributes"].get("options"))
    if form.stem in ("bug", "wrong_merge"):
        assert {"recipe", "info"} <= {field["id"] for field in fields if field["validations"]["required"]}


def test_release_workflow_builds_for_every_python() -> None:
    workflow = read(".github/workflows/release.yml")
    jobs, triggers = workflow["jobs"], workflow[True]  # YAML 1.1 reads the key `on` as true
    assert triggers["push"] == {"tags": ["v*"]}
    for job in jobs.values():
        assert set(job.get("needs", [])) <= jobs.keys()
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        assert all(re.search(r"@[\w./]+$", step["uses"]) for step in job["steps"] if "uses" in step)
    assert set(jobs["publish"]["needs"]) == jobs.keys() - {"publish"}
    environment = jobs["wheels"]["env"]
    built = [int(minor) for minor in re.findall(r"cp3(\d+)-", environment["CIBW_BUILD"])]
    promised = [int(m[1]) for c in project()["classifiers"] if (m := re.fullmatch(r".*Python :: 3\.(\d+)", c))]
    # The wheel of 3.12 is for the stable ABI (setup.py).
    assert built == [minor for minor in promised if minor <= 12]
    assert project()["requires-python"] == f">=3.{promised[0]}"
    script = re.search(r"{project}/(\S+)", environment["CIBW_TEST_COMMAND"])
    assert script and (ROOT / script[1]).is_file()
