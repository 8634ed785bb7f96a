"""The hint that ends an error about an unknown name."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from typing import Any, Final

# Comparing takes time in the product of the lengths, and names and known names may come from files.
_LONGEST: Final = 200
_MOST: Final = 5000


def did_you_mean(name: Any, known: Sequence[str]) -> str:
    """Return ", did you mean 'ties'?" if one of the known names resembles `name`, else an empty string."""
    if not isinstance(name, str) or len(name) > _LONGEST:
        return ""
    nearest_names = difflib.get_close_matches(name, list(itertools.islice(known, _MOST)), n=1)
    return f", did you mean {nearest_names[0]!r}?" if nearest_names else ""
