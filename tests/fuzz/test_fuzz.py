"""Hostile files and command lines end in errors of this library, soon, and leave nothing behind.

Two hundred cases of each target are made anew, always the same ones, and the corpus is replayed: one file for each
interesting case, by hand or found. `make fuzz` makes a hundred thousand others.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import CORPUS
from guard import Finding, call_guarded
from hypothesis import HealthCheck, Phase, given, settings
from targets import TARGETS, Target, import_packages, make_world

CASES = 2000 // len(TARGETS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import_packages()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)  # nothing here is about power cuts, and disks are slow
        yield make_world(tmp_path_factory.mktemp("fuzz"))
    torch.set_num_threads(before)


def installed(name: str) -> Target:
    """A target; a test of one whose packages are not there is skipped."""
    for package in TARGETS[name].packages:
        pytest.importorskip(package, reason=f"{package} is not installed (test extra)")
    return TARGETS[name]


@pytest.mark.parametrize("name", TARGETS)
def test_random_cases(world: Path, name: str) -> None:
    target = installed(name)

    @settings(
        max_examples=CASES,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def read(case: bytes) -> None:
        target.read(world, case)

    read()


@pytest.mark.parametrize("case", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_corpus(world: Path, case: Path) -> None:
    installed(case.parent.name).read(world, case.read_bytes())


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in CORPUS.glob("*/*")} == set(TARGETS)


def test_the_guard_sees_faults(tmp_path: Path) -> None:
    def fails() -> None:
        raise KeyError("x")

    def writes() -> None:
        (tmp_path / "new").touch()

    def writes_elsewhere() -> None:
        (tmp_path / "a" / ".." / ".." / "elsewhere").write_text("")

    (tmp_path / "a").mkdir()
    for fault, message in ((fails, "KeyError"), (writes, "left behind"), (writes_elsewhere, "wrote outside")):
        with pytest.raises(Finding, match=message):
            call_guarded(fault, tmp_path, (ValueError,))
    (tmp_path.parent / "elsewhere").unlink()
