"""What PEFT can adapt in a model, from its class in transformers or else from the names and shapes of its tensors."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from torch import nn

from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.engine.in_memory import InMemory
from resm_kernels.engine.wrapped_layers import attribute_read, is_linear
from resm_kernels.lora.config import is_tied
from resm_kernels.lora.peft_names import Adaptable, Kind, Layout
from resm_kernels.tensor_names import (
    HEAD_MODULES,
    OUTPUT_HEAD,
    is_embedding_module,
    is_embedding_or_head,
    is_tied_embedding,
    last_part,
    module_of,
)

_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HOLDERS: Final = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_EXPERTS: Final = re.compile(r"experts?(?![a-z])|moe", re.IGNORECASE)
_CLOSED: Final = {"out_proj", "conv1d"}
_CLOSED_IN: Final = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Modules that peft refuses to adapt, and the kinds of model in which it does (`_check_lora_target_modules_mamba`)."""
_MOVED: Final = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""Names that peft takes for those of experts before transformers 5 (`_MOE_TARGET_MODULE_MAPPING`)."""
_PARAMETRIZED: Final = ".parametrizations."
_TIED: Final = "it is tied to the output head or another embedding"


def layout_of(model: InMemory, config: Mapping[str, Any]) -> Layout:
    """Return what PEFT can adapt in a model, whose tensors are named as in memory; `config` is its config.json."""
    if model.architecture is None:
        return _by_names(model, config)
    return _Described(model, model.architecture.model).layout()


def _by_names(model: InMemory, config: Mapping[str, Any]) -> Layout:
    """Return the layout of a model whose class is not known: modules are what stands before the last dots of names."""
    tensors = {name: info.shape for name, info in model.tensors.items()}
    embedding = next((name for name in tensors if is_tied_embedding(name) and last_part(name) == "weight"), None)
    tied = {}
    if embedding is not None and OUTPUT_HEAD not in tensors and is_tied(config, tensors):
        tied = {OUTPUT_HEAD: embedding}
    owners = {module_of(name) for name in tensors}
    modules = {".".join(m.split(".")[: i + 1]) for m in owners if m for i in range(m.count(".") + 1)}
    targets, refused = {}, {}
    for name, info in model.tensors.items():
        if len(info.shape) < 2 or info.dtype not in FLOAT_DTYPES:
            continue
        module = module_of(name)
        if name in tied.values():
            refused[name] = _TIED
        elif last_part(name) == "weight" and len(info.shape) == 2 and module:
            kind = Kind.EMBEDDING if is_embedding_module(module) else Kind.LINEAR
            targets[name] = Adaptable(name, kind, is_embedding_or_head(module))
        else:
            refused[name] = "no class of transformers says how it is used"
    leaves = owners - {".".join(m.split(".")[:i]) for m in owners for i in range(1, m.count(".") + 1)} - {""}
    leaves -= set(map(module_of, tied.values()))
    return Layout(tensors, frozenset(modules), targets, tied=tied, refused=refused, savable=frozenset(leaves))


class _Described:
    """The layout of a model of a class that transformers has.

    Args:
        loaded: The model's tensors.
        model: The model on the meta device.
    """

    def __init__(self, loaded: InMemory, model: Any) -> None:
        self._loaded, self._model = loaded, model
        self._modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._type: str = getattr(model.config, "model_type", "")
        head = model.get_output_embeddings()
        self._heads = {name for name, module in self._modules.items() if head is not None and module is head}
        self._state: dict[str, Any] = model.state_dict(keep_vars=True)
        self._tied = self._ties()
        self._owned = {name for name in self._state if name in loaded.tensors and name not in self._tied}
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._ends = _ends(self._parameters)
        self._moved = moved_names(self._type)
        self._module_ends = _ends(self._modules) if self._moved else frozenset()

    def layout(self) -> Layout:
        targets: dict[str, Adaptable] = {}
        refused: dict[str, str] = {}
        for name in self._owned:
            if len(self._state[name].shape) < 2 or self._loaded.tensors[name].dtype not in FLOAT_DTYPES:
                continue
            found = self._target(name)
            if isinstance(found, Adaptable):
                targets[name] = found
            else:
                refused[name] = found
        files: dict[str, str] = {}
        for target in list(targets.values()):
            in_file = self._in_file(target)
            if in_file is None:
                refused[target.name] = "PEFT gives its adapter another name as it loads it"
                del targets[target.name]
            elif in_file != target.module:
                files[target.module] = in_file
        if any(t.kind is Kind.CONV1D for t in targets.values()):
            for target in [t for t in targets.values() if t.kind is Kind.PARAMETER]:
                refused[target.name] = "PEFT adapts no parameters beside layers stored as (in, out)"
                del targets[target.name]
        parameters = {
            path: tuple(f"{path}.{p}" for p, _ in module.named_parameters(recurse=False))
            for path, module in self._modules.items()
            if path
        }
        return Layout(
            {name: self._loaded.tensors[name].shape for name in self._loaded.tensors if name in self._owned},
            frozenset(path for path in self._modules if path),
            targets,
            parameters,
            self._tied,
            refused,
            frozenset(self._savable()),
            files,
        )

    def _in_file(self, target: Adaptable) -> str | None:
        """Return what an adapter's file must call a module so that PEFT finds it; None if there is no such name.

        PEFT renames the factors in a file as transformers renames a model's tensors, which changes some names that are
        those in memory already.
        """
        stored = self._loaded.tensors[target.name].group.stored
        end = ".lora_A.weight"
        for module in (target.module, module_of(stored[0])):
            renamed = self._renamed(module + end)
            if renamed == target.module + end or (module == target.module and (module + end).endswith(renamed)):
                return module
        return None

    @functools.cached_property
    def _renamings(self) -> list[Any]:
        """The renamings that PEFT applies (`convert_peft_adapter_state_dict_for_transformers`)."""
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        if get_checkpoint_conversion_mapping(self._type) is None:
            return []
        return [entry for entry in get_model_conversion_mapping(self._model) if isinstance(entry, WeightRenaming)]

    def _renamed(self, name: str) -> str:
        from transformers.core_model_loading import apply_renamings

        return str(apply_renamings(name, self._renamings))

    def _ties(self) -> dict[str, str]:
        """Return for each second name of a tensor its first one, which is one that the files have."""
        first: dict[int, str] = {}
        pairs: dict[str, str] = dict(self._model.all_tied_weights_keys)
        for name, tensor in self._state.items():
            original = first.setdefault(id(tensor), name)
            if original != name and name not in pairs and original not in pairs:
                pairs[name] = original
        groups: dict[str, list[str]] = {}
        for copy, original in pairs.items():
            groups.setdefault(pairs.get(original, original), []).append(copy)
        tied: dict[str, str] = {}
        for original, copies in groups.items():
            names = [original, *copies]
            stored = [name for name in names if name in self._loaded.tensors]
            if stored:
                # Files that have the tensor twice, with different values, hold two tensors: transformers ties none.
                tied |= {name: stored[0] for name in names if name not in stored}
        return tied

    def _target(self, name: str) -> Adaptable | str:
        """Return how PEFT adapts a matrix, or why it does not."""
        path, parameter = module_of(name), last_part(name)
        module = self._modules.get(path)
        if module is None or not path or _PARAMETRIZED in f".{name}":
            return "it belongs to no module that PEFT can replace"
        if name not in self._parameters:
            return "it is a buffer"
        if name in self._tied.values():
            if isinstance(module, nn.Embedding) or path in self._heads:
                return _TIED
            return "it is tied to another tensor"
        if self._type in _CLOSED_IN and last_part(path) in _CLOSED:
            return f"PEFT does not adapt {last_part(path)} of {self._type}"
        owner = module_of(path)
        if isinstance(self._modules.get(owner), nn.MultiheadAttention):
            return "its attention does not call the layer"
        if (read := attribute_read(type(self._modules[owner]), last_part(path))) is not None:
            return f"{type(self._modules[owner]).__name__} reads its {read}, which PEFT's layer does not have or change"
        if parameter == "weight":
            found = self._layer(name, path, module)
            if found is not None:
                return found
        return self._parameter(name, path, module)

    def _layer(self, name: str, path: str, module: nn.Module) -> Adaptable | str | None:
        """Return how PEFT adapts the weight of a layer of one of torch's classes; None for other modules."""
        if isinstance(module, nn.Linear):
            if not is_linear(module):
                return f"{type(module).__name__} is more than a linear map"
            if self._is_moved(path):
                # Its own name means the fused experts to PEFT.
                return self._as_parameter(name)
            return Adaptable(name, Kind.LINEAR, path in self._heads or last_part(path) in HEAD_MODULES)
        if type(module).__name__ == "Conv1D":
            return Adaptable(name, Kind.CONV1D)
        if isinstance(module, nn.Embedding):
            scaled = hasattr(module, "embed_scale")
            if type(module).forward is not nn.Embedding.forward and not scaled:
                return f"{type(module).__name__} is more than a table"
            return Adaptable(name, Kind.EMBEDDING, vocabulary=True)
        if isinstance(module, nn.modules.conv._ConvNd):
            plain = isinstance(module, _CONVOLUTIONS) and not module.transposed
            if not plain or module.groups != 1 or module.padding_mode != "zeros" or set(module.dilation) != {1}:
                return "PEFT merges only convolutions of one group, without dilation, padded with zeros"
            return Adaptable(name, Kind.CONVOLUTION)
        return None

    def _is_moved(self, path: str) -> bool:
        """Return True if PEFT would take a module's name for another module's."""
        return last_part(path) in self._moved or path in self._module_ends

    def _parameter(self, name: str, path: str, module: nn.Module) -> Adaptable | str:
        """Return how PEFT adapts a parameter of a module of any class: stacks of the experts' matrices."""
        shape = self._state[name].shape
        is_experts = hasattr(module, "is_transposed") or _EXPERTS.search(f"{path} {type(module).__name__}")
        if len(shape) != 3 or not is_experts or min(shape[1:]) == 1:
            return f"{type(module).__name__} is no layer that PEFT knows"
        transposed = bool(getattr(module, "is_transposed", False))
        if shape[0] == 1 and transposed:
            return "PEFT turns a stack of one matrix"
        found = self._as_parameter(name)
        return replace(found, transposed=transposed) if isinstance(found, Adaptable) else found

    def _as_parameter(self, name: str) -> Adaptable | str:
        if name in self._ends:
            return "its name is the end of another's"
        return Adaptable(name, Kind.PARAMETER)

    def _savable(self) -> Iterator[str]:
        """Yield the modules that modules_to_save can hold."""
        own: dict[str, list[str]] = {}
        for name in self._state:
            own.setdefault(module_of(name), []).append(name)
        outer = {".".join(path.split(".")[:i]) for path in own for i in range(1, path.count(".") + 1)}
        known, shared = self._owned | self._tied.keys(), set(self._tied.values())
        for path, names in own.items():
            module = self._modules.get(path)
            is_leaf = path and path not in outer and module is not None and not isinstance(module, _HOLDERS)
            if is_leaf and known.issuperset(names) and shared.isdisjoint(names):
                yield path


def _ends(names: Iterable[str]) -> frozenset[str]:
    """Return what is left of names without their first parts."""
    parts = [name.split(".") for name in names]
    return frozenset(".".join(p[i:]) for p in parts for i in range(1, len(p)))


def moved_names(model_type: str) -> frozenset[str]:
    """Return last parts of module names that PEFT takes for old names of fused experts in this kind of model."""
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as families
    except ImportError:
        families = {}
    return frozenset(_MOVED.get(families.get(model_type, model_type), ()))
