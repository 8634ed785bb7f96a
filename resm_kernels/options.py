"""The options of merges and of calibrations of checkpoints, which the command line and the functions share.

Importing this module does not import torch, so that the command line can show the defaults in its help at once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict

from resm_kernels.files import shortened

if TYPE_CHECKING:
    import torch

MAX_THREADS: Final = 4096
"""The most threads that may be asked for: more than any machine has cores."""


class MergeKeywords(TypedDict, total=False):
    """The types of the keyword arguments that `MergeOptions` and `merge_checkpoints` share."""

    max_shard_size: str | int
    overwrite: bool
    restart: bool
    hash_inputs: bool
    memory_limit: str | int
    threads: int | None
    device: str | torch.device
    device_memory: str | int | None
    random_seed: int
    copy_tokenizer: bool
    model_card: bool
    mixed_architectures: bool
    trust_remote_code: bool
    out_format: str
    engine: str
    address: str | None
    workers: int | None
    strict: bool
    tied_embeddings: str


OUT_FORMATS: Final = ("safetensors", "dcp")
"""The formats that a merge writes weights in."""
TIED_EMBEDDINGS: Final = ("error", "untie", "both")
"""What a merge does with an adapter that changes one of two tied tensors: an embedding, or its output head."""
ENGINES: Final = ("local", "ray")
"""Who merges: this process, or workers on the machines of a Ray cluster."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How a merge of checkpoints is carried out; the recipe says what is merged.

    `merge_checkpoints` documents the keyword arguments.

    Attributes:
        shard_bytes: `max_shard_size` in bytes.
        window_bytes: `memory_limit` in bytes.
        device_bytes: `device_memory` in bytes, or None.

    Raises:
        ValueError: A size cannot be read, a number is out of its range, there is no such format or engine, or the
            engine does not have an option.
    """

    max_shard_size: str | int = "5GB"
    overwrite: bool = False
    restart: bool = False
    hash_inputs: bool = False
    memory_limit: str | int = "512MiB"
    threads: int | None = None
    device: str | torch.device = "cpu"
    device_memory: str | int | None = None
    random_seed: int = 0
    copy_tokenizer: bool = True
    model_card: bool = True
    mixed_architectures: bool = False
    trust_remote_code: bool = False
    out_format: str = "safetensors"
    engine: str = "local"
    address: str | None = None
    workers: int | None = None
    strict: bool = False
    tied_embeddings: str = "error"
    shard_bytes: int = field(init=False, repr=False)
    window_bytes: int = field(init=False, repr=False)
    device_bytes: int | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from resm_kernels.checkpoint import parse_size

        device_bytes = None if self.device_memory is None else parse_size(self.device_memory, "device_memory")
        object.__setattr__(self, "device_bytes", device_bytes)
        object.__setattr__(self, "shard_bytes", parse_size(self.max_shard_size, "max_shard_size"))
        object.__setattr__(self, "window_bytes", parse_size(self.memory_limit, "memory_limit"))
        check_threads(self.threads)
        check_seed("random_seed", self.random_seed)
        if self.out_format not in OUT_FORMATS:
            raise ValueError(f"out_format: got {self.out_format!r}, need {' or '.join(OUT_FORMATS)}")
        if self.tied_embeddings not in TIED_EMBEDDINGS:
            raise ValueError(f"tied_embeddings: got {self.tied_embeddings!r}, need {', '.join(TIED_EMBEDDINGS)}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers: got {self.workers}, need at least 1")
        if self.engine not in ENGINES:
            raise ValueError(f"engine: got {self.engine!r}, need {' or '.join(ENGINES)}")
        for name in ("address", "workers"):
            if self.engine != "ray" and getattr(self, name) is not None:
                raise ValueError(f"{name}: got {getattr(self, name)!r} with engine: {self.engine}, need engine: ray")
        if self.engine == "ray" and str(self.device) not in ("cpu", "cuda"):
            raise ValueError(
                f"device: got '{self.device}', need cpu or cuda with engine: ray, where each worker has one GPU"
            )


def check_threads(threads: int | None) -> None:
    """Raise a ValueError unless `threads` is None or a number of threads that a process may have."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads: got {shortened(threads)}, need 1 to {MAX_THREADS}")


def check_seed(name: str, seed: int) -> None:
    """Raise a ValueError unless the option `name` is a whole number of 64 bits."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{name}: got {shortened(seed)}, need a whole number of 64 bits")


class CalibrateKeywords(TypedDict, total=False):
    """The types of the keyword arguments that `CalibrateOptions` and `calibrate_checkpoint` share."""

    least_squares: bool
    polish_steps: int
    answer_weight: float
    ridge: float | None
    embeddings: str
    learning_rate: float
    held_out: float
    max_prompts: int | None
    max_prompt_tokens: int
    max_new_tokens: int
    batch_tokens: int
    answers: Path | None
    seed: int
    device: str | torch.device
    threads: int | None
    max_shard_size: str | int
    overwrite: bool
    restart: bool


EMBEDDINGS: Final = ("merged", "token-counts")
"""Where calibrated models have their embeddings from."""
RIDGE: Final = 1e-3
POLISHED_RIDGE: Final = 0.1
"""Defaults of `ridge`, for least squares alone and before a polish. Alone, least squares have to fit what they can; a
polish fits the rest, and gets further from weights that stayed nearer to the merge."""
# The options that change nothing but where and in which pieces the work is done.
_NO_JOB: Final = ("answers", "device", "threads", "overwrite", "restart", "max_shard_size")


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """How a merge is calibrated; `calibrate_checkpoint` documents the keyword arguments.

    Raises:
        ValueError: An option is out of its range.
    """

    least_squares: bool = True
    polish_steps: int = 0
    answer_weight: float = 10.0
    ridge: float | None = None
    embeddings: str = "token-counts"
    learning_rate: float = 3e-4
    held_out: float = 0.1
    max_prompts: int | None = None
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 64
    batch_tokens: int = 4096
    answers: Path | None = None
    seed: int = 0
    device: str | torch.device = "cpu"
    threads: int | None = None
    max_shard_size: str | int = "5GB"
    overwrite: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        for name in ("answer_weight", "ridge", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: got {value}, need a finite number above 0")
        for name, least in (("polish_steps", 0), ("max_prompt_tokens", 1), ("max_new_tokens", 1), ("batch_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, need at least {least}")
        check_threads(self.threads)
        check_seed("seed", self.seed)
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"max_prompts: got {self.max_prompts}, need at least 1")
        if self.embeddings not in EMBEDDINGS:
            raise ValueError(f"embeddings: got {self.embeddings!r}, need {' or '.join(EMBEDDINGS)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: got {self.held_out}, need a share above 0 and below 1")
        if not self.least_squares and not self.polish_steps:
            raise ValueError("least_squares: got False and polish_steps 0, so nothing would be done; need one of both")

    @property
    def chosen_ridge(self) -> float:
        """`ridge`, or its default."""
        if self.ridge is not None:
            return self.ridge
        return POLISHED_RIDGE if self.polish_steps else RIDGE

    def job(self) -> dict[str, Any]:
        """The options on which the result depends."""
        options = asdict(self) | {"ridge": self.chosen_ridge}
        return {name: value for name, value in options.items() if name not in _NO_JOB}
