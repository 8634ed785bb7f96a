"""Asks the hub through huggingface_hub, whose settings hold: HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HUB_OFFLINE."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from resm_kernels.checkpoint.format import CheckpointWarning, format_bytes
from resm_kernels.files import first_line, path_problem, shortened

MAIN: Final = "main"
_TIMEOUT: Final = 30.0
_LONGEST_SIZE: Final = 18
"""The most digits of a file's size: systems count bytes in 64 bits."""
_COMMIT: Final = re.compile(r"[0-9a-f]{7,64}")
_silenced: Final = ContextVar("silenced", default=False)


class HubError(ValueError):
    """A model cannot be had from the hub; the message says why and what to do."""


@dataclass(frozen=True)
class Listing:
    """A repository at one commit.

    Attributes:
        repository: Its id, owner/name.
        revision: The branch, tag or commit that was asked for.
        commit: The commit's hash.
        sizes: The size of each file in bytes by its path; 0 if the hub does not say it.
    """

    repository: str
    revision: str
    commit: str
    sizes: Mapping[str, int]

    @property
    def name(self) -> str:
        """The repository as messages name it."""
        return shown_name(self.repository, self.revision)


def shown_name(repository: str, revision: str) -> str:
    """Return how a recipe names a revision of a repository."""
    return repository if revision == MAIN else f"{repository}@{revision}"


def list_files(repository: str, revision: str) -> Listing | None:
    """Ask the hub for the commit and the files of a revision; None if it may not or cannot be asked.

    Raises:
        HubError: There is no such repository or revision, or this user may not read it.
    """
    hub = _library()
    if hub.constants.HF_HUB_OFFLINE:
        return None
    with _named(repository, revision):
        try:
            info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            if not all(isinstance(name, str) and isinstance(size, int) and size >= 0 for name, size in sizes.items()):
                raise TypeError("files need names and sizes")
        except _connection_errors() as error:
            if isinstance(error, hub.errors.HfHubHTTPError) and error.response.status_code < 500:
                raise
            if cached_folder(repository, revision) is None:
                raise
            name = shown_name(repository, revision)
            warnings.warn(
                f"{name}: the hub cannot be reached ({first_line(error)}); what is in the cache is taken",
                CheckpointWarning,
                stacklevel=2,
            )
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, hub.errors.HFValidationError):
                raise
            raise HubError(
                f"{shown_name(repository, revision)}: {hub.constants.ENDPOINT} sends no list of files; is it a hub?"
            ) from error
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise HubError(f"{repository}: the hub names the commit {shortened(info.sha)}, need a hash")
    for name in sizes:
        if path_problem(name) or name.startswith("/") or not name.isprintable() or {"..", "."} & set(name.split("/")):
            raise HubError(f"{repository}: the hub lists the file {shortened(name)}, which no folder can hold")
    return Listing(repository, revision, info.sha, sizes)


def cached_folder(repository: str, revision: str) -> Path | None:
    """Return the folder of a revision in the cache, which may lack files; None if there is none."""
    root = _storage(repository)
    commit = revision
    with contextlib.suppress(OSError):
        commit = (root / "refs" / revision).read_text(encoding="utf-8").strip()
    folder = root / "snapshots" / commit
    return folder if commit and "/" not in commit and folder.is_dir() else None


def storage_exists(repository: str) -> bool:
    """Return True if the cache has a folder for a repository; False also without huggingface_hub."""
    return importlib.util.find_spec("huggingface_hub") is not None and _storage(repository).is_dir()


def snapshot_folder(listing: Listing) -> Path:
    """Return the folder in which the cache has, or will have, the files of a commit."""
    return _storage(listing.repository) / "snapshots" / listing.commit


def download(listing: Listing, names: Sequence[str], *, revision: str) -> None:
    """Fetch files into the cache; what an interrupted download has fetched is kept.

    Args:
        revision: `listing.revision`, which the cache then knows as this commit, or `listing.commit`.
    """
    hub = _library()
    with _named(listing.repository, listing.revision):
        folder = hub.snapshot_download(
            listing.repository,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in names],
            tqdm_class=_one_line(listing.name),
        )
    missing = [name for name in names if not os.path.exists(os.path.join(folder, name))]
    if Path(folder).name != listing.commit or missing:
        what = f"{missing[0]} was not fetched" if missing else "it changed on the hub meanwhile"
        raise HubError(f"{listing.name}: {what}; run the same command again, which goes on with what is there")


