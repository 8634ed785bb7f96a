"""What PEFT can adapt in a loaded model, and the names by which an adapter says so.

The rules are those of peft 0.21 (`tuners_utils.inject_adapter`, `lora.ParamWrapper`, `utils.other._set_trainable`),
stated where they are used. They need neither peft nor transformers: `Layout` describes the loaded model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import torch
from torch import Tensor

from resm_kernels.tensor_names import last_part, module_of

NO_TARGETS: Final = "dummy-target-modules"
"""What target_modules must be in an adapter that adapts no module and only stores some (peft.utils.constants)."""


class Kind(Enum):
    """How PEFT adapts a tensor: by the class of its module, or as a parameter of any module."""

    LINEAR = "linear layer"
    CONV1D = "linear layer stored as (in, out)"
    EMBEDDING = "embedding"
    CONVOLUTION = "convolution"
    PARAMETER = "parameter"


@dataclass(frozen=True)
class Adaptable:
    """A tensor that PEFT can adapt.

    Attributes:
        name: Its name in the loaded model.
        kind: How PEFT adapts it.
        vocabulary: True for embeddings and output heads, which are decomposed on request only.
        transposed: True if PEFT takes the slices of a stack of matrices as (in, out).
    """

    name: str
    kind: Kind
    vocabulary: bool = False
    transposed: bool = False

    @property
    def module(self) -> str:
        return module_of(self.name)

    @property
    def label(self) -> str:
        """The name by which users choose the target: its module's, or its own if it is a parameter."""
        return self.name.removesuffix(".weight") if self.kind is Kind.PARAMETER else self.module


@dataclass(frozen=True)
class Layout:
    """A loaded model, as far as an adapter of it depends on it.

    Attributes:
        tensors: The shapes of all parameters and persistent buffers, by name, each tensor once.
        tied: For each further name of a tensor the one that it has in `tensors`.
        modules: The names of all modules, also second names of one module.
        parameters: For each module the names of its own parameters, in their order.
        targets: What PEFT can adapt, by name.
        refused: For each matrix that PEFT cannot adapt the reason, in words.
        savable: The modules that modules_to_save can hold: without modules in them that have tensors, and none whose
            tensor has further names.
        files: What an adapter's file must call modules that PEFT would otherwise give another name as it loads it.
    """

    tensors: Mapping[str, tuple[int, ...]]
    modules: frozenset[str]
    targets: Mapping[str, Adaptable]
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    savable: frozenset[str] = frozenset()
    files: Mapping[str, str] = field(default_factory=dict)

    def own(self, module: str) -> list[str]:
        """Return the names of a module's own tensors, also those that are second names."""
        return [name for name in (*self.tensors, *self.tied) if module_of(name) == module]


