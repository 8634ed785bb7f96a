"""What a merge is made from, by which unfinished work is known again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from resm_kernels._version import __version__
from resm_kernels.checkpoint.auxiliary import CONFIG_FILE, TOKENIZER_PATTERNS
from resm_kernels.checkpoint.tensor_writer import stored_hash
from resm_kernels.engine.statistics import statistics_files

if TYPE_CHECKING:
    from resm_kernels.engine.plan import MergePlan

_HEAD: Final = 2**20
_SUFFIX: Final = ".safetensors"


def merge_job(plan: MergePlan) -> dict[str, Any]:
    """Return what the result of a merge depends on, by the names that errors use.

    Of each input file these are its size, the time of its last change, and a hash of its header; of files that are not
    in the format of safetensors, a hash of their first MiB. With the option `hash_inputs` it is a hash of its content.
    """
    entries: dict[str, Any] = {
        "recipe": plan.recipe.text,
        "version of the libraries": {"resm-kernels": __version__, "torch": torch.__version__},
        "random_seed": plan.options.random_seed,
        "max_shard_size": plan.options.shard_bytes,
        "tied_embeddings": plan.options.tied_embeddings,
    }
    if plan.roles_from:
        # Without transformers some roles may be others.
        entries["roles of the tensors"] = plan.roles_from
    state = _content if plan.options.hash_inputs else _state
    return entries | {f"input file {file}": state(file) for file in _input_files(plan)}


def record_facts(plan: MergePlan) -> dict[str, Any]:
    """Return what the record in the output says of the merge: the recipe's SHA-256 and the random seed."""
    recipe = hashlib.sha256(plan.recipe.text.encode()).hexdigest()
    return {"recipe": recipe, "random_seed": plan.options.random_seed}


def _input_files(plan: MergePlan) -> list[Path]:
    files = set(statistics_files(plan.statistics))
    patterns = (CONFIG_FILE, *(TOKENIZER_PATTERNS if plan.tokenizer is not None else ()))
    for model in plan.models.all():
        files |= set(model.reader.files)
        files |= {file for pattern in patterns for file in model.base_folder.glob(pattern)}
    return sorted(file.resolve() for file in files)


def _content(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        return {"content": stored_hash(file, stream.fileno(), 0, file.stat().st_size)}


def _state(file: Path) -> dict[str, Any]:
    status = file.stat()
    with open(file, "rb") as stream:
        start = stream.read(8)
        rest = int.from_bytes(start, "little") if file.suffix == _SUFFIX else _HEAD
        head = hashlib.sha256(start + stream.read(min(rest, status.st_size))).hexdigest()
    return {"size": status.st_size, "time of its last change": status.st_mtime_ns, "header": head}
