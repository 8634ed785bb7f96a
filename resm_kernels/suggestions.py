"""The hint that errors about unknown names end with."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


def did_you_mean(name: Any, known: Sequence[str]) -> str:
    """ ", did you mean 'ties'?" if one of the known names is like the one that was given, else nothing."""
    nearest = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else ""
