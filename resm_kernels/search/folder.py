"""The folder of a search: which search it is, and what it ends with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.checkpoint.durable import write_errors_named, write_whole
from resm_kernels.checkpoint.lock import LOCK_FILE, FolderLock
from resm_kernels.checkpoint.unfinished import differences
from resm_kernels.files import LIST_BYTES, read_object
from resm_kernels.plot import check_plot
from resm_kernels.search.errors import SearchError
from resm_kernels.search.picture import draw
from resm_kernels.search.space import Space
from resm_kernels.search.study import DATABASE

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.11 has it in `typing`

    from resm_kernels.search.run import SearchReport

MANIFEST: Final = "search.json"
BEST: Final = "best.yaml"
FRONT: Final = "front"
REPORT: Final = "report.json"
PICTURE: Final = "front.png"
_FORMAT: Final = 1


class SearchFolder:
    """Holds the folder of a search for this process alone, as a context manager.

    Args:
        path: The folder, which is made if it is missing.
        job: What the search depends on, by the names that errors use, as JSON has them.

    Raises:
        SearchError: The folder holds another search, or files that are none; or another process searches in it, or
            no picture can be drawn.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        self._job = json.loads(json.dumps(job))
        self._lock = FolderLock(path, "searching in")
        self._objectives: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        try:
            self._lock.take()
        except CheckpointError as error:
            raise SearchError(str(error)) from error
        try:
            check_plot(self.path / PICTURE)
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def objectives(self) -> tuple[str, ...]:
        """The scores that the search maximises; none for one that has not begun. Setting them writes them down."""
        return self._objectives

    @objectives.setter
    def objectives(self, names: Sequence[str]) -> None:
        self._objectives = tuple(names)
        content = {"format": _FORMAT, "job": self._job, "objectives": list(names)}
        self._write(MANIFEST, json.dumps(content, indent=1))

    def _open(self) -> None:
        manifest = self.path / MANIFEST
        if not manifest.exists():
            others = [entry.name for entry in sorted(self.path.iterdir()) if entry.name != LOCK_FILE]
            if others:
                raise SearchError(
                    f"{self.path}: holds {others[0]!r} but no {MANIFEST}, so it is no search; name another folder"
                )
            return
        content = read_object(manifest, SearchError, limit=LIST_BYTES)
        job, objectives = content.get("job"), content.get("objectives")
        if content.get("format") != _FORMAT or not isinstance(job, dict) or not isinstance(objectives, list):
            raise SearchError(f"{manifest}: is damaged, or of another version; name another folder")
        if not (self.path / DATABASE).exists():  # cut off before the first trial was stored
            return
        if differing := differences(job, self._job):
            raise SearchError(
                f"{self.path}: holds a search with another {', another '.join(differing)}; run the same command as "
                "then, or name another folder"
            )
        self._objectives = tuple(map(str, objectives))

    def write(self, report: SearchReport, space: Space) -> None:
        """Write recipes, report and picture; those of an earlier end of the search are replaced."""
        text = {trial.number: _recipe_text(space, trial.values) for trial in (*report.front, report.best)}
        with write_errors_named(self.path):
            if (self.path / FRONT).exists():
                shutil.rmtree(self.path / FRONT)
            (self.path / FRONT).mkdir()
        for trial in report.front:
            self._write(f"{FRONT}/{trial.number:04d}.yaml", text[trial.number])
        self._write(BEST, text[report.best.number])
        content = {
            "objectives": report.objectives,
            "best": report.best.number,
            "front": [trial.number for trial in report.front],
            "held_out": report.held_out,
            "trials": [asdict(trial) for trial in report.trials],
            "tensors_of_best": report.tensors,
        }
        self._write(REPORT, json.dumps(content, indent=1))
        draw(report, self.path / PICTURE)

    def _write(self, name: str, content: str) -> None:
        with write_errors_named(self.path):
            write_whole(self.path / name, content.encode())


def _recipe_text(space: Space, values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(space.recipe(values), sort_keys=False, allow_unicode=True)
