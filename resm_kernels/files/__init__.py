"""Reads files that others wrote, which may hold anything: every reader of this library opens and parses through here.

Only regular files are opened, so that no pipe or device blocks the process. Sizes, nesting, numbers and texts have
limits, so that memory and time are bounded by the file's real size. What is wrong is an error of the caller's kind that
names the file, the place in it and the need.
"""

from __future__ import annotations

from resm_kernels.files.json_text import CONFIG_BYTES, LIST_BYTES, parse_json, parse_object, read_object
from resm_kernels.files.patterns import NamePatterns
from resm_kernels.files.regular import (
    check_regular,
    expanded,
    open_regular,
    opened,
    path_problem,
    read_bytes,
    read_text,
    read_up_to,
)
from resm_kernels.files.structure import Location, check_structure, dotted, first_line, shortened

__all__ = [
    "CONFIG_BYTES",
    "LIST_BYTES",
    "Location",
    "NamePatterns",
    "check_regular",
    "check_structure",
    "dotted",
    "expanded",
    "first_line",
    "open_regular",
    "opened",
    "parse_json",
    "parse_object",
    "path_problem",
    "read_bytes",
    "read_object",
    "read_text",
    "read_up_to",
    "shortened",
]
