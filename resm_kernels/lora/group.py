"""Adapters of one base model, side by side: which weights they change, and the task vectors of each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, CheckpointReader, TensorInfo, open_form
from resm_kernels.checkpoint.forms import is_adapter_folder
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.files import shortened
from resm_kernels.lora.adapter import AdapterReader
from resm_kernels.lora.config import CONFIG_FILE, check_recorded_base
from resm_kernels.lora.elements import TaskVector
from resm_kernels.lora.factors import Factors
from resm_kernels.lora.source import AdapterSource
from resm_kernels.recipe import Recipe, RecipeError, dotted, model_and_adapter, model_folder

_WRAPPED: Final = ".base_layer."
"""What PEFT puts into the name of a tensor of a module that it adapts."""


@dataclass(frozen=True)
class BaseModel:
    """The base model, whose weights some merges of adapters need."""

    folder: Path
    reader: CheckpointReader
    config: Mapping[str, Any]


class AdapterGroup:
    """Adapters that are merged to one.

    Args:
        adapters: The adapters, in the recipe's order; an adapter may be there more than once.
        base: Their base model, if the recipe names a folder.
        base_key: What the recipe calls the base model, which is opened if it is needed; None if it names none.
        base_name: What the merged adapter says of its base model.
        stack: Closes the models that are opened for the weights that adapters give.

    Attributes:
        modules: The shape of every weight that an adapter changes by factors, by its module's name.
        saved: The tensors that an adapter stores whole, by their names in the loaded model.
        wrapped: The tensors of the base model that an adapter stores although it changes them by factors, if the base
            model is not known.
        dtypes: The dtypes of all factors.

    Raises:
        CheckpointError: The adapters do not fit together.
    """

    def __init__(
        self,
        adapters: Sequence[AdapterSource],
        base: BaseModel | None,
        base_key: str | None,
        base_name: str | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self.adapters, self.base, self.base_name = list(adapters), base, base_name
        self._base_key = base_key
        self._stack, self._models = stack, dict[Path, AdapterReader]()
        self.modules: dict[str, tuple[int, int]] = {}
        self.saved: dict[str, TensorInfo] = {}
        self.wrapped: dict[str, TensorInfo] = {}
        self.dtypes: set[torch.dtype] = set()
        for adapter in self.adapters:
            for name in adapter.modules:
                self._add_module(adapter, name)
            self.saved = {**adapter.saved, **self.saved}
        self._check_names()
        self._settle_saved()

    @property
    def folders(self) -> list[Path]:
        """The folders of the adapters, each once."""
        return list(dict.fromkeys(adapter.folder for adapter in self.adapters))

    def _add_module(self, adapter: AdapterSource, name: str) -> None:
        shape, module = adapter.shape(name), adapter.modules[name]
        kernel = adapter.kernel(name)
        self.dtypes |= {module.parts[part].dtype for part in "AB"}
        first = self._owner(name)
        if first is not adapter and first is not None:
            known = self.modules[name], first.kernel(name), first.modules[name].embedding
            if (shape, kernel, module.embedding) != known:
                raise CheckpointError(
                    f"{adapter.folder}: module {name!r} has a weight of shape {shape}, need {known[0]} as in "
                    f"{first.folder}; need adapters of one base model"
                )
        self.modules.setdefault(name, shape)
        if self.base is not None:
            self._check_base(adapter, name, shape)

    def _check_base(self, adapter: AdapterSource, name: str, shape: tuple[int, int]) -> None:
        assert self.base is not None
        info = self.base.reader.tensors.get(f"{name}.weight")
        if info is None:
            return  # its files may name it otherwise; AdapterReader finds out where its weights are needed
        stored = (info.shape[0], torch.Size(info.shape[1:]).numel()) if info.shape else ()
        if stored != shape:
            raise CheckpointError(
                f"{adapter.folder}: module {name!r} has factors of a weight {shape}, but {self.base.folder} has "
                f"{info.shape}; need its base model"
            )

    def _check_names(self) -> None:
        """Refuse adapters that were made through different classes, which name one module in two ways."""
        for long in self.modules:
            words = long.split(".")
            for short in (".".join(words[at:]) for at in range(1, len(words))):
                owners = [a for a in self.adapters if short in a.modules]
                if owners and not any(long in a.modules for a in owners):
                    raise CheckpointError(
                        f"{owners[0].folder}: adapts {short!r}, and {self._first(long).folder} {long!r}, which seem to "
                        "be one module; need adapters that were made through the same class of the base model"
                    )

    def _settle_saved(self) -> None:
        """Find out what tensors are that adapters store whole, of modules that they change by factors.

        PEFT stores the weight that factors are added to if that is an embedding or a head. It is the base's as a rule.
        """
        for name, info in list(self.saved.items()):
            module, _, parameter = name.rpartition(".")
            if module not in self.modules or parameter == "bias":
                continue
            owners = [adapter for adapter in self.adapters if name in adapter.saved]
            if any(_WRAPPED not in adapter.saved[name].name for adapter in owners):
                raise CheckpointError(
                    f"{owners[0].folder}: stores {module!r} whole, which another adapter changes by factors; need the "
                    "same in both"
                )
            first = owners[0].read(name)
            others = [adapter.read(name) for adapter in owners[1:]]
            if self.base is not None and name in self.base.reader.tensors:
                others.append(self.base.reader.read(name))
            if not all(torch.equal(first.double(), other.double()) for other in others):
                raise CheckpointError(
                    f"{owners[0].folder}: has other values of {name!r}, which its factors are added to, than the base "
                    "model or another adapter; merge with whole models (resm-kernels merge)"
                )
            del self.saved[name]
            if self.base is None:
                self.wrapped[name] = info

    def read_wrapped(self, name: str) -> Tensor:
        """Read a tensor of `wrapped`."""
        return next(adapter for adapter in self.adapters if name in adapter.saved).read(name)

    def _owner(self, name: str) -> AdapterSource | None:
        return next((a for a in self.adapters if name in a.modules), None)

    def _first(self, name: str) -> AdapterSource:
        owner = self._owner(name)
        assert owner is not None
        return owner

    def transposed(self, name: str) -> bool:
        """Return True if the module's weight is stored as (in, out)."""
        return self._first(name).transposed(name)

    def embedding(self, name: str) -> bool:
        """Return True if the module is an embedding."""
        return self._first(name).modules[name].embedding

    def kernel(self, name: str) -> tuple[int, ...]:
        """Return the spatial sizes of a convolution's kernel; none for other modules."""
        return self._first(name).kernel(name)

    def deltas(self, name: str) -> list[TaskVector]:
        """Read each adapter's task vector of one weight; those of DoRA are matrices.

        Raises:
            RecipeError: One is DoRA's, and the base model is not known.
        """
        m, n = self.modules[name]
        found: list[TaskVector] = []
        for adapter in self.adapters:
            if name not in adapter.modules:
                found.append(Factors(torch.zeros(m, 0), torch.zeros(0, n), 1.0))
            elif "magnitude" in adapter.modules[name].parts:
                original, (changed,) = self.weights(f"{name}.weight", "DoRA scales the base's weights", [adapter])
                found.append((changed - original).float().flatten(1))
            else:
                found.append(adapter.factors(name))
        return found

    def weights(
        self, tensor: str, reason: str, adapters: Sequence[AdapterSource] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Read a tensor of the base model, and of the model that each adapter gives, in float64.

        Raises:
            RecipeError: The recipe names no base model; the message has the reason why it is needed.
            CheckpointError: The base model has no such tensor, or an adapter does not fit it.
        """
        base = self.need_base(reason)
        info = base.reader.tensors.get(tensor)
        if info is None or info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{base.folder}: has no floating-point tensor {tensor!r}, need it: {reason}")
        models = [self._model(base, a.folder) for a in (self.adapters if adapters is None else adapters)]
        return base.reader.read(tensor).double(), [model.read(tensor).double() for model in models]

    def need_base(self, reason: str) -> BaseModel:
        """Return the base model.

        Raises:
            RecipeError: The recipe names none; the message has the reason why it is needed.
        """
        if self.base is None and self._base_key is None:
            raise RecipeError(f"base_model: missing; {reason}, so that the base model is needed")
        if self.base is None:
            self.base = open_base(model_folder(str(self._base_key), "base_model"), self._stack)
        return self.base

    def _model(self, base: BaseModel, folder: Path) -> AdapterReader:
        """Open the model that an adapter gives, once."""
        if folder not in self._models:
            reader = AdapterReader(folder, base.reader, base.config, double=True)
            self._models[folder] = self._stack.enter_context(reader)
        return self._models[folder]


def open_base(folder: Path, stack: contextlib.ExitStack) -> BaseModel:
    """Open a base model; `stack` closes it."""
    reader, config, _ = open_form(folder)
    return BaseModel(folder, stack.enter_context(reader), config)


def open_group(recipe: Recipe, stack: contextlib.ExitStack) -> AdapterGroup:
    """Open the adapters that a recipe names; `stack` closes them.

    Raises:
        RecipeError, CheckpointError: A folder is no adapter, or adapters belong to different base models.
    """
    places: list[Path] = []
    bases: dict[str, Path] = {}
    for source in recipe.experts:
        where = dotted(source.model_location)
        pair = model_and_adapter(source.model, where)
        folder = model_folder(source.model, where) if pair is None else pair[1]
        if not is_adapter_folder(folder):
            raise RecipeError(f"{where}: {folder} is no adapter folder (no {CONFIG_FILE}); need PEFT adapters alone")
        if pair is not None:
            bases[os.path.realpath(pair[0])] = pair[0]
        places.append(folder)
    if recipe.base_model is not None and os.path.isdir(os.path.expanduser(recipe.base_model)):
        folder = model_folder(recipe.base_model, "base_model")
        bases[os.path.realpath(folder)] = folder
    if len(bases) > 1:
        first, second, *_ = bases.values()
        raise RecipeError(f"models: got adapters of {first} and of {second}, need adapters of one base model")
    base = None
    for folder in bases.values():
        base = open_base(folder, stack)
    shapes = None if base is None else {name: info.shape for name, info in base.reader.tensors.items()}
    opened = {os.path.realpath(f): stack.enter_context(AdapterSource(f, shapes)) for f in dict.fromkeys(places)}
    adapters = [opened[os.path.realpath(folder)] for folder in places]
    if base is not None:
        for source, adapter in zip(recipe.experts, adapters, strict=True):
            if "+" not in source.model:
                check_recorded_base(adapter.folder, adapter.config.base_name, base.folder)
    recorded = _recorded_base(adapters, trusted=recipe.base_model is not None or bool(bases))
    name = recorded or recipe.base_model or (None if base is None else str(base.folder))
    return AdapterGroup(adapters, base, recipe.base_model, name, stack)


def _recorded_base(adapters: Sequence[AdapterSource], *, trusted: bool) -> str | None:
    """Return the base model that the adapters record; refuse two, unless the recipe names the base model."""
    recorded = {a.config.base_name: a for a in reversed(adapters) if a.config.base_name is not None}
    names = {name.rstrip("/").rpartition("/")[2].lower(): name for name in reversed(recorded)}
    if len(names) > 1 and not trusted:
        first, second, *_ = names.values()
        raise CheckpointError(
            f"{recorded[second].folder / CONFIG_FILE}: base_model_name_or_path is {shortened(second)}, but "
            f"{recorded[first].folder} has {shortened(first)}; need adapters of one base model, or the recipe's "
            "base_model if they are the same"
        )
    return next((a.config.base_name for a in adapters if a.config.base_name is not None), None)
