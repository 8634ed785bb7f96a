"""The tensors of a module in memory that a merge is written into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from resm_kernels.checkpoint import TensorInfo
from resm_kernels.dtypes import FLOAT_DTYPES, dtype_name
from resm_kernels.engine.architecture import Architecture
from resm_kernels.engine.layout import and_more
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.plan import MergePlan


@dataclass
class _Target:
    """A tensor of the module.

    Attributes:
        name: Its name in the module.
        tensor: The parameter or buffer.
        writers: The merged tensors that belong there: several if the module ties what the merge keeps apart.
        written: The first of these, once it has been written.
    """

    name: str
    tensor: Tensor
    writers: list[str] = field(default_factory=list)
    written: str | None = None


class ModuleTensors:
    """Where each tensor of a merge belongs in a module.

    Args:
        module: The module.
        plan: The merge.

    Raises:
        MergeError: See `LiveModels.merge_into`.
    """

    def __init__(self, module: nn.Module, plan: MergePlan) -> None:
        module = getattr(module, "_orig_mod", module)  # of a module that torch.compile has wrapped
        # With a name for each way to a tied parameter, and without buffers that are not saved.
        saved = module.state_dict(keep_vars=True)
        targets: dict[tuple[int, int], _Target] = {}
        self._targets: dict[str, _Target] = {}
        for name, tensor in saved.items():
            if isinstance(tensor, Tensor):
                # Tied parameters are one object, or views of the same memory.
                has_memory = not tensor.is_meta and tensor.numel() > 0
                place = (tensor.data_ptr(), tensor.numel()) if has_memory else (id(tensor), 0)
                self._targets[name] = targets.setdefault(place, _Target(name, tensor))
        self._by_output = self._places(module, {job.name: job.inputs[0][1] for job in plan.jobs})
        for job in plan.jobs:
            target = self._by_output.get(job.name)
            if target is not None:
                _check(job.name, job.shape, job.copied, target)
                target.writers.append(job.name)
        lacking = [
            name for name, _ in module.named_parameters() if name in self._targets and not self._targets[name].writers
        ]
        if lacking:
            raise MergeError(
                f"module: has a parameter {lacking[0]!r}{and_more(lacking)}, which the merge has no tensor for; need a "
                f"module of the architecture of {plan.reference.folder}"
            )

    def _places(self, module: nn.Module, infos: Mapping[str, TensorInfo]) -> dict[str, _Target]:
        """Return the target of each merged tensor; those that transformers would not load have none."""
        places = {name: name for name in infos}
        if not all(name in self._targets for name in infos) and hasattr(module, "base_model_prefix"):
            architecture = Architecture(module)
            ignored = {name for name, entry in architecture.loaded(infos).items() if entry.ignored is not None}
            places = {name: place for name, place in architecture.places(infos).items() if name not in ignored}
        unknown = [name for name, place in places.items() if place not in self._targets]
        if unknown:
            raise MergeError(
                f"module: has no tensor {places[unknown[0]]!r} for the merged tensor {unknown[0]!r}"
                f"{and_more(unknown)}; need a module of the same architecture"
            )
        _check_joined(places)
        return {name: self._targets[place] for name, place in places.items()}

    def write(self, name: str, value: Tensor) -> None:
        """Write a merged tensor into its place."""
        target = self._by_output.get(name)
        if target is None:
            return
        with torch.no_grad():
            if target.written is None:
                target.tensor.copy_(value)
                target.written = name
                _check_range(name, value, target)
            elif not torch.equal(target.tensor, value.to(target.tensor.device, target.tensor.dtype)):
                raise MergeError(
                    f"module: ties {target.written!r} and {name!r}, which are merged to different values; load it with "
                    "tie_word_embeddings: false"
                )

    def copied(self) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor that a merge writes, with a copy of its values."""
        written = {id(target): target.tensor for target in self._by_output.values()}
        return [(tensor, tensor.detach().clone()) for tensor in written.values()]


def _check_joined(places: Mapping[str, str]) -> None:
    """Refuse tensors that become parts of one tensor in the module."""
    first: dict[str, str] = {}
    for name, place in places.items():
        other = first.setdefault(place, name)
        if other != name:
            raise MergeError(
                f"module: joins {other!r} and {name!r} into {place!r}, which merges into modules do not do; pass "
                "`LiveModels.tensors` to an engine that does"
            )


def _check(name: str, shape: tuple[int, ...], copied: bool, target: _Target) -> None:
    tensor = target.tensor
    if tuple(tensor.shape) != shape:
        raise MergeError(
            f"module: tensor {target.name!r} has shape {tuple(tensor.shape)}, need {shape} as in the merge ({name!r})"
        )
    if tensor.is_meta:
        raise MergeError(f"module: tensor {target.name!r} is on the meta device, need one with memory")
    if not copied and tensor.dtype not in FLOAT_DTYPES:
        raise MergeError(
            f"module: tensor {target.name!r} is {tensor.dtype}, need one of "
            f"{', '.join(map(dtype_name, FLOAT_DTYPES))}; load the module without quantisation"
        )


def _check_range(name: str, value: Tensor, target: _Target) -> None:
    """Refuse values that only the module's dtype cannot hold."""
    narrow = target.tensor.dtype == torch.float16 and value.dtype != torch.float16 and value.is_floating_point()
    if narrow and not bool(torch.isfinite(target.tensor).all()):
        raise MergeError(f"tensor {name!r}: merged values exceed float16's range (65504), in which the module is")
