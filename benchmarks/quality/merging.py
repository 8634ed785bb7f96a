"""A seed's models in memory, and merges of them without a file: one state dictionary per candidate."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import resm_kernels
from benchmarks.quality.candidates import FOLDED, Candidate
from benchmarks.quality.rules import RULES
from resm_kernels import methods
from resm_kernels.checkpoint import CheckpointReader, read_config
from resm_kernels.lora import AdapterReader, is_adapter_folder

StateDict = dict[str, Tensor]
OUT_DTYPE = torch.bfloat16
"""Merges are rounded as a checkpoint would be."""
SEED = 0
"""Of the masks that DARE and DELLA draw; the seeds of the benchmark differ in world and training."""


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[None]:
    """Make a folder for the files of one candidate, and remove it at the end."""
    # A process that was killed may have left files.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder)


class Models:
    """The models of one seed's folder, each read when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, StateDict] = {}

    def __getitem__(self, name: str) -> StateDict:
        """The tensors of a model; a LoRA adapter's are θ₀ + s·B·A, in float64 as spectral methods need them."""
        if name not in self._read:
            folder = self.folder / name
            if is_adapter_folder(folder):
                base = self.folder / "base"
                with CheckpointReader(base) as reader:
                    adapter = AdapterReader(folder, reader, read_config(base), double=True)
                    with adapter:
                        self._read[name] = {tensor: adapter.read(tensor) for tensor in adapter.tensors}
            else:
                with CheckpointReader(folder) as reader:
                    self._read[name] = {tensor: reader.read(tensor) for tensor in reader.tensors}
        return self._read[name]

    def fingerprint(self, names: Iterable[str], *others: Path) -> str:
        """A digest of those models' weights and of other files: what measurements of the models hang on."""
        digest = hashlib.sha256()
        weights = [file for name in names for file in sorted((self.folder / name).glob("*.safetensors"))]
        for file in (*weights, *others):
            digest.update(f"{file.parent.name}/{file.name}".encode())
            digest.update(file.read_bytes())
        return digest.hexdigest()


def digest(model: Mapping[str, Tensor]) -> str:
    """A digest of a state dictionary: two candidates with the same one need not be measured twice."""
    sha = hashlib.sha256()
    for name, tensor in model.items():
        sha.update(name.encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def merge(models: Models, candidate: Candidate) -> StateDict:
    """The candidate's tensors: a model's as they are, a merge's in bf16."""
    if candidate.method is None:
        return models[candidate.experts[0]]
    base, experts = models["base"], [models[name] for name in candidate.experts]
    parameters = dict(candidate.parameters)
    if candidate.method in FOLDED:
        return fold(base, experts, candidate.method, parameters)
    method = methods.get(candidate.method)
    # Methods that average models would count a base as one more.
    start = base if method.needs_base or method.optional_base else None
    if candidate.rule is None:
        return resm_kernels.merge_state_dicts(start, experts, method.name, out_dtype=OUT_DTYPE, seed=SEED, **parameters)
    overrides = RULES[candidate.rule](base, experts, method.name, parameters)
    return {
        name: resm_kernels.merge(
            tensor,
            [expert[name] for expert in experts],
            method.name,
            out_dtype=OUT_DTYPE,
            name=name,
            seed=SEED,
            **(parameters | overrides.get(name, {})),
        )
        for name, tensor in base.items()
    }


def fold(base: StateDict, experts: Sequence[StateDict], method: str, parameters: Mapping[str, Any]) -> StateDict:
    """Merge several experts by a method for two models, one after the other in the order given.

    slerp and nuslerp start with the first expert and take in expert t with the share w_t/(w_1 + … + w_t), so that
    every one has its share w_t of the whole on straight lines; slerp goes from model to model on the sphere, nuslerp
    from task vector to task vector. nearswap and arcee_fusion start with the base, and each expert is merged into what
    came out before. All in fp32 until the end.
    """
    options = dict(parameters)
    weights = options.pop("weight", (1,) * len(experts))

    def step(start: StateDict, models: list[StateDict], **more: Any) -> StateDict:
        return resm_kernels.merge_state_dicts(start, models, method, out_dtype=torch.float32, **options, **more)

    if method in ("nearswap", "arcee_fusion"):
        merged = {name: tensor.float() for name, tensor in base.items()}
        for expert in experts:
            merged = step(merged, [expert])
    else:
        merged, total = experts[0], weights[0]
        for expert, weight in zip(experts[1:], weights[1:], strict=True):
            if method == "slerp":
                merged = step(merged, [expert], t=weight / (total + weight))
            else:
                merged = step(base, [merged, expert], weight=[total, weight])
            total += weight
    return {name: tensor.to(OUT_DTYPE) for name, tensor in merged.items()}
