"""The options of a merge of checkpoints, which the command line, `merge_checkpoints` and the plan share.

Importing this module does not import torch, so that the command line can show the defaults in its help at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How a merge of checkpoints is carried out; what is merged is the recipe's.

    Attributes:
        max_shard_size: The most bytes of tensor data in one output file, such as "5GB", "512MiB" or a number of bytes.
        overwrite: Replace the output folder if it is a model folder.
        memory_limit: Bytes of tensor data to keep in flight, as a size like `max_shard_size`.
        threads: Number of threads to compute with; None leaves torch's setting.
        device: Where to compute, as for `engine.devices.devices_by_name`.
        device_memory: Bytes that tensors may take on each GPU, as a size like `max_shard_size`; None for 0.8 of what is
            free there.
        random_seed: Whole number that methods which draw random numbers derive them from.
        copy_tokenizer: Copy the tokenizer's files if the recipe does not ask for a new tokenizer.
        model_card: Write README.md and the recipe beside the weights.
        mixed_architectures: Merge models of different architectures if their tensors have the same names and shapes.
        trust_remote_code: Run code that models bring along to load their tokenizers, where vocabularies are merged.
        shard_bytes: `max_shard_size` in bytes.
        window_bytes: `memory_limit` in bytes.
        device_bytes: `device_memory` in bytes, or None.

    Raises:
        ValueError: A size that cannot be read, or fewer than one thread.
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
