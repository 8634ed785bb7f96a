"""Which files of a repository are needed, where they are, and a folder of placeholders for those not fetched yet."""

from __future__ import annotations

import contextlib
import contextvars
import fnmatch
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from resm_kernels.checkpoint.auxiliary import CONFIG_FILE
from resm_kernels.checkpoint.format import CheckpointError
from resm_kernels.checkpoint.forms import ADAPTER_FILE, MODULES_FILE, PIPELINE_FILE, SMALL_FILES, weight_files
from resm_kernels.checkpoint.reader import INDEX_SUFFIX, WEIGHTS_SUFFIX
from resm_kernels.checkpoint.remote import set_source
from resm_kernels.files import LIST_BYTES
from resm_kernels.files.regular import COPY_BYTES
from resm_kernels.hub.client import (
    MAIN,
    HubError,
    Listing,
    announce,
    cached_folder,
    check_space,
    download,
    list_files,
    read_range,
    shown_name,
    snapshot_folder,
    storage_exists,
)

_ID: Final = re.compile(r"(?P<repository>[A-Za-z0-9_][\w.-]*/[\w.-]+)(?:@(?P<revision>(?!.*\.\.)[^/@+\s][^@+\s]*))?")
_ADAPTER_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")
_WEIGHTS: Final = (WEIGHTS_SUFFIX, ".bin", ".gguf")
_FIRST: Final = 100_000
"""Bytes of a file that are asked for first; most headers fit into them (huggingface_hub asks for as many)."""
_THREADS: Final = 8
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


@dataclass
class View:
    """What `headers_alone` has seen.

    Attributes:
        missing: Repositories whose weights are not here, by their placeholders' folder, each with the missing files.
    """

    missing: dict[Path, tuple[Listing, list[str]]] = field(default_factory=dict)
    _root: tempfile.TemporaryDirectory[str] | None = None
    _files: list[Path] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that have to be fetched."""
        return sum(listing.sizes[name] for listing, names in self.missing.values() for name in names)

    def check_space(self) -> None:
        """Raise a HubError if the cache has no room for the missing files."""
        if self.missing:  # huggingface_hub is imported only if it is needed
            check_space(self.nbytes, [listing.name for listing, _ in self.missing.values()])

    def fetch(self) -> None:
        """Fetch the weights of all of them."""
        self.check_space()
        for listing, names in self.missing.values():
            _fetch(listing, names)

    def shown(self, text: str) -> str:
        """Return a text with the ids of models in place of their placeholders' folders."""
        for folder, (listing, _) in self.missing.items():
            text = text.replace(str(folder), listing.name)
        return text

    def place(self, listing: Listing) -> Path:
        """Return a new folder for the placeholders of a repository."""
        if self._root is None:
            self._root = tempfile.TemporaryDirectory(prefix="resm-kernels-")
        folder = Path(self._root.name, str(len(self.missing)), listing.repository)
        folder.mkdir(parents=True)
        return folder

    def add_source(self, listing: Listing, name: str, file: Path) -> None:
        """Have the bytes of a placeholder read from the hub."""

        def fetch(first: int, buffer: memoryview) -> None:
            buffer[:] = read_range(listing, name, first, len(buffer))[0] if len(buffer) else b""

        self._files.append(file)
        set_source(file, fetch)

    def close(self) -> None:
        """Remove the placeholders."""
        for file in self._files:
            set_source(file, None)
        if self._root is not None:
            self._root.cleanup()


_view: contextvars.ContextVar[View | None] = contextvars.ContextVar("view", default=None)
_listings: dict[tuple[str, str], Listing | None] = {}
"""What the hub has said; one merge uses one commit of a branch, however often it asks."""


def begin() -> None:
    """Forget what the hub has said, so that branches are looked up anew."""
    _listings.clear()


@contextlib.contextmanager
def headers_alone() -> Iterator[View]:
    """Fetch no weights within this context: `model_of` returns folders of placeholders, which the view knows.

    The caller closes the view when nothing reads from these folders any more.
    """
    view = View()
    token = _view.set(view)
    try:
        yield view
    except BaseException:
        view.close()
        raise
    finally:
        _view.reset(token)


def parse_id(text: str) -> tuple[str, str] | None:
    """Return repository and revision of `owner/name` or `owner/name@revision`; None for any other text."""
    match = _ID.fullmatch(text)
    return None if match is None else (match["repository"], match["revision"] or MAIN)


