"""Checks parsed data, from JSON, YAML or a caller, for what would break later: depth, size, numbers, texts."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

MAX_DEPTH: Final = 64
"""How deeply lists and objects may be nested. Configurations of models have a depth below ten."""
MAX_DIGITS: Final = 100
"""Digits of the largest whole number. Tokenizers state 10^30 as "no limit"; every such number is a finite float."""
MAX_VALUES: Final = 5_000_000
"""How many values data may have: more than twice what the tokenizers with the largest vocabularies have."""

_MAX_INTEGER: Final = 10**MAX_DIGITS
_LONG_KEY: Final = 100

Location = tuple[str | int, ...]
"""The keys and list indices that lead to a part of a file: ("slices", 0, "sources", 1, "model")."""

_short = reprlib.Repr()
_short.maxstring, _short.maxother, _short.maxlong = 300, 80, 80  # a path should be whole


def shortened(value: Any) -> str:
    """Return `repr(value)`, cut to a length that fits into an error, whatever the value holds."""
    try:
        return _short.repr(value)
    except ValueError:  # a whole number with more digits than Python writes
        return f"a {type(value).__name__} with a number that is too large to show"


def dotted(location: Location) -> str:
    """Return a location as people write it: slices[0].sources[1].model."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{_key(part)}" for part in location)
    return "".join(parts).removeprefix(".")


def _key(key: str) -> str:
    return key if key.isprintable() and len(key) <= _LONG_KEY else shortened(key)


@dataclass(frozen=True)
class Flaw:
    """Stands for a value that a parser has read and that is refused; `check_structure` says where it is."""

    problem: str


def scalar_problem(value: Any) -> str | None:
    """Return what is wrong with a single value: a number too large, a text that UTF-8 cannot express; else None."""
    if isinstance(value, str):
        if value.isascii():
            return None
        try:
            value.encode()
        except UnicodeEncodeError as error:
            letter = f"\\u{ord(value[error.start]):04x}"
            return f"character {error.start} is {letter}, half of a surrogate pair; need both"
    elif isinstance(value, int) and not -_MAX_INTEGER < value < _MAX_INTEGER:
        return f"got a whole number of more than {MAX_DIGITS} digits, need a smaller one"
    elif isinstance(value, Flaw):
        return value.problem
    return None


def check_structure(
    data: Any,
    where: str,
    raising: type[ValueError],
    *,
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
) -> None:
    """Raise an error if data are nested too deeply, have too many values, or a value that cannot be used.

    A part that stands in several places counts each time, and one that holds itself is nested too deeply, so that the
    work is bounded by `max_values`.

    Args:
        data: Mappings, lists, tuples and single values.
        where: What the error begins with, such as the name of the file.
        raising: The kind of the error.
        max_depth: The deepest nesting; 1 stands for a list of single values.
        max_values: The most values, with the lists and mappings that hold them.
    """
    # A location is a chain from its last part to its first, so that it costs nothing while all is well.
    waiting: list[tuple[Any, int, Any]] = [(data, 0, None)]
    count = 1
    while waiting:
        value, depth, chain = waiting.pop()
        if isinstance(value, Mapping):
            for key in value:
                if problem := scalar_problem(key):
                    raise raising(_message(where, chain, f"key {shortened(key)}: {problem}"))
            parts = [
                (part, depth + 1, (key if isinstance(key, int) else str(key), chain)) for key, part in value.items()
            ]
        elif isinstance(value, (list, tuple)):
            parts = [(part, depth + 1, (i, chain)) for i, part in enumerate(value)]
        else:
            if problem := scalar_problem(value):
                raise raising(_message(where, chain, problem))
            continue
        if depth >= max_depth:
            raise raising(_message(where, chain, f"is nested more than {max_depth} levels deep, need at most so many"))
        count += len(parts)
        if count > max_values:
            raise raising(f"{where}: has more than {max_values} values, need at most so many")
        waiting += parts


def _message(where: str, chain: Any, problem: str) -> str:
    location: list[str | int] = []
    while chain is not None:
        part, chain = chain
        location.append(part)
    # The innermost parts of a deep location say nothing that the outermost do not.
    place = dotted(tuple(reversed(location))[:8]) + ("…" if len(location) > 8 else "")
    return ": ".join(filter(None, (where, place, problem)))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
