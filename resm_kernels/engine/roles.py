"""The roles of a model's tensors, from the modules of its class in transformers, or else from their names.

The class says what a name cannot: whether a weight is stored as (in, out), how many groups a convolution has, which
module the output head is, and that a parameter of three dimensions is a stack of experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from torch import nn

from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.engine.architecture import Architecture, find_architecture
from resm_kernels.engine.models import Model
from resm_kernels.roles import (
    Role,
    TensorRole,
    is_head,
    is_norm,
    is_plain,
    lookup_role,
    matrix_role,
    parameter_role,
    role_by_name,
    stacked_role,
)
from resm_kernels.tensor_names import last_part, module_of

__all__ = ["Role", "Roles", "TensorRole", "roles_of"]

_FROM_NAMES: Final = "from names"
_PARAMETRIZED: Final = ".parametrizations."
_EXPERTS: Final = re.compile(r"Experts?(?![a-z])|ExpertGLU|MoeMLP")
_LAYOUTS: Final = (
    # Class, parameter, and the order of the dimensions: e for a stack of matrices, o for out, i for in. The last
    # letter stands for all further dimensions.
    (r"Llama4TextExperts", r".*", "eio"),
    (r"DbrxExpertGLU", r"w1|v1", "(eo)i"),
    (r"DbrxExpertGLU", r"w2", "(ei)o"),
    (r".*FlexibleLinear", r"weight", "eoi"),  # a matrix for each codebook of Moshi, CSM and Kyutai's models
    (r".*CodebooksHead", r"weight", "eio"),
    (r"GroupedLinearLayer", r"weight", "eio"),
    (r"RecurrentGemmaRglru", r"(?:input|recurrent)_gate_weight", "eio"),
    (r"Zamba\w*Mixer", r"x_proj_weight|dt_proj_weight", "eoi"),
    (r"XLNet\w*Attention", r"[qkvr]", "io"),
    (r"XLNet\w*Attention", r"o", "oi"),
    (r"Funnel\w*Attention", r"r_kernel", "io"),
    (r".*(?:HyperConnection|HyperHead)\w*", r"fn|hc_fn", "oi"),
    (r".*", r"mm_input_projection_weight|text_projection|prompts_visual_projection", "io"),
    (r"Inkling\w*", r"proj", "io"),
    (r"Inkling\w*Shared\w*", r"gate_proj|up_proj|down_proj", "eoi"),
)


def roles_of(model: Model, names: Iterable[str]) -> Mapping[str, TensorRole]:
    """Return the role of each of these tensors, which are named as in `model.reader`.

    They come from the model's class in transformers, without its weights, or where that is not known from the names.
    """
    return _roles(model, list(names))[0]


def _roles(model: Model, names: Sequence[str]) -> tuple[Mapping[str, TensorRole], str]:
    """Return the role of each of these tensors, and in words where they are from."""
    # A configuration that names no class, as that of a diffusers component, is none of transformers'.
    known = bool(model.config.get("architectures"))
    architecture = find_architecture(model.base_folder, model.config) if known else None
    shapes = {name: model.reader.tensors[name].shape for name in names}
    if architecture is None:
        return {name: role_by_name(name, shapes[name], model.config) for name in names}, _FROM_NAMES
    stored = {name: (model.reader.stored_name(name), shapes[name]) for name in names}
    return RolesInMemory(architecture).of(stored), f"from {type(architecture.model).__name__}"


class Roles:
    """The roles of the tensors of several models, found out when they are asked for.

    Models are made from their classes only if names leave a doubt, as importing transformers takes seconds.
    """

    def __init__(self) -> None:
        self._by_reader: dict[int, Mapping[str, TensorRole]] = {}
        self._sources: dict[str, None] = {}

    @property
    def source(self) -> str:
        """Where the roles asked for so far are from, in words."""
        return " and ".join(self._sources)

    def of(self, model: Model, name: str) -> TensorRole:
        """Return the role of a model's tensor, which is named as in `model.reader`."""
        key = id(model.reader)
        if key not in self._by_reader:
            tensors = model.reader.tensors
            names = [n for n, info in tensors.items() if info.dtype in FLOAT_DTYPES]
            if _in_doubt(model, names):
                self._by_reader[key], source = _roles(model, names)
            else:
                self._by_reader[key] = {n: role_by_name(n, tensors[n].shape, model.config) for n in names}
                source = _FROM_NAMES
            self._sources[source] = None
        return self._by_reader[key][name]


def _in_doubt(model: Model, names: Iterable[str]) -> bool:
    """Return True if names alone do not tell the roles of all these tensors."""
    return any(not is_plain(name, model.reader.tensors[name].shape) for name in names)


