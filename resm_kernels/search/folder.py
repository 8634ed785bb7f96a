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
from resm_kernels.search.identity import is_of_evaluate
from resm_kernels.search.picture import draw
from resm_kernels.search.space import Space
from resm_kernels.search.study import DATABASE, check_database

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
        changed_evaluate: Whether the function that judges may have changed since the search began.

    Raises:
        SearchError: The folder holds another search, or files that are none, or results of which the trials are gone;
            or another process searches in it, or no picture can be drawn.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], *, changed_evaluate: bool = False) -> None:
        self.path = path
        self._job = json.loads(json.dumps(job))
        self._changed_evaluate = changed_evaluate
        self._has_trials = False
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
        self._write_manifest()

    def note_trial(self) -> None:
        """Write down that a trial was stored, so that its loss is noticed."""
        if not self._has_trials:
            self._has_trials = True
            self._write_manifest()

    def _write_manifest(self) -> None:
        content = {
            "format": _FORMAT,
            "job": self._job,
            "objectives": list(self._objectives),
            "has_trials": self._has_trials,
        }
        self._write(MANIFEST, json.dumps(content, indent=1))

    def _open(self) -> None:
        manifest = self.path / MANIFEST
        if not manifest.exists():
            # A process that was killed while it wrote the first manifest has left a part of it.
            names = sorted(entry.name for entry in self.path.iterdir())
            others = [n for n in names if n != LOCK_FILE and not n.startswith(f".{MANIFEST}.partial-")]
            if others:
                raise SearchError(
                    f"{self.path}: holds {others[0]!r} but no {MANIFEST}, so it is no search; name another folder"
                )
            return
        content = read_object(manifest, SearchError, limit=LIST_BYTES)
        job, objectives = content.get("job"), content.get("objectives")
        if content.get("format") != _FORMAT or not isinstance(job, dict) or not isinstance(objectives, list):
            raise SearchError(f"{manifest}: is damaged, or of another version; name another folder")
        self._has_trials = content.get("has_trials") is True or any((self.path / n).exists() for n in (BEST, REPORT))
        if self._has_trials:
            check_database(self.path)
        elif not (self.path / DATABASE).exists():  # cut off before the first trial was stored
            return
        if self._changed_evaluate:
            job = {entry: value for entry, value in job.items() if not is_of_evaluate(entry)}
            job |= {entry: value for entry, value in self._job.items() if is_of_evaluate(entry)}
        if differing := differences(job, self._job):
            evaluate = all(
                is_of_evaluate(entry) for entry in {*job, *self._job} if job.get(entry) != self._job.get(entry)
            )
            otherwise = ", or allow_changed_evaluate to keep the trials that it judged then" if evaluate else ""
            raise SearchError(
                f"{self.path}: holds a search with another {', another '.join(differing)}; run the same command as "
                f"then, or name another folder{otherwise}"
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
            "held_out_failed": report.held_out_failed,
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
