"""The place of an output folder: whether it may be written, how a complete folder gets there, what is next to it.

A complete folder takes its place in one atomic step: a rename where nothing is, an exchange of names where an older
model is. Where the system has no exchange, the older model is renamed to `old` in the folder of unfinished work first;
a process that is killed between these two renames leaves it there, and `recover` brings it back.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from resm_kernels.checkpoint.durable import exchange, sync, write_errors_named
from resm_kernels.checkpoint.format import CheckpointError, CheckpointWarning
from resm_kernels.checkpoint.journal import Journal
from resm_kernels.checkpoint.unfinished import UnfinishedFolder, hidden_sibling, read_manifest
from resm_kernels.files import expanded

MANIFEST: Final = UnfinishedFolder.MANIFEST
MODEL: Final = "model"
"""The folder in the folder of unfinished work that takes the output's name when it is complete."""
JOURNAL: Final = "journal"
OLD: Final = "old"
"""Where the older model is in between, if names cannot be exchanged."""
COMMIT: Final = "commit"
"""The entry of the manifest's state by which the complete folder is known in its place: the number of its inode."""
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".gguf", ".h5", ".msgpack")
"""The endings of files that hold weights."""
_SUFFIX: Final = ".partial-unfinished"


def unfinished_folder(out: Path) -> Path:
    """Return the folder that holds the unfinished work on an output folder, next to it."""
    return hidden_sibling(out, _SUFFIX)


class Occupant(NamedTuple):
    """The folder at the output's place: the number of its inode, and the names in it."""

    inode: int
    names: frozenset[str]

    @classmethod
    def of(cls, folder: Path) -> Occupant | None:
        """Return what is at that place; None if there is nothing, or an empty folder."""
        if not folder.is_dir() or not (names := frozenset(os.listdir(folder))):
            return None
        return cls(folder.stat().st_ino, names)


def check_output_folder(
    out: str | os.PathLike[str],
    *,
    overwrite: bool,
    inputs: Sequence[str | os.PathLike[str]] = (),
    marker: str = "config.json",
    goes_on: bool = True,
) -> Path:
    """Return the real path of the output folder; raise a CheckpointError if it must not or cannot be written.

    A folder that is not empty needs `overwrite`, and must hold the file `marker` and a file of weights, so that a
    mistyped path does not delete other files. An output that is or contains one of the inputs, folders or
    files, is refused, and so is one that could not get its name in the end: a mount point, or a folder where this user
    must not rename anything. Without `goes_on`, so is one of an unfinished merge, which the caller cannot go on with.
    Nothing is written.
    """
    path = Path(os.path.realpath(expanded(out, CheckpointError, "output")))
    if not _is_utf8(path.name):
        raise CheckpointError(f"output {os.fsencode(path)!r}: its name is not UTF-8; choose another one")
    with write_errors_named(path):
        if path.is_symlink():
            raise CheckpointError(f"output {path}: is a symbolic link to itself, need a folder that does not exist yet")
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"output {path}: is a file, need a folder that does not exist yet")
        for entry in inputs:
            source = Path(os.path.realpath(expanded(entry, CheckpointError, "input")))
            if source == path or path in source.parents:
                kind = "model " if source.is_dir() else "file "
                raise CheckpointError(f"output {path}: is or contains the input {kind}{source}; choose another folder")
        if (mounted := _mount_point(path)) == path:
            raise CheckpointError(
                f"output {path}: is a mount point, which no complete folder can replace; name a folder in it, such as "
                f"{path / 'model'}"
            )
        if mounted is not None:
            raise CheckpointError(f"output {path}: contains the mount point {mounted}; choose another folder")
        if path.is_dir() and any(path.iterdir()):
            if not overwrite and not is_committed(path):
                raise CheckpointError(
                    f"output {path}: exists and is not empty; choose another folder or pass --overwrite"
                )
            if lacking := _lacking(path, marker):
                kind = "an adapter folder" if marker == "adapter_config.json" else "a model folder"
                raise CheckpointError(
                    f"output {path}: does not look like {kind} (no {lacking}), so it is not overwritten"
                )
        _check_may_rename(path)
        if not goes_on and not is_committed(path) and Journal(unfinished_folder(path) / JOURNAL).read():
            raise CheckpointError(
                f"{unfinished_folder(path)}: holds an unfinished merge that this command would replace; finish it, "
                "delete the folder, or name another output folder"
            )
    return path


def _is_utf8(name: str) -> bool:
    # Names that are not UTF-8 come from the system with halves of surrogate pairs.
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def is_committed(out: Path) -> bool:
    """Return True if the output is that of a process that ended before it could delete its unfinished folder."""
    manifest = read_manifest(unfinished_folder(out) / MANIFEST)
    return manifest is not None and out.is_dir() and manifest[1].get(COMMIT) == out.stat().st_ino


