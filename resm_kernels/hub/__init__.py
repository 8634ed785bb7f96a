"""Models on the Hugging Face hub: `owner/name` and `owner/name@revision` become local folders.

`model_of` returns the folder of a repository in huggingface_hub's cache, after fetching what is not there yet. Within
`headers_alone` no weights are fetched: of a repository that is not there yet, `model_of` returns a folder of
placeholders, whose headers are read from the hub, so that a merge can be planned, and refused, before the download.
"""

from __future__ import annotations

from resm_kernels.hub.client import HubError, silenced
from resm_kernels.hub.models import (
    UnseenWeights,
    View,
    begin,
    cached_commit,
    headers_alone,
    is_cached,
    model_of,
    parse_id,
)

__all__ = [
    "HubError",
    "UnseenWeights",
    "View",
    "begin",
    "cached_commit",
    "headers_alone",
    "is_cached",
    "model_of",
    "parse_id",
    "silenced",
]
