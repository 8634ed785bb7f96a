"""The hint that ends an error about an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


def did_you_mean(name: Any, known: Sequence[str]) -> str:
    """Return ", did you mean 'ties'?" if one of the known names resembles `name`, else an empty string."""
    nearest_names = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {nearest_names[0]!r}?" if nearest_names else ""