def put_in_place(complete: Path, out: Path, old: Path, replaced: Occupant | None) -> None:
    """Give a complete folder the output's name; the folder that it replaces is then at `complete` or at `old`.

    Args:
        complete: The folder, on the same file system.
        out: The output folder.
        old: A free name on that file system.
        replaced: What is to be replaced; anything else at `out` is an error, and is kept.

    Raises:
        CheckpointError: Something came into being at `out`, or changed there.
        OSError: The system cannot rename.
    """
    if Occupant.of(out) != replaced:
        raise _changed(out)
    if replaced is None:
        # This replaces an empty folder, but neither a file nor a folder that holds something.
        try:
            complete.rename(out)
        except (FileExistsError, NotADirectoryError) as error:
            raise _changed(out) from error
        except OSError as error:
            if Occupant.of(out) is not None:
                raise _changed(out) from error
            raise
    elif exchange(complete, out):
        if Occupant.of(complete) != replaced:
            exchange(complete, out)
            raise _changed(out)
    else:
        out.rename(old)
        try:
            complete.rename(out)
        except BaseException:
            # An interrupt between the two renames must not lose the old folder.
            if not out.exists():
                old.rename(out)
            raise
    sync(out.parent)
    sync(complete.parent)


def _changed(out: Path) -> CheckpointError:
    return CheckpointError(
        f"output {out}: came into being or changed while the merge ran, by another process; it is not replaced: move "
        "it, or pass --overwrite if it is a model folder to replace"
    )


def recover(out: Path) -> None:
    """Bring back an older model that a process took away from the output's place before it was killed.

    The caller holds the lock of the unfinished folder.

    Raises:
        CheckpointError: There is something else at the place now.
    """
    unfinished = unfinished_folder(out)
    old = unfinished / OLD
    if old.is_dir():
        if Occupant.of(out) is None:
            old.rename(out)
            sync(out.parent)
            sync(unfinished)
            _say(f"output {out}: an earlier run was killed while it replaced this folder; the old model is back")
        elif not is_committed(out) and (unfinished / MODEL).is_dir():
            raise CheckpointError(
                f"{old}: is the model that {out} was before an earlier run was killed, and another is there now; move "
                "one of the two away, or delete it"
            )


def clear_leftovers(out: Path, marker: str = "config.json") -> None:
    """Clear away what killed processes of version 0.1 and before left next to the output; every step is told.

    These are `.NAME.partial-*`, incomplete models, and `.NAME.old-*`, models that were being replaced.

    Raises:
        CheckpointError: There is no output, and several folders may be the one that it was.
    """
    pattern = re.compile(re.escape(f".{out.name}.") + r"(partial|old)-[0-9a-f]{8}")
    found = [(match[1], p) for p in _siblings(out) if (match := pattern.fullmatch(p.name)) and _is_real_folder(p)]
    old = [path for kind, path in found if kind == "old"]
    if old and Occupant.of(out) is None:
        if len(old) > 1:
            names = ", ".join(path.name for path in old)
            raise CheckpointError(
                f"output {out}: is missing, and earlier runs that were killed left several models that it may have "
                f"been: {names}; rename the one that you need, and delete the others"
            )
        old.pop().rename(out)
        sync(out.parent)
        _say(f"output {out}: an earlier run was killed while it replaced this folder; the old model is back")
    elif old and _lacking(out, marker):
        for path in old:
            _say(f"{path}: an earlier run that was killed left this model, and {out} is none; it is kept")
        old = []
    for path in [*(path for kind, path in found if kind == "partial"), *old]:
        if user := _user_of(path):
            _say(f"{path}: the process {user} has files of it open; it is kept")
        else:
            shutil.rmtree(path, ignore_errors=True)
            what = "the model that it had replaced" if path in old else "an incomplete model"
            _say(f"{path}: deleted, {what}, which an earlier run that was killed left behind")


def _lacking(folder: Path, marker: str) -> str:
    """Return what a folder lacks to be a model or an adapter; nothing if it is one."""
    if not (folder / marker).is_file():
        return marker
    # Models of several components, which other files mark, may have weights in the components' folders alone.
    pattern = "*" if marker in ("config.json", "adapter_config.json") else "**/*"
    return "" if any(file.suffix in _WEIGHTS for file in folder.glob(pattern)) else "file of weights"


def _say(message: str) -> None:
    warnings.warn(message, CheckpointWarning, stacklevel=3)


def _siblings(out: Path) -> list[Path]:
    return sorted(out.parent.iterdir()) if out.parent.is_dir() else []


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _user_of(folder: Path) -> str | None:
    """Return the number of a process of this machine that has a file in the folder open; None if none is seen."""
    prefix = f"{folder}{os.sep}"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(fd).startswith(prefix) for fd in (process / "fd").iterdir()):
                return process.name
        except OSError:
            continue  # it has ended, or is another user's
    return None


def _mount_point(path: Path) -> Path | None:
    """Return a folder on which something is mounted: this one or one in it; None if there is none."""
    if not path.is_dir():
        return None
    if os.path.ismount(path):
        return path
    try:  # a folder that is mounted from the same file system looks like any other
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    points = (re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), line.split()[4]) for line in lines)
    return next((Path(point) for point in points if path in (Path(point), *Path(point).parents)), None)


def _check_may_rename(path: Path) -> None:
    """Refuse an output whose parent folder, or itself, does not let this user rename it."""
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir():
        raise CheckpointError(f"output {path}: {parent} is a file, need a folder")
    if not _may_change(parent):
        raise CheckpointError(f"output {path}: {parent} does not let this user make folders in it (read-only)")
    if path.is_dir():
        mode, owners = parent.stat().st_mode, {parent.stat().st_uid, path.stat().st_uid}
        if not _may_change(path) or (mode & stat.S_ISVTX and os.geteuid() not in owners | {0}):
            raise CheckpointError(
                f"output {path}: does not let this user rename it (it is read-only or another user's)"
            )


def _may_change(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