def stored_factors(
    target: Adaptable, shape: Sequence[int], sides: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return PEFT's A and B for the task matrices left·rightᵀ of a target.

    Args:
        target: The target.
        shape: The tensor's shape.
        sides: For each matrix of the target left (rows, r) and right (columns, r), all of one rank r. A convolution is
            the matrix (out, in·kernel), a stack has a matrix for each slice.

    Returns:
        A (r, in) and B (out, r), with further dimensions for convolutions; of a stack of E matrices A (E·r, in), whose
        rows have the slice before the direction, and B (out, r·E), whose columns have the direction before the slice.
    """
    left, right = sides[0]
    rank = left.shape[1]
    if target.kind in (Kind.CONV1D, Kind.EMBEDDING):
        return left.mT.contiguous(), right.contiguous()
    if target.kind is Kind.CONVOLUTION:
        kernel = tuple(shape[2:])
        return right.mT.reshape(rank, shape[1], *kernel).contiguous(), left.reshape(
            shape[0], rank, *(1 for _ in kernel)
        )
    if len(shape) == 3:
        ins, outs = (0, 1) if target.transposed else (1, 0)
        a = torch.cat([pair[ins].mT for pair in sides])
        b = torch.stack([pair[outs] for pair in sides]).permute(1, 2, 0)
        return a.contiguous(), b.reshape(b.shape[0], -1).contiguous()
    return right.mT.contiguous(), left.contiguous()


@dataclass
class Selection:
    """The names in an adapter of some adapted tensors, and of whole tensors that it stores.

    Args:
        layout: The loaded model.
        adapted: The names of the adapted tensors, which are among `layout.targets`.

    Attributes:
        target_modules, target_parameters: The entries of the adapter's configuration.
    """

    layout: Layout
    adapted: Collection[str]
    target_modules: list[str] | str = field(default_factory=list)
    target_parameters: list[str] = field(default_factory=list)
    _by_parameter: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        targets = [self.layout.targets[name] for name in self.adapted]
        modules = {t.module for t in targets if t.kind is not Kind.PARAMETER}
        self._by_parameter = {t.name for t in targets if t.kind is Kind.PARAMETER}
        if modules:
            self.target_modules = target_names(modules, self.layout.modules)
        self.target_parameters = sorted(self._by_parameter)

    def factor_names(self, name: str) -> tuple[str, str]:
        """Return the names of A and B of an adapted tensor in the adapter, without PEFT's prefix."""
        target = self.layout.targets[name]
        module = self.layout.files.get(target.module, target.module)
        if target.kind is Kind.EMBEDDING:
            return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
        # Of several adapted parameters of a module the first is wrapped first, and each wrapper holds the one before.
        after = 0
        if target.kind is Kind.PARAMETER:
            wrapped = self._wrapped(target.module)
            after = len(wrapped) - 1 - wrapped.index(name)
        owner = module + ".base_layer" * after
        return f"{owner}.lora_A.weight", f"{owner}.lora_B.weight"

    def whole_name(self, name: str) -> str:
        """Return the name in the adapter of a tensor that replaces the base's, without PEFT's prefix."""
        module, parameter = module_of(name), last_part(name)
        wrappers = len(self._wrapped(module))
        if any(self.layout.targets[n].kind is not Kind.PARAMETER for n in self.adapted if module_of(n) == module):
            wrappers = 1
        return f"{module}{'.base_layer' * wrappers}.{parameter}" if module else parameter

    def pattern_name(self, name: str) -> str:
        """Return the name that PEFT matches rank_pattern and alpha_pattern against."""
        target = self.layout.targets[name]
        return name if target.kind is Kind.PARAMETER else target.module

    def modules_to_save(self, tensors: Collection[str]) -> set[str]:
        """Return the modules that modules_to_save can name to store these whole tensors, and no other tensor wrongly.

        PEFT saves every module whose name ends in one of these names, also within a part of a name, and adapts none
        within a module of that name.
        """
        modules = {m for m in map(module_of, tensors) if m in self.layout.savable}
        modules -= {module_of(name) for name in self.adapted}
        adapted = {module_of(name) for name in self.adapted}
        while True:
            wrong = {
                m
                for m in modules
                if any(other.endswith(m) and other not in modules for other in self.layout.modules)
                or any(re.match(rf"(^|.*\.){m}($|\..*)", other) for other in adapted)
            }
            if not wrong:
                return modules
            modules -= wrong

    def _wrapped(self, module: str) -> list[str]:
        """Return the adapted parameters of a module in the order in which PEFT wraps them."""
        order = self.layout.parameters.get(module, ())
        return [name for name in order if name in self._by_parameter]


def is_exact(names: Collection[str], all_names: Iterable[str]) -> bool:
    """Return True if PEFT matches none but these names of all: a name matches if it ends in one after a dot."""
    ends = tuple(f".{name}" for name in names)
    return all(name in names or not name.endswith(ends) for name in all_names)


def target_names(adapted: Collection[str], modules: Collection[str]) -> list[str] | str:
    """Return target_modules that match, of all modules, these only: last parts of names, full names, or a pattern."""
    last_parts = {last_part(m) for m in adapted}
    if {m for m in modules if last_part(m) in last_parts} == set(adapted):
        return sorted(last_parts)
    if is_exact(adapted, modules):
        return sorted(adapted)
    return "|".join(re.escape(m) for m in sorted(adapted))


def rank_patterns(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return PEFT's rank_pattern: a regular expression for each name, and its rank."""
    # PEFT takes the first key that matches the end of a name, so longer names must come first.
    return {m.replace(".", r"\."): ranks[m] for m in sorted(ranks, key=lambda m: (-len(m), m))}