class RolesInMemory:
    """The roles of a class's tensors.

    Args:
        architecture: What transformers knows about the model.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._modules: dict[str, nn.Module] = dict(architecture.model.named_modules())
        self._shapes = architecture.shapes
        self._heads = set(_heads(architecture.model))

    def of(self, stored: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, TensorRole]:
        """Return the role of each tensor, given its name and shape in the files."""
        keys = self._architecture.keys(name for name, _ in stored.values())
        return {name: self._role(keys[old], tuple(shape)) for name, (old, shape) in stored.items()}

    def _role(self, key: str, shape: tuple[int, ...]) -> TensorRole:
        in_memory = self._shapes.get(key)
        if in_memory is None:
            return role_by_name(key, shape, self._architecture.config.to_dict())
        path, parameter = module_of(key), last_part(key)
        if _PARAMETRIZED in key:
            path, _, rest = key.partition(_PARAMETRIZED)
            if last_part(rest) == "original0":
                return matrix_role(Role.NORM, path, shape)
            parameter = rest.split(".")[0]
        role = self._owned(path, parameter, shape, len(in_memory))
        is_turned = shape != in_memory and shape[:-2] == in_memory[:-2] and shape[-2:] == in_memory[:-3:-1]
        if is_turned and role.role.is_linear_map:
            # transformers turns such weights when it loads them.
            return TensorRole(role.role, path, role.slices, role.rows, role.columns, not role.transposed)
        return role

    def _owned(self, path: str, parameter: str, shape: tuple[int, ...], rank: int) -> TensorRole:
        """Return the role of a module's parameter, which has `rank` dimensions in memory, and `shape` in the files."""
        module = self._modules[path]
        name = type(module).__name__
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)) or (
            (is_norm(name) or name.endswith("GRN")) and max(shape, default=1) == _numel(shape)
        ):
            return matrix_role(Role.NORM, path, shape)
        if isinstance(module, nn.Embedding):
            return matrix_role(_table_role(path, name), path, shape)
        if parameter in ("bias", "in_proj_bias") or rank < 2:
            stated = parameter_role(parameter)
            return matrix_role(Role.OTHER if stated is None else stated, path, shape)
        if isinstance(module, nn.modules.conv._ConvNd):
            # Each group has its own inputs and outputs, so that it is a linear map of its own. A file may have some of
            # them that are joined in memory.
            groups = max(module.groups * shape[0] // module.weight.shape[0], 1)
            return matrix_role(Role.CONVOLUTION, path, shape, slices=groups, transposed=module.transposed)
        if isinstance(module, nn.Linear) and parameter == "weight":
            return matrix_role(Role.OUTPUT_HEAD if path in self._heads or is_head(path) else Role.LINEAR, path, shape)
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and "weight" in parameter:
            return matrix_role(Role.LINEAR, path, shape)
        if name == "Conv1D":
            return matrix_role(Role.LINEAR, path, shape, transposed=True)
        return self._of_parameter(module, path, parameter, shape, rank)

    def _of_parameter(
        self, module: nn.Module, path: str, parameter: str, shape: tuple[int, ...], rank: int
    ) -> TensorRole:
        """Return the role of a parameter of a module of transformers' own that is none of torch's kinds."""
        name = type(module).__name__
        layout = next((o for c, p, o in _LAYOUTS if re.fullmatch(c, name) and re.fullmatch(p, parameter)), None)
        is_experts = hasattr(module, "is_transposed") or _EXPERTS.search(name) is not None
        if layout is None and is_experts and rank == 3 and parameter_role(parameter) is None:
            layout = "eio" if getattr(module, "is_transposed", False) else "eoi"
        if layout is not None:
            role = Role.FUSED_EXPERTS if is_experts else Role.OUTPUT_HEAD if is_head(path) else Role.LINEAR
            transposed = layout.endswith("o")
            if len(shape) == rank and layout.startswith("e"):
                return stacked_role(role, path, shape, transposed=transposed)
            slices = 1
            if layout.startswith("("):
                # The experts of DBRX are one below the other.
                slices = int(module.moe_num_experts)  # type: ignore[arg-type]
            if len(shape) < rank:  # one expert of those that are joined in memory
                role = Role.LINEAR
            return matrix_role(role, path, shape, slices=slices, transposed=transposed)
        stated = parameter_role(parameter)
        if stated is not None:
            return matrix_role(stated, path, shape)
        if rank == 2 and parameter == "weight" and not re.search(r"Loss|Embedding", name):
            return matrix_role(Role.LINEAR, path, shape)
        return matrix_role(_table_role(path, name) if "Embedding" in name else Role.OTHER, path, shape)


def _numel(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _table_role(path: str, class_name: str) -> Role:
    """Return the role of an `nn.Embedding`, most of which are looked up by token."""
    parts = [part for part in path.split(".") if not part.isdigit()]
    named = lookup_role(parts[-1]) if parts else None
    if named in (Role.BIAS_TABLE, Role.POSITION_TABLE):
        return named
    if "bias" in (parts[-1] if parts else "").lower():
        return Role.BIAS_TABLE
    return Role.POSITION_TABLE if "Position" in class_name else Role.EMBEDDING


def _heads(model: Any) -> Iterable[str]:
    """Yield the names of the modules that transformers says are output heads, of the model and of models within it."""
    names = {id(module): name for name, module in model.named_modules()}
    for module in model.modules():
        if not hasattr(module, "get_output_embeddings"):
            continue
        try:
            head = module.get_output_embeddings()
        except NotImplementedError:  # a class that has no head says so
            continue
        for leaf in head.modules() if isinstance(head, nn.Module) else ():
            if id(leaf) in names:
                yield names[id(leaf)]
