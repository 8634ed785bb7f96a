"""The tensors of a module in memory that a merge is written into."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from resm_kernels.checkpoint import TensorInfo
from resm_kernels.dtypes import FLOAT_DTYPES, dtype_name
from resm_kernels.engine.architecture import Architecture
from resm_kernels.engine.layout import and_more
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.plan import MergePlan
from resm_kernels.engine.weight_loading import Place
from resm_kernels.live.memory import check_memory, has_memory
from resm_kernels.live.wrappers import own_name, unwrapped


@dataclass
class _Target:
    """A tensor of the module.

    Attributes:
        name: Its name in the module.
        tensor: The parameter or buffer.
        written: The merged tensor that has been written there.
    """

    name: str
    tensor: Tensor
    written: str | None = None


@dataclass
class _Waiting:
    """Merged tensors that transformers converts together, until all of them are there."""

    place: Place
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """A tensor of the module, the memory that it has, and a copy of its values."""

    tensor: Tensor
    memory: Tensor
    values: Tensor

    def restore(self) -> None:
        """Give the tensor its memory and its values back, also if the module has got another dtype meanwhile."""
        overwrite(self.memory, self.values)
        if (self.tensor.dtype, self.tensor.data_ptr()) != (self.memory.dtype, self.memory.data_ptr()):
            self.tensor.data = self.memory


class ModuleTensors:
    """Where each tensor of a merge belongs in a module.

    Args:
        module: The module.
        plan: The merge.

    Raises:
        MergeError: See `LiveModels.merge_into`.
    """

    def __init__(self, module: nn.Module, plan: MergePlan) -> None:
        if not isinstance(module, nn.Module):
            raise MergeError(f"module: got {type(module).__name__}, need a torch.nn.Module")
        module = unwrapped(module)
        _refuse_adapters(module)
        self._targets = _targets(module)
        self._module = module
        infos = {job.name: job.inputs[0][1] for job in plan.jobs}
        self._places: dict[str, Place | _Waiting] = {}
        covered: set[int] = set()
        for place in self._find_places(module, infos):
            if unknown := [name for name in place.targets if name not in self._targets]:
                raise MergeError(
                    f"module: has no tensor {unknown[0]!r} for the merged tensor {place.sources[0]!r}; need a module "
                    f"of the architecture of {plan.reference.folder}"
                )
            covered |= {id(self._targets[name]) for name in place.targets}
            waiting = _Waiting(place) if place.conversion is not None else place
            self._places |= dict.fromkeys(place.sources, waiting)
        for job in plan.jobs:
            if job.name in self._places:
                self._check(job.name, job.shape, copied=job.copied)
        check_memory({target.name: target.tensor for target in self._targets.values() if id(target) in covered})
        parameters = [n for n in (own_name(name) for name, _ in module.named_parameters()) if n in self._targets]
        lacking = [name for name in parameters if id(self._targets[name]) not in covered]
        if lacking:
            raise MergeError(
                f"module: has a parameter {lacking[0]!r}{and_more(lacking)}, which the merge has no tensor for; need a "
                f"module of the architecture of {plan.reference.folder}"
            )

    def _find_places(self, module: nn.Module, infos: Mapping[str, TensorInfo]) -> Sequence[Place]:
        """Return the places of the merged tensors but for those that transformers would not load."""
        if all(name in self._targets for name in infos) or not hasattr(module, "base_model_prefix"):
            return [Place((name,), (name,)) for name in infos]
        architecture = Architecture(module)
        loaded = architecture.loaded(infos)
        return architecture.places({name: info.shape for name, info in infos.items() if loaded[name].ignored is None})

    def _check(self, name: str, shape: tuple[int, ...], *, copied: bool) -> None:
        """Refuse tensors of the module that the merged tensor cannot be written to."""
        place = self._places[name]
        for target in (self._targets[t] for t in (place.place if isinstance(place, _Waiting) else place).targets):
            tensor = target.tensor
            if isinstance(place, Place) and tuple(tensor.shape) != shape:
                raise MergeError(
                    f"module: tensor {target.name!r} has shape {tuple(tensor.shape)}, need {shape} as in the merge "
                    f"({name!r})"
                )
            if tensor.is_meta:
                raise MergeError(f"module: tensor {target.name!r} is on the meta device, need one with memory")
            if tensor.layout != torch.strided:
                raise MergeError(f"module: tensor {target.name!r} is {tensor.layout}, need a dense one")
            if type(tensor.detach()) is not Tensor:
                # A shard of a distributed tensor, or a quantised one that looks like floats.
                kind = type(tensor.detach()).__name__
                raise MergeError(f"module: tensor {target.name!r} is a {kind}, need a plain torch.Tensor")
            if not copied and tensor.dtype not in FLOAT_DTYPES:
                raise MergeError(
                    f"module: tensor {target.name!r} is {tensor.dtype}, need one of "
                    f"{', '.join(map(dtype_name, FLOAT_DTYPES))}; load the module without quantisation"
                )

    def write(self, name: str, value: Tensor) -> None:
        """Write a merged tensor into its place; the value is used later if it is joined with others."""
        place = self._places.get(name)
        if isinstance(place, Place):
            self._write(place.targets[0], name, value)
        elif place is not None:
            first = self._targets[place.place.targets[0]].tensor
            place.values[name] = value.to(first.device, first.dtype, copy=True)  # as transformers does, before it joins
            if len(place.values) == len(place.place.sources):
                assert place.place.conversion is not None
                for target, part in place.place.conversion.convert(place.values, self._module).items():
                    self._write(target, name, part)
                place.values.clear()

    def _write(self, target_name: str, name: str, value: Tensor) -> None:
        target = self._targets[target_name]
        if value.shape != target.tensor.shape:
            raise MergeError(
                f"module: tensor {target_name!r} has shape {tuple(target.tensor.shape)}, need {tuple(value.shape)}, "
                f"which transformers makes of {name!r} and others"
            )
        if target.written is None:
            overwrite(target.tensor, value)
            target.written = name
            _check_range(name, value, target.tensor)
        elif not torch.equal(target.tensor, value.to(target.tensor.device, target.tensor.dtype)):
            raise MergeError(
                f"module: ties {target.written!r} and {name!r}, which are merged to different values; load it with "
                "tie_word_embeddings: false"
            )

    def kept(self) -> list[Kept]:
        """Return each tensor that a merge writes, with a copy of its values."""
        places = [p.place if isinstance(p, _Waiting) else p for p in self._places.values()]
        names = dict.fromkeys(name for place in places for name in place.targets)
        written = {id(self._targets[name]): self._targets[name].tensor for name in names}
        return [Kept(tensor, tensor.detach(), tensor.detach().clone()) for tensor in written.values()]


def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Give a parameter or buffer other values, in its own memory and dtype."""
    # A tensor that was made in inference mode can be changed there alone.
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        tensor.copy_(value)


