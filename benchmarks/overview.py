"""Every record: its commit, age, date, duration and machine, and the lines of README and docs that depend on it.

python -m benchmarks.overview                          # all records
python -m benchmarks.overview --same-commit cpu sizes  # exit status 1 if these are not of one commit
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.plot import PICTURES
from benchmarks.records import CHANGED, PROVENANCE, RESULTS, ROOT, git


def provenances(folder: Path) -> dict[str, dict[str, Any]]:
    """Where each record of the folder comes from, by its name; nothing of those that do not say."""
    files = sorted(folder.glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")).get(PROVENANCE, {}) for file in files}


def short(of: str | None) -> str:
    """The first digits of a commit."""
    return "–" if of is None else of[:10] + (CHANGED if of.endswith(CHANGED) else "")


def age(root: Path, of: str | None) -> str:
    """How many commits have followed."""
    if of is None:
        return "–"
    count = git(root, "rev-list", "--count", f"{of.removesuffix(CHANGED)}..HEAD")
    return "not in this history" if count is None else count


def dependants(name: str, provenance: Mapping[str, Any], pages: Sequence[Path]) -> list[str]:
    """Lines of the pages that name the record, its pictures, or what makes it: `page:line`."""
    modules = re.findall(r"benchmarks\.(\w+)", provenance.get("command", ""))
    made = [rf"\b{module}\b" for module in [f"bench_{name}", *modules]]
    if name.startswith("quality"):
        record = name.removeprefix("quality_").replace("_", "-")
        made = [r"make quality`", r"results/quality\.md"] if name == "quality" else [rf"RECORD={record}(?![\w-])"]
    drawn = [rf"results/{re.escape(picture)}" for picture, how in PICTURES.items() if name in how.records]
    pattern = re.compile("|".join([rf"results/{name}\.json", *drawn, *made]))
    return [
        f"{page.name}:{number}"
        for page in pages
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="RECORD", help="without .json (default: all)")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--same-commit", action="store_true", help="fail if the records are of different commits")
    options = parser.parse_args(arguments)
    known = provenances(options.folder)
    if unknown := sorted(set(options.names) - known.keys()):
        parser.error(f"{', '.join(unknown)}: {options.folder} has {', '.join(known)}")
    chosen = {name: facts for name, facts in known.items() if name in (options.names or known)}
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    table = Table("record", "commit", "commits since", "date", "minutes", "machine", "needed by")
    for name, facts in chosen.items():
        host = facts.get("machine")
        table.add_row(
            name,
            short(facts.get("commit")),
            age(ROOT, facts.get("commit")),
            facts.get("date", "–")[:16].replace("T", " "),
            f"{facts['seconds'] / 60:.1f}" if facts else "–",
            f"{host['cpu']}, {host['isa']}, {host['threads']} of {host['cores']} cores" if host else "–",
            ", ".join(dependants(name, facts, pages)) or "–",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    commits = {facts.get("commit") for facts in chosen.values()}
    if options.same_commit and (len(commits) > 1 or None in commits):
        named = ", ".join(sorted("none" if commit is None else short(commit) for commit in commits))
        print(f"the records are not of one commit: {named}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
