"""Writing an adapter folder that appears when it is complete, from tensors whose ranks are not known beforehand."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, CheckpointWriter, OutputPlan, plan_output
from resm_kernels.checkpoint.format import byte_view, read_fully, write_fully
from resm_kernels.lora.config import CONFIG_FILE, PREFIX, WEIGHTS_FILE


class AdapterWriter:
    """Collects an adapter's tensors on disk, then writes the folder in one go.

    A safetensors file begins with all shapes, and a rank chosen by energy is known only when its matrix has been
    decomposed. So factors go to a nameless temporary file beside the output first; nothing of it outlives the process.
    Use as a context manager; leaving without `commit` leaves nothing.

    Args:
        out: Final folder, as `check_output_folder` returned it.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._entries: dict[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]] = {}
        self._end = 0

    def __enter__(self) -> AdapterWriter:
        parent = next(p for p in self._out.parents if p.is_dir())
        try:
            self._spool = tempfile.TemporaryFile(dir=parent, prefix=f".{self._out.name}.")
        except OSError as error:
            raise CheckpointError(f"output {self._out}: cannot be written: {error.strerror or error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Store a tensor under the base model's name for it; contiguous, on the CPU."""
        start, fd, tensor = self._end, self._spool.fileno(), tensor.contiguous()
        if tensor.numel():
            try:
                write_fully(fd, byte_view(tensor), start)
            except OSError as error:
                raise CheckpointError(f"output {self._out}: cannot be written: {error.strerror or error}") from error
        self._end += tensor.nbytes
        dtype, shape = tensor.dtype, tuple(tensor.shape)

        def read() -> Tensor:
            back = torch.empty(shape, dtype=dtype)
            if back.numel():
                read_fully(fd, byte_view(back), start, self._out)
            return back

        self.add_later(name, dtype, shape, read)

    def add_later(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor]) -> None:
        """Store what `read()` returns at `commit`, for tensors that lie in a file already."""
        self._entries[PREFIX + name] = (dtype, shape, read)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors so far."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape, _ in self._entries.values())

    def commit(self, config: Mapping[str, Any]) -> None:
        """Write the folder: `adapter_model.safetensors` with all tensors, `adapter_config.json` with `config`."""
        plan = plan_output(((name, dtype, shape) for name, (dtype, shape, _) in self._entries.items()), sys.maxsize)
        plan = OutputPlan((replace(plan.shards[0], filename=WEIGHTS_FILE),), plan.slots)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        with CheckpointWriter(self._out, plan, {CONFIG_FILE: text.encode()}) as writer:
            for name, (_, _, read) in self._entries.items():
                writer.write(name, read())
            writer.commit()


def adapter_config(base: str | os.PathLike[str], architectures: Any, **choices: Any) -> dict[str, Any]:
    """Return an adapter_config.json for PEFT: plain LoRA of the given `choices`, in inference mode."""
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if str(name).endswith("ForCausalLM") else None,
        "base_model_name_or_path": os.path.abspath(os.path.expanduser(base)),
        "inference_mode": True,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        **choices,
    }
