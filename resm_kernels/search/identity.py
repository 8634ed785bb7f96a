"""What says that a search goes on with the function that it began with: its source, and the files that it reads."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from resm_kernels.checkpoint import CheckpointReader
from resm_kernels.checkpoint.tensor_writer import stored_hash
from resm_kernels.files import opened, shortened
from resm_kernels.search.errors import SearchError

SOURCE: Final = "source of evaluate"
SETTINGS: Final = "settings of evaluate"
_FILE: Final = "file that evaluate reads: "


def evaluate_job(function: Any, spec: str | None) -> dict[str, Any]:
    """Return what is known of the function that judges merges, by the names that errors use.

    Of a function that was named as `module:function` this is a hash of the module's file, of another one a hash of its
    own source: the script that it stands in may change between two calls. If the function has an attribute `files`, the
    content of these files counts too, and the weights of those that are folders of models; and if it has `settings`, as
    the ready functions do, what this mapping holds.

    Args:
        function: The function.
        spec: How the command line names it; None for a function that was passed.

    Raises:
        SearchError: One of its files cannot be read; or `files` is no list, or `settings` is nothing that JSON holds.
    """
    entries: dict[str, Any] = {} if spec is None else {"evaluate": spec}
    if source := _source(function, spec):
        entries[SOURCE] = source
    if isinstance(settings := getattr(function, "settings", None), Mapping):
        try:
            entries[SETTINGS] = json.loads(json.dumps(dict(settings), default=str))
        except (TypeError, ValueError, RecursionError) as error:
            raise SearchError(f"evaluate: the function's attribute settings: {error}; need what JSON holds") from error
    files = getattr(function, "files", ())
    is_list = isinstance(files, (list, tuple, set, frozenset))
    if not is_list or not all(isinstance(file, (str, os.PathLike)) for file in files):
        raise SearchError(f"evaluate: the function's attribute files is {shortened(files)}, need a list of paths")
    for file in sorted({os.path.abspath(f) for f in files}):
        entries[_FILE + file] = _content(Path(file))
    return entries


def is_of_evaluate(entry: str) -> bool:
    """Return True for entries that say what the function is and reads, but for its name."""
    return entry in (SOURCE, SETTINGS) or entry.startswith(_FILE)


def _source(function: Any, spec: str | None) -> Mapping[str, str]:
    if spec is not None:
        name = spec.partition(":")[0]
        file = getattr(sys.modules.get(name), "__file__", None)
        return {} if file is None else {name: _content(Path(file))}
    while hasattr(function, "func"):  # of functools.partial
        function = function.func
    function = inspect.unwrap(function) if callable(function) else function
    own = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    try:
        text = inspect.getsource(own)
    except (OSError, TypeError):  # of functions that were typed in, or written in C
        return {}
    return {own.__qualname__: hashlib.sha256(text.encode(errors="replace")).hexdigest()}


def _content(path: Path) -> str:
    if path.is_dir():
        with CheckpointReader(path) as reader:
            return reader.fingerprint()
    with opened(path, SearchError, "need the file that evaluate reads") as descriptor:
        return stored_hash(path, descriptor, 0, os.fstat(descriptor).st_size)
