"""Writes an adapter folder whose ranks are known only when all tensors are there; it appears when it is complete."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointWriter, OutputPlan, json_bytes, plan_output
from resm_kernels.checkpoint.durable import write_errors_named
from resm_kernels.checkpoint.format import byte_view, read_fully, write_fully
from resm_kernels.hub import parse_id
from resm_kernels.lora.config import CONFIG_FILE, PREFIX, WEIGHTS_FILE


@dataclass(frozen=True)
class Kept:
    """A tensor in the temporary file of an `AdapterWriter`, and what reads it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class AdapterWriter:
    """Collects an adapter's tensors in a temporary file, then writes the whole folder.

    A safetensors file begins with the shapes of all tensors, but a rank that is chosen by energy is known only when
    its matrix has been decomposed. Factors therefore go to a temporary file first. That file is in the output's parent
    folder, has no name there, and ends with the process. Use this class as a context manager; without a call of
    `commit` there is no output.

    Args:
        out: The folder to write, as `check_output_folder` returned it.
        overwrite: Replace an adapter folder that is there.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self._out, self._overwrite = out, overwrite
        self._entries: dict[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]] = {}
        self._end = 0

    def __enter__(self) -> AdapterWriter:
        parent = next(p for p in self._out.parents if p.is_dir())
        with write_errors_named(self._out):
            self._spool = tempfile.TemporaryFile(dir=parent, prefix=f".{self._out.name}.")
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def keep(self, tensor: Tensor) -> Kept:
        """Write a CPU tensor to the temporary file, for `add_kept`, when its name is not known yet."""
        start, fd, tensor = self._end, self._spool.fileno(), tensor.contiguous()
        if tensor.numel():
            with write_errors_named(self._out):
                write_fully(fd, byte_view(tensor), start)
        self._end += tensor.nbytes
        dtype, shape = tensor.dtype, tuple(tensor.shape)

        def read() -> Tensor:
            stored = torch.empty(shape, dtype=dtype)
            if stored.numel():
                read_fully(fd, byte_view(stored), start, self._out)
            return stored

        return Kept(dtype, shape, read)

    def add_kept(self, name: str, tensor: Kept) -> None:
        """Store a tensor that was kept; `name` is its name without PEFT's prefix."""
        self.add_from(name, tensor.dtype, tensor.shape, tensor.read)

    def add(self, name: str, tensor: Tensor) -> None:
        """Store a CPU tensor; `name` is its name without PEFT's prefix."""
        self.add_kept(name, self.keep(tensor))

    def add_from(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor]) -> None:
        """Store the tensor that `read()` returns when `commit` calls it, for tensors that another file holds."""
        self._entries[PREFIX + name] = (dtype, shape, read)

    def pad(self, name: str, dimension: int, size: int, *, groups: int = 1) -> None:
        """Pad a tensor that was added with zeros at the end of each of the groups of one dimension, up to a size."""
        dtype, shape, read = self._entries[PREFIX + name]
        if shape[dimension] == size:
            return
        padded = (*shape[:dimension], size, *shape[dimension + 1 :])

        def read_padded() -> Tensor:
            stored = read().unflatten(dimension, (groups, -1))
            whole = torch.zeros(padded, dtype=dtype)
            parts = whole.unflatten(dimension, (groups, -1))
            parts.narrow(dimension + 1, 0, stored.shape[dimension + 1]).copy_(stored)
            return whole

        self.add_from(name, dtype, padded, read_padded)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that were added so far."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape, _ in self._entries.values())

    def commit(self, config: Mapping[str, Any], *, facts: Mapping[str, Any] | None = None) -> None:
        """Write `adapter_model.safetensors` with all tensors and `adapter_config.json` with `config`.

        Args:
            config: The entries of adapter_config.json.
            facts: Entries for the record in the folder, as for `CheckpointWriter`.
        """
        plan = plan_output(((name, dtype, shape) for name, (dtype, shape, _) in self._entries.items()), sys.maxsize)
        plan = OutputPlan((replace(plan.shards[0], filename=WEIGHTS_FILE),), plan.slots)
        files = {CONFIG_FILE: json_bytes(config)}
        writing = CheckpointWriter(self._out, plan, files, overwrite=self._overwrite, marker=CONFIG_FILE, facts=facts)
        with writing as writer:
            for name, (_, _, read) in self._entries.items():
                writer.write(name, read())
            writer.commit()


def _recorded(base: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Return how an adapter's configuration names its base, and in which revision of a model on the hub.

    A folder is named by its whole path, anything else as it is.
    """
    path = os.path.abspath(os.path.expanduser(base))
    if os.path.exists(path):
        return path, None
    return parse_id(os.fspath(base)) or (os.fspath(base), None)


def adapter_config(base: str | os.PathLike[str], architectures: Any, **entries: Any) -> dict[str, Any]:
    """Return an adapter_config.json for PEFT that describes plain LoRA in inference mode, with these `entries`.

    The base model is recorded by its folder's whole path, or by its hub id and revision.
    """
    architecture = architectures[0] if isinstance(architectures, list) and architectures else ""
    name, revision = _recorded(base)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if str(architecture).endswith("ForCausalLM") else None,
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        **entries,
    }