def model_of(repository: str, revision: str, *, weights: bool = True) -> Path:
    """Return a local folder with the files of a model or an adapter on the hub.

    Weights are chosen as from a local folder: safetensors before pickled files, and GGUF only if there is nothing else.
    Small files come with them; folders such as `original` and `onnx` and all other files stay on the hub.

    Args:
        weights: Fetch the weights too (default); a repository without weights is an error then.

    Raises:
        HubError: The hub has no such repository or revision or none that this user may read, it cannot be reached, a
            file is damaged, or there is no room for what has to be fetched.
    """
    listing = _listed(repository, revision)
    if listing is None:
        folder = cached_folder(repository, revision)
        if folder is None:
            raise HubError(
                f"{shown_name(repository, revision)}: is no folder here, and its files are not in the cache; "
                "HF_HUB_OFFLINE is set: unset it to fetch them"
            )
        return folder
    folder = snapshot_folder(listing)
    small = _small_files(listing)
    if absent := [name for name in small if not (folder / name).exists()]:
        download(listing, absent, revision=revision)
    if not weights:
        return folder
    view = _view.get()
    if view is not None:
        known = next((place for place, (other, _) in view.missing.items() if other is listing), None)
        if known is not None:
            return known
    with tempfile.TemporaryDirectory(prefix="resm-kernels-") as root:
        needed = _weights(listing, small, folder, Path(root, listing.repository))
    missing = [name for name in needed if not (folder / name).exists()]
    if not missing:
        return folder
    if view is None:
        check_space(sum(listing.sizes[name] for name in missing), [listing.name])
        _fetch(listing, missing)
        return folder
    if not all(name.endswith(WEIGHTS_SUFFIX) for name in missing):
        raise UnseenWeights(listing, missing)
    place = view.place(listing)
    view.missing[place] = (listing, missing)
    for name in (*small, *(name for name in needed if name not in missing)):
        _link(place / name, folder / name)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda name: _placeholder(view, listing, name, place / name), missing))
    return place


class UnseenWeights(HubError):
    """Weights whose tensors are known only when the whole file is here: pickled files and GGUF."""

    def __init__(self, listing: Listing, names: Sequence[str]) -> None:
        super().__init__(
            f"{listing.name}: its weights are in {names[0]}, whose tensors are known only when it has been fetched; "
            f"fetch it first (hf download {listing.repository}), or merge without a dry run"
        )
        self._missing = listing, names

    def fetch(self) -> None:
        """Fetch them."""
        listing, names = self._missing
        check_space(sum(listing.sizes[name] for name in names), [listing.name])
        _fetch(listing, names)


def cached_commit(folder: Path) -> tuple[str, str] | None:
    """Return the repository and commit of a folder in the hub's cache; None for any other folder."""
    real = folder.resolve()
    owner = real.parent.parent.name
    if real.parent.name != "snapshots" or not owner.startswith("models--") or not _COMMIT.fullmatch(real.name):
        return None
    return owner.removeprefix("models--").replace("--", "/", 1), real.name


def is_cached(text: str) -> bool:
    """Return True if a text is a hub id, and the cache has something of that repository."""
    found = parse_id(text)
    return found is not None and storage_exists(found[0])


def _listed(repository: str, revision: str) -> Listing | None:
    key = (repository, revision)
    if key not in _listings:
        _listings[key] = list_files(repository, revision)
    return _listings[key]


def _small_files(listing: Listing) -> list[str]:
    """Return the files that may belong to the model beside its weights."""
    has_parts = PIPELINE_FILE in listing.sizes or MODULES_FILE in listing.sizes
    names = []
    for name, size in listing.sizes.items():
        top, _, rest = name.partition("/")
        inner = [rest] if rest and (has_parts or top.endswith("_tokenizer")) else []
        is_small = name.endswith(".py") or any(map(_is_small, (name, *inner)))
        if is_small and size <= (LIST_BYTES if name.endswith(".json") else COPY_BYTES):
            names.append(name)
    return names


def _is_small(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in SMALL_FILES)


def _weights(listing: Listing, small: Sequence[str], folder: Path, sketch: Path) -> list[str]:
    """Return the weight files that are needed: those that would be read from a folder with all of them."""
    sketch.mkdir(parents=True)
    for name in small:
        _link(sketch / name, folder / name)
    for name in listing.sizes:
        if name.endswith(_WEIGHTS):
            (sketch / name).parent.mkdir(parents=True, exist_ok=True)
            (sketch / name).touch()
    try:
        files = [file.relative_to(sketch).as_posix() for file in weight_files(sketch)]
    except CheckpointError as error:
        adapter = next((name for name in _ADAPTER_WEIGHTS if name in listing.sizes), None)
        if adapter is None or ADAPTER_FILE not in listing.sizes:
            raise HubError(str(error).replace(str(sketch), listing.name)) from error
        return [adapter]
    weights = [name for name in files if not name.endswith(".index.json")]
    if absent := next((name for name in weights if name not in listing.sizes), None):
        index = next((name for name in files if name.endswith(INDEX_SUFFIX)), CONFIG_FILE)
        raise HubError(f"{listing.name}: the hub has no file {absent}, which {index} names")
    return weights


def _fetch(listing: Listing, names: Sequence[str]) -> None:
    announce(listing.name, listing.commit, len(names), sum(listing.sizes[name] for name in names))
    download(listing, names, revision=listing.commit)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(os.path.realpath(target), link)


def _placeholder(view: View, listing: Listing, name: str, file: Path) -> None:
    """Make a file of the size of one on the hub that holds its header, and reads as zeros behind it."""
    start, size = read_range(listing, name, 0, _FIRST)
    length = 8 + int.from_bytes(start[:8], "little")
    if len(start) < length <= min(size, 8 + LIST_BYTES):
        start += read_range(listing, name, len(start), length - len(start))[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(file, "wb") as stream:
            stream.write(start[:length])
            stream.truncate(size)
    except OSError as error:
        raise HubError(
            f"{listing.name}: {name}: no placeholder of {size} bytes can be made: {error.strerror}"
        ) from error
    view.add_source(listing, name, file)
