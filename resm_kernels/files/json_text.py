"""Reads JSON within limits; unlike the standard library it refuses equal keys, 1e400 and halves of surrogate pairs."""

from __future__ import annotations

import json
import math
from typing import Any, Final

from resm_kernels.files.regular import FilePath, decoded, read_bytes
from resm_kernels.files.structure import MAX_DEPTH, MAX_DIGITS, MAX_VALUES, Flaw, check_structure, shortened

CONFIG_BYTES: Final = 1 << 24
"""The largest configuration, in bytes: a hundred times the longest that models have."""
LIST_BYTES: Final = 100_000_000
"""The largest list of tensors or tokens, in bytes; the safetensors library has the same limit for headers."""


def read_object(
    file: FilePath, raising: type[ValueError], *, limit: int = CONFIG_BYTES, missing: str = ""
) -> dict[str, Any]:
    """Return the JSON object that a regular file of at most `limit` bytes holds; see `parse_json`.

    Args:
        missing: What the error about a missing file says after "no such file".

    Raises:
        raising: The file cannot be read, or does not hold one.
    """
    return parse_object(read_bytes(file, raising, limit=limit, missing=missing), str(file), raising)


def parse_object(content: bytes, where: str, raising: type[ValueError], *, strict: bool = False) -> dict[str, Any]:
    """Return the JSON object that `content` is; see `parse_json`."""
    data = parse_json(content, where, raising, strict=strict)
    if not isinstance(data, dict):
        raise raising(f"{where}: got a JSON {type(data).__name__}, need an object")
    return data


def parse_json(content: bytes | str, where: str, raising: type[ValueError], *, strict: bool = False) -> Any:
    """Return the value that JSON states.

    Args:
        content: JSON in UTF-8, with or without a byte-order mark, or as text.
        where: What the error begins with, such as the name of the file.
        raising: The kind of the error.
        strict: Refuse `NaN` and `Infinity`, which are no JSON. Python writes them, and some configurations have them.

    Raises:
        raising: The content is not JSON; an object has a key twice; it is nested more than 64 levels deep, has more
            than 5 million values, a whole number of more than 100 digits, a number beyond float64's range, or a text
            that UTF-8 cannot express. The message names line and column, or the keys that lead to the value.
    """
    text = content if isinstance(content, str) else decoded(content, where, raising)
    # Every value but the first follows one of these, so that data of too many values are refused before they are made.
    if sum(map(text.count, "[{,")) > 2 * MAX_VALUES:
        raise raising(f"{where}: has more than {MAX_VALUES} values, need at most so many")
    try:
        data = json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_float=_finite,
            parse_int=_bounded,
            parse_constant=_refused if strict else None,
        )
    except RecursionError:
        raise raising(f"{where}: is nested more than {MAX_DEPTH} levels deep, need at most so many") from None
    except ValueError as error:
        raise raising(f"{where}: cannot be read as JSON: {error}") from error
    check_structure(data, where, raising)
    return data


def _distinct(pairs: list[tuple[str, Any]]) -> Any:
    entry = dict(pairs)
    if len(entry) == len(pairs):
        return entry
    seen: set[str] = set()
    # set.add returns None, so that the first key that was seen before is the twin.
    twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return Flaw(f"the key {shortened(twin)} is there twice, need it once")


def _finite(text: str) -> Any:
    value = float(text)
    return value if math.isfinite(value) else Flaw(f"got {shortened(text)[1:-1]}, need a number that float64 can hold")


def _refused(text: str) -> Flaw:
    return Flaw(f"got {text}, which is not JSON")


def _bounded(text: str) -> Any:
    if len(text) > MAX_DIGITS:
        return Flaw(f"got a whole number of more than {MAX_DIGITS} digits, need a smaller one")
    return int(text)
