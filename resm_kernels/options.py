"""The options of merges and of calibrations of checkpoints, which the command line and the functions share.

Importing this module does not import torch, so that the command line can show the defaults in its help at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
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
    keep_intermediates: str | os.PathLike[str] | None
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
    keep_intermediates: str | os.PathLike[str] | None = None
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


class MergeLoraKeywords(TypedDict, total=False):
    """The types of the keyword arguments that `MergeLoraOptions` and `merge_lora` share."""

    rank: int | None
    energy: float | None
    max_rank: int | None
    uniform_rank: bool
    dtype: torch.dtype | None
    accuracy: float
    random_seed: int
    overwrite: bool
    threads: int | None


@dataclass(frozen=True, kw_only=True)
class MergeLoraOptions:
    """How adapters are merged to one; `merge_lora` documents the keyword arguments.

    Raises:
        ValueError: An option is out of its range.
    """

    rank: int | None = None
    energy: float | None = None
    max_rank: int | None = None
    uniform_rank: bool = False
    dtype: torch.dtype | None = None
    accuracy: float = 5e-2
    random_seed: int = 0
    overwrite: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        from resm_kernels.dtypes import ADAPTER_DTYPES

        for name in ("rank", "max_rank"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: got {value}, need at least 1")
        if self.rank is not None and self.energy is not None:
            raise ValueError(f"energy: got {self.energy} and a rank of {self.rank}, need one of the two")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy: got {self.energy}, need a share above 0 and at most 1")
        if self.max_rank is not None and self.energy is None:
            raise ValueError(f"max_rank: got {self.max_rank} without energy, need both: it bounds what energy chooses")
        if not (math.isfinite(self.accuracy) and self.accuracy >= 0):
            raise ValueError(f"accuracy: got {self.accuracy}, need a finite number of at least 0")
        if self.dtype is not None and self.dtype not in ADAPTER_DTYPES:
            raise ValueError(f"dtype: got {self.dtype}, need one of {', '.join(map(str, ADAPTER_DTYPES))}")
        check_threads(self.threads)
        check_seed("random_seed", self.random_seed)


class SearchKeywords(TypedDict, total=False):
    """The types of the keyword arguments that `SearchOptions` and `search_recipes` share."""

    trials: int | None
    time: str | float | None
    sampler: str
    objectives: Sequence[str] | None
    questions: int | None
    prefix: int | None
    held_out: bool
    best_by: str
    random_seed: int
    dtype: str
    device: str | torch.device
    threads: int | None
    memory_limit: str | int
    allow_changed_evaluate: bool


SAMPLERS: Final = ("tpe", "cmaes", "nsga2", "random")
"""Optuna's samplers by the names of the command line."""
BEST_BY: Final = ("mean", "worst")
"""What of a trial's objectives says which trial is the best."""
LIVE_MEMORY: Final = "4GB"
"""Default of what is kept between merges into memory."""
_UNITS: Final = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How recipes are searched for; `search_recipes` documents the keyword arguments.

    Attributes:
        seconds: `time` in seconds, or None.

    Raises:
        ValueError: An option is out of its range.
    """

    trials: int | None = None
    time: str | float | None = None
    sampler: str = "tpe"
    objectives: Sequence[str] | None = None
    questions: int | None = None
    prefix: int | None = None
    held_out: bool = True
    best_by: str = "mean"
    random_seed: int = 0
    dtype: str = "float32"
    device: str | torch.device = "cpu"
    threads: int | None = None
    memory_limit: str | int = LIVE_MEMORY
    allow_changed_evaluate: bool = False
    seconds: float | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", None if self.time is None else _parse_time(self.time))
        if self.trials is None and self.time is None:
            raise ValueError("trials: got none and no time, need one of the two limits")
        for name in ("trials", "questions", "prefix"):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (is_whole and value >= 1):
                raise ValueError(f"{name}: got {shortened(value)}, need a whole number, at least 1")
        if self.prefix is not None and self.questions is not None and self.prefix >= self.questions:
            raise ValueError(f"prefix: got {self.prefix}, need less than the {self.questions} questions")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: got {shortened(self.sampler)}, need one of {', '.join(SAMPLERS)}")
        if self.best_by not in BEST_BY:
            raise ValueError(f"best_by: got {shortened(self.best_by)}, need {' or '.join(BEST_BY)}")
        if isinstance(self.objectives, str):
            raise ValueError(f"objectives: got {shortened(self.objectives)}, need a list of names of scores")
        if self.objectives is not None and (not self.objectives or len(set(self.objectives)) < len(self.objectives)):
            raise ValueError(f"objectives: got {shortened(self.objectives)}, need names of scores, each once")
        if self.dtype not in _SEARCH_DTYPES:
            raise ValueError(f"dtype: got {shortened(self.dtype)}, need one of {', '.join(_SEARCH_DTYPES)}")
        check_threads(self.threads)
        check_seed("random_seed", self.random_seed)

    def job(self) -> dict[str, Any]:
        """The options on which the scores of a trial depend, or which values are tried."""
        names = ("sampler", "objectives", "questions", "prefix", "random_seed", "dtype")
        return {name: list(v) if isinstance(v := getattr(self, name), (list, tuple)) else v for name in names}


_SEARCH_DTYPES: Final = ("float32", "bfloat16", "float16")


def _parse_time(time: str | float) -> float:
    """Return the seconds that a text such as 90, 30min or 1.5h states."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([a-z]*)\s*", str(time).lower())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ValueError(f"time: got {shortened(time)}, need a time above 0 such as 1h, 30min or 90s")
    return float(match[1]) * _UNITS[match[2]]


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
    strict: bool


EMBEDDINGS: Final = ("merged", "token-counts")
"""Where calibrated models have their embeddings from."""
RIDGE: Final = 1e-3
POLISHED_RIDGE: Final = 0.1
"""Defaults of `ridge`, for least squares alone and before a polish. Alone, least squares have to fit what they can; a
polish fits the rest, and gets further from weights that stayed nearer to the merge."""
# The options that change nothing but where and in which pieces the work is done.
_NO_JOB: Final = ("answers", "device", "threads", "overwrite", "restart", "max_shard_size", "strict")


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
    strict: bool = False

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
