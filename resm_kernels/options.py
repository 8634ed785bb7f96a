"""The options of a merge of checkpoints, which the command line, `merge_checkpoints` and the plan share.

Importing this module does not import torch, so that the command line can show the defaults in its help at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch


class MergeKeywords(TypedDict, total=False):
    """The types of the keyword arguments that `MergeOptions` and `merge_checkpoints` share."""

    max_shard_size: str | int
    overwrite: bool
    memory_limit: str | int
    threads: int | None
    device: str | torch.device
    device_memory: str | int | None
    random_seed: int
    copy_tokenizer: bool
    model_card: bool
    mixed_architectures: bool
    trust_remote_code: bool


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How a merge of checkpoints is carried out; the recipe says what is merged.

    `merge_checkpoints` documents the keyword arguments.

    Attributes:
        shard_bytes: `max_shard_size` in bytes.
        window_bytes: `memory_limit` in bytes.
        device_bytes: `device_memory` in bytes, or None.

    Raises:
        ValueError: A size cannot be read, or there is less than one thread.
    """

    max_shard_size: str | int = "5GB"
    overwrite: bool = False
    memory_limit: str | int = "512MiB"
    threads: int | None = None
    device: str | torch.device = "cpu"
    device_memory: str | int | None = None
    random_seed: int = 0
    copy_tokenizer: bool = True
    model_card: bool = True
    mixed_architectures: bool = False
    trust_remote_code: bool = False
    shard_bytes: int = field(init=False, repr=False)
    window_bytes: int = field(init=False, repr=False)
    device_bytes: int | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from resm_kernels.checkpoint import parse_size

        device_bytes = None if self.device_memory is None else parse_size(self.device_memory, "device_memory")
        object.__setattr__(self, "device_bytes", device_bytes)
        object.__setattr__(self, "shard_bytes", parse_size(self.max_shard_size, "max_shard_size"))
        object.__setattr__(self, "window_bytes", parse_size(self.memory_limit, "memory_limit"))
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads: got {self.threads}, need at least 1")