def read_range(listing: Listing, name: str, first: int, length: int) -> tuple[bytes, int]:
    """Return bytes of a file from `first` on, as many as there are of `length`, and the file's size."""
    hub = _library()
    url = hub.hf_hub_url(listing.repository, name, revision=listing.commit)
    headers = {**hub.utils.build_hf_headers(), "Range": f"bytes={first}-{first + length - 1}"}
    headers["Accept-Encoding"] = "identity"
    with (
        _named(listing.repository, listing.revision),
        hub.utils.get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as response,
    ):
        hub.utils.hf_raise_for_status(response)
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code != 206 or not size.isdecimal() or len(size) > _LONGEST_SIZE:
            raise HubError(f"{listing.name}: {name}: the server does not send parts of files, which the check needs")
        received = bytearray()
        for piece in response.iter_bytes():
            received += piece
            if len(received) > length:  # it may go on without end
                break
    content = bytes(received)
    if len(content) != min(length, max(int(size) - first, 0)):
        raise HubError(f"{listing.name}: {name}: the server sent {len(content)} bytes instead of {length}; try again")
    return content, int(size)


def check_space(needed: int, names: Sequence[str]) -> None:
    """Raise a HubError if the cache's file system has less free space than `needed` bytes."""
    folder = Path(_library().constants.HF_HUB_CACHE)
    there = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free
    if free < needed:
        raise HubError(
            f"{', '.join(names)}: {format_bytes(needed)} have to be fetched, and {folder} has {format_bytes(free)} "
            "free; make room, or set HF_HUB_CACHE to a folder on another disk"
        )


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Show neither what is fetched nor a bar of its progress; warnings are still given."""
    token = _silenced.set(True)
    try:
        yield
    finally:
        _silenced.reset(token)


def announce(name: str, commit: str, files: int, nbytes: int) -> None:
    """Say what is fetched, unless within `silenced` or if huggingface_hub's progress bars are off."""
    if not _silenced.get() and not _library().utils.are_progress_bars_disabled():
        text = f"note: {name}: fetches {files} file{'s' * (files != 1)}, {format_bytes(nbytes)} (commit {commit})"
        print(text, file=sys.stderr)


def _storage(repository: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise HubError(
            "models on the hub are fetched by huggingface_hub, which is not installed: pip install 'resm-kernels[hub]'"
        ) from error
    return huggingface_hub


def _connection_errors() -> tuple[type[Exception], ...]:
    """Return the kinds of errors of a request: the HTTP library's own, whichever huggingface_hub uses, and OSError."""
    return (_library().errors.HTTPError, OSError)


@contextlib.contextmanager
def _named(repository: str, revision: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into HubErrors that name the repository and say what to do."""
    hub = _library()
    errors, page = hub.errors, f"{hub.constants.ENDPOINT}/{repository}"
    name = shown_name(repository, revision)
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{name}: the hub gives it only to users who have accepted its conditions: accept them at {page}, and log "
            "in (hf auth login) or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{name}: is no folder here, and the hub has no repository {page}, or it is private; check the name, and "
            "for a private one log in (hf auth login) or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{name}: the hub's repository has no branch, tag or commit {shortened(revision)}") from error
    except (errors.HFValidationError, errors.EntryNotFoundError) as error:
        raise HubError(f"{name}: {first_line(error)}") from error
    except _connection_errors() as error:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            what = (
                f"the hub refuses access ({status}); log in (hf auth login) or set HF_TOKEN to a token that may read it"
            )
        else:
            what = (
                f"cannot be fetched from {hub.constants.ENDPOINT} ({first_line(error)}); run the same command again, "
                "which goes on with what is there"
            )
        raise HubError(f"{name}: {what}") from error


def _one_line(name: str) -> type[Any]:
    """Return a class of progress bars that shows one of them, the bytes of all files, or none within `silenced`."""
    base: Any = _library().utils.tqdm
    is_silent = _silenced.get()  # of this thread; the bars are made in others

    class OneLine(base):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            is_shown = options.get("unit") == "B" and options.get("name") == "huggingface_hub.snapshot_download"
            if is_shown and not is_silent:
                options |= {"desc": name, "leave": False}
                options.pop("bar_format", None)
            else:
                options["disable"] = True
            super().__init__(*arguments, **options)

        def set_description(self, *_: Any, **__: Any) -> None:
            """Keep the name."""

    return OneLine