def _targets(module: nn.Module) -> dict[str, _Target]:
    """Return the parameters and saved buffers by every name that they have; tied ones are one target."""
    by_memory: dict[Hashable, _Target] = {}
    targets = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            name = own_name(name)
            memory: Hashable = id(tensor)
            if has_memory(tensor):
                memory = tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
            targets[name] = by_memory.setdefault(memory, _Target(name, tensor))
    return targets


def _refuse_adapters(module: nn.Module) -> None:
    """Refuse a module in which layers of peft stand in place of linear ones: they would be added to the merge."""
    wrapped = next((name for name, _ in module.named_modules() if name.rpartition(".")[2] == "base_layer"), None)
    if wrapped is not None or hasattr(module, "peft_config"):
        raise MergeError(
            f"module: has adapters of peft{f' ({wrapped})' if wrapped else ''}, which would be added to the merge; "
            "need the model without them: model.unload(), or model.merge_and_unload() to keep what they do"
        )


def _check_range(name: str, value: Tensor, target: Tensor) -> None:
    """Refuse values that only the module's dtype cannot hold."""
    narrow = target.dtype == torch.float16 and value.dtype != torch.float16 and value.is_floating_point()
    if narrow and not bool(torch.isfinite(target).all()):
        raise MergeError(f"tensor {name!r}: merged values exceed float16's range (65504), in which the module is")
