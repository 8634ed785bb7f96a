"""An adapter's folder, read without its base model: factors by module, and the tensors stored whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, CheckpointReader, TensorInfo
from resm_kernels.checks import NonFiniteError
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.files import read_object
from resm_kernels.lora.base import BaseModel
from resm_kernels.lora.changes import LowRank
from resm_kernels.lora.config import CONFIG_FILE, find_weights, read_adapter_config
from resm_kernels.lora.factors import Factors
from resm_kernels.lora.parts import StoredModule, read_stored
from resm_kernels.lora.targets import TargetFinder

_ADVICE: Final = "merge it with its base model (resm-kernels merge), and extract an adapter (extract-lora)"


class AdapterSource:
    """A LoRA adapter that is merged with others. Use it as a context manager.

    Args:
        folder: The adapter's folder, with `adapter_config.json` and `adapter_model.safetensors`.
        base: The base model, if it is known. It says which weights are stored as (in, out), without it the
            configuration's `fan_in_fan_out` does; and which parameters the adapter's `target_parameters` are.

    Attributes:
        folder: The folder.
        config: The entries of the configuration that give the tensors their meaning.
        entries: All its entries.
        modules: The adapted modules by name, parameters of `target_parameters` by the parameter's name.
        parameters: What is adapted as a parameter of any module, by its name.
        saved: The tensors that the adapter stores whole, by their names in the loaded model.

    Raises:
        CheckpointError: The folder is damaged, or has changes that adapters are not merged with.
    """

    def __init__(self, folder: Path, base: BaseModel | None = None) -> None:
        weights_file = find_weights(folder)
        self.folder = folder
        self.config = read_adapter_config(folder)
        self.entries: Mapping[str, Any] = read_object(folder / CONFIG_FILE, CheckpointError)
        self._base = base
        self._check_kind()
        self._reader = CheckpointReader(folder, weights_file)
        stored = read_stored(self._reader.tensors)
        self.modules: dict[str, StoredModule] = {}
        self.parameters: dict[str, LowRank] = {}
        self.saved: dict[str, TensorInfo] = stored.saved
        if self.config.target_parameters:
            self._find_parameters(stored.modules)
        else:
            for module in stored.modules:
                self._check(module)
                self.modules[module.name] = module

    def __enter__(self) -> AdapterSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def _check_kind(self) -> None:
        """Refuse changes that have no factors of one weight each."""
        file = self.folder / CONFIG_FILE
        if self.config.peft_type != "LORA":
            raise CheckpointError(f"{file}: peft_type is {self.config.peft_type}, need LORA; or {_ADVICE}")
        for key in ("trainable_token_indices", "lora_bias"):
            if self.entries.get(key):
                raise CheckpointError(f"{file}: {key} is set, and adapters with it are not merged to one; {_ADVICE}")

    def _find_parameters(self, modules: list[StoredModule]) -> None:
        """Find out which modules are adapted, and which parameters; the order of changes says that, see `targets`."""
        if self._base is None:
            raise CheckpointError(
                f"{self.folder / CONFIG_FILE}: target_parameters is set, and only the base model says which parameters "
                "the factors belong to; need base_model in the recipe"
            )
        finder = TargetFinder(self.config, self._base.model, self._base.config, self._base.folder)
        for module, target in zip(modules, finder.targets(modules), strict=True):
            if finder.is_named(target.name):
                assert isinstance(target.change, LowRank)
                self.modules[target.name], self.parameters[target.name] = module, target.change
            else:
                self._check(module)
                self.modules[module.name] = module

    def _check(self, module: StoredModule) -> None:
        """Raise a CheckpointError if factors are missing, or are not of the rank that the configuration states."""
        where = f"{module.file}: module {module.name!r}"
        needed = {"A", "B"} | ({"magnitude"} if self.config.use_dora else set())
        if missing := needed - module.parts.keys():
            raise CheckpointError(f"{where} has no lora_{', lora_'.join(sorted(missing))}; save the adapter again")
        if extra := module.parts.keys() - needed:
            raise CheckpointError(f"{where} has a {sorted(extra)[0]}, which {CONFIG_FILE} does not announce; need both")
        a, b, rank = module.parts["A"], module.parts["B"], self.config.rank(module.name)
        if (bad := next((info for info in (a, b) if info.dtype not in FLOAT_DTYPES), None)) is not None:
            raise CheckpointError(f"{bad.file}: tensor {bad.name!r} is {bad.dtype}; need floating-point factors")
        same_kind = len(a.shape) == len(b.shape) >= 2 and all(size == 1 for size in b.shape[2:])
        if not same_kind or (a.shape[0], b.shape[1]) != (rank, rank):
            raise CheckpointError(
                f"{where} has A {a.shape} and B {b.shape}, need rank {rank} (r, rank_pattern) in both"
            )

    def kernel(self, name: str) -> tuple[int, ...]:
        """Return the spatial sizes of a convolution's kernel; none for other modules."""
        return () if name in self.parameters else self.modules[name].parts["A"].shape[2:]

    def tensor(self, name: str) -> str:
        """Return the name of the adapted tensor in the loaded model."""
        return name if name in self.parameters else f"{name}.weight"

    def slices(self, name: str) -> int:
        """Return of how many matrices a weight consists: of one for each expert if experts are fused, else of one."""
        return max(self.parameters[name].experts, 1) if name in self.parameters else 1

    def transposed(self, name: str) -> bool:
        """Return True if the module's weight is stored as (in, out), the transpose of B·A."""
        if name in self.parameters:
            return self.parameters[name].transposed
        module = self.modules[name]
        a, b = module.parts["A"].shape, module.parts["B"].shape
        stored = None if self._base is None else self._base.model.locate(f"{name}.weight")
        known = () if stored is None else stored.shape
        if module.embedding or len(a) > 2:
            return module.embedding
        if b[0] != a[1] and known in ((b[0], a[1]), (a[1], b[0])):
            return known == (a[1], b[0])
        return self.config.fan_in_fan_out

    def shape(self, name: str) -> tuple[int, int]:
        """Return the shape of a weight as a matrix: of a convolution (out, in × kernel), of a stack that of a slice."""
        if name in self.parameters:
            rows, columns = self.parameters[name].shape[-2:]
            return rows, columns
        parts = self.modules[name].parts
        out, inner = parts["B"].shape[0], torch.Size(parts["A"].shape[1:]).numel()
        return (inner, out) if self.transposed(name) else (out, inner)

    def read(self, name: str) -> Tensor:
        """Read a tensor of `saved`."""
        return self._reader.read_info(self.saved[name])

    def factors(self, name: str) -> list[Factors]:
        """Read the factors of a module's task vector, a matrix of shape `shape(name)`, or one for each slice.

        Raises:
            NonFiniteError: A factor has NaN or infinite values.
        """
        parts = self.modules[name].parts
        a, b = (self._reader.read_info(parts[part]).flatten(1) for part in "AB")
        for part, tensor in (("A", a), ("B", b)):
            if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
                raise NonFiniteError(f"{parts[part].file}: lora_{part} of {name!r}", None, bad)
        if name in self.parameters:
            return [self.parameters[name].factors(a, b, expert) for expert in range(self.slices(name))]
        left, right = (a.mT, b.mT) if self.transposed(name) else (b, a)
        return [Factors(left, right, self.config.scale(name))]
