"""Adapters of one base model, side by side: which weights they change, and the task vectors of each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, TensorInfo
from resm_kernels.checkpoint.forms import is_adapter_folder
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.files import shortened
from resm_kernels.lora.adapter import AdapterReader
from resm_kernels.lora.base import BaseModel, OpenBase
from resm_kernels.lora.config import CONFIG_FILE, check_recorded_base, read_adapter_config
from resm_kernels.lora.elements import TaskVector
from resm_kernels.lora.factors import Factors
from resm_kernels.lora.source import AdapterSource
from resm_kernels.recipe import Recipe, RecipeError, dotted, model_and_adapter, model_folder
from resm_kernels.tensor_names import last_part, module_of

_WRAPPED: Final = ".base_layer."
"""What PEFT puts into the name of a tensor of a module that it adapts."""


class AdapterGroup:
    """Adapters that are merged to one.

    Args:
        adapters: The adapters, in the recipe's order; an adapter may be there more than once.
        base: Their base model, if the recipe names a folder.
        base_key: What the recipe calls the base model, which is opened if it is needed; None if it names none.
        base_name: What the merged adapter says of its base model.
        stack: Closes the models that are opened for the weights that adapters give.
        open_base: Opens the base model.

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
        open_base: OpenBase,
    ) -> None:
        self.adapters, self.base, self.base_name = list(adapters), base, base_name
        self._base_key, self._open_base = base_key, open_base
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
            known = self.modules[name], first.kernel(name), first.modules[name].embedding, first.slices(name)
            if (shape, kernel, module.embedding, adapter.slices(name)) != known:
                raise CheckpointError(
                    f"{adapter.folder}: module {name!r} has a weight of shape {shape}, need {known[0]} as in "
                    f"{first.folder}; need adapters of one base model"
                )
        self.modules.setdefault(name, shape)
        if self.base is not None:
            self._check_base(adapter, name, shape)

    def _check_base(self, adapter: AdapterSource, name: str, shape: tuple[int, int]) -> None:
        assert self.base is not None
        info = None if name in adapter.parameters else self.base.model.locate(f"{name}.weight")
        if info is None:
            return  # parameters are checked already; AdapterReader refuses others where their weights are needed
        stored = (info.shape[0], torch.Size(info.shape[1:]).numel()) if info.shape else ()
        if stored != shape:
            raise CheckpointError(
                f"{adapter.folder}: module {name!r} has factors of a weight {shape}, but {self.base.folder} has "
                f"{info.shape}; need its base model"
            )

    def _check_names(self) -> None:
        """Refuse adapters that were made through different classes, which name one module in two ways."""
        for long in self.modules:
            if f"{long}.weight" in self.modules:
                raise CheckpointError(
                    f"{self._first(long).folder}: adapts {long!r} by target_modules, and "
                    f"{self._first(f'{long}.weight').folder} by target_parameters; need the same in both"
                )
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
            located = None if self.base is None else self.base.model.locate(name)
            if self.base is not None and located is not None and located.stored_whole is not None:
                others.append(self.base.reader.read(located.stored_whole))
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

    def tensor(self, name: str) -> str:
        """Return the name of the adapted tensor in the loaded model."""
        return self._first(name).tensor(name)

    def slices(self, name: str) -> int:
        """Return of how many matrices a weight consists: of one for each expert if experts are fused, else of one."""
        return self._first(name).slices(name)

    def is_parameter(self, name: str) -> bool:
        """Return True if PEFT adapts the weight as a parameter of a module of any kind (target_parameters)."""
        return name in self._first(name).parameters

    def wrapper(self, name: str) -> str:
        """Return what PEFT calls the module that has the factors: it wraps a module once for each adapted parameter.

        The first parameter of the module is wrapped first, and each wrapper holds the one before.
        """
        if not self.is_parameter(name):
            return name
        assert self.base is not None
        module = module_of(name)
        order = self.base.model.parameters(module) or ()
        adapted = [other for other in order if f"{module}.{other}" in self.modules]
        return module + ".base_layer" * (len(adapted) - 1 - adapted.index(last_part(name)))

    def deltas(self, name: str) -> list[list[TaskVector]]:
        """Read each adapter's task vector of one weight, a list for each of its slices; those of DoRA are matrices.

        Raises:
            RecipeError: One is DoRA's, and the base model is not known.
        """
        m, n = self.modules[name]
        found: list[Sequence[TaskVector]] = []
        for adapter in self.adapters:
            if name not in adapter.modules:
                found.append([Factors(torch.zeros(m, 0), torch.zeros(0, n), 1.0)] * self.slices(name))
            elif "magnitude" in adapter.modules[name].parts:
                original, (changed,) = self.weights(f"{name}.weight", "DoRA scales the base's weights", [adapter])
                found.append([(changed - original).float().flatten(1)])
            else:
                found.append(adapter.factors(name))
        return [list(deltas) for deltas in zip(*found, strict=True)]

    def weights(
        self, tensor: str, reason: str, adapters: Sequence[AdapterSource] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Read a tensor of the base model, and of the model that each adapter gives, in float64.

        Raises:
            RecipeError: The recipe names no base model; the message has the reason why it is needed.
            CheckpointError: The base model has no such tensor, or an adapter does not fit it.
        """
        base = self.need_base(reason)
        found = base.model.locate(tensor)
        name = None if found is None else found.stored_whole
        if name is None or base.reader.tensors[name].dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{base.folder}: has no floating-point tensor {tensor!r}, need it: {reason}; need a base model of "
                "the adapters' class"
            )
        models = [self._model(base, a.folder) for a in (self.adapters if adapters is None else adapters)]
        return base.reader.read(name).double(), [model.read(name).double() for model in models]

    def need_base(self, reason: str) -> BaseModel:
        """Return the base model.

        Raises:
            RecipeError: The recipe names none; the message has the reason why it is needed.
        """
        if self.base is None and self._base_key is None:
            raise RecipeError(f"base_model: missing; {reason}, so that the base model is needed")
        if self.base is None:
            self.base = self._open_base(model_folder(str(self._base_key), "base_model"), self._stack)
        return self.base

    def _model(self, base: BaseModel, folder: Path) -> AdapterReader:
        """Open the model that an adapter gives, once."""
        if folder not in self._models:
            reader = AdapterReader(folder, base.reader, base.config, double=True, model=base.model)
            self._models[folder] = self._stack.enter_context(reader)
        return self._models[folder]


def open_group(recipe: Recipe, stack: contextlib.ExitStack, open_base: OpenBase) -> AdapterGroup:
    """Open the adapters that a recipe names, and their base model if it is named as a folder; `stack` closes them.

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
    if base is None and recipe.base_model is not None and any(read_adapter_config(f).target_parameters for f in places):
        base = open_base(model_folder(recipe.base_model, "base_model"), stack)
    opened = {os.path.realpath(f): stack.enter_context(AdapterSource(f, base)) for f in dict.fromkeys(places)}
    adapters = [opened[os.path.realpath(folder)] for folder in places]
    if base is not None:
        for source, adapter in zip(recipe.experts, adapters, strict=True):
            if "+" not in source.model:
                check_recorded_base(adapter.folder, adapter.config.base_name, base.folder)
    recorded = _recorded_base(adapters, trusted=recipe.base_model is not None or bool(bases))
    name = recorded or recipe.base_model or (None if base is None else str(base.folder))
    return AdapterGroup(adapters, base, recipe.base_model, name, stack, open_base)


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
