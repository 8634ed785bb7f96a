"""Checks the roles of a model's tensors against the modules that own them, for `families.py`."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resm_kernels.engine.models import open_model
from resm_kernels.engine.roles import roles_of
from resm_kernels.roles import Role, TensorRole, is_plain, role_by_name

_TABLES = {Role.EMBEDDING, Role.POSITION_TABLE, Role.BIAS_TABLE}
_MAPS = {Role.LINEAR, Role.FUSED_EXPERTS, Role.CONVOLUTION}


def wrong_roles(folder: Path, model: Any) -> list[str]:
    """Return the tensors of a folder whose role contradicts the module that owns them in `model`.

    Where names alone are taken at their word (`is_plain`), they have to say the same.
    """
    modules = dict(model.named_modules())
    heads = set(_heads(model))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    wrong = []
    with contextlib.ExitStack() as stack:
        opened = open_model(str(folder), "model", stack)
        stack.callback(opened.reader.close)
        tensors = {n: info for n, info in opened.reader.tensors.items() if info.dtype.is_floating_point}
        for name, role in roles_of(opened, tensors).items():
            shape = tensors[name].shape
            problem = ""
            if role.slices * role.rows * role.columns != torch.Size(shape).numel():
                problem = f"{role.matrices} are not all of {shape}"
            elif name in shapes:
                path, _, parameter = name.partition(".parametrizations.")[0].rpartition(".")
                if ".parametrizations." in name:
                    path, parameter = f"{path}.{parameter}".strip("."), name.rpartition(".")[2]
                problem = _problem(modules[path], parameter, shape, shapes[name], role, path in heads)
            elif re.search(r"\.experts\.\d+\.", name) and len(shape) == 2 and role.role is not Role.LINEAR:
                problem = f"an expert is {role.role}"
            by_name = role_by_name(name, shape, opened.config)
            same = (by_name.role, by_name.matrices, by_name.transposed) == (role.role, role.matrices, role.transposed)
            same |= by_name.role.is_vocabulary and role.role.is_vocabulary
            if not problem and not same and max(shape, default=1) < math.prod(shape) and is_plain(name, shape):
                problem = f"{role.role}, by name {by_name.role}"
            if problem:
                wrong.append(f"{name}: {problem}")
    return wrong


def _problem(
    module: nn.Module,
    parameter: str,
    shape: tuple[int, ...],
    in_memory: tuple[int, ...],
    role: TensorRole,
    is_head: bool,
) -> str:
    """Return what is wrong with the role of a module's parameter; nothing if it is right."""
    name = type(module).__name__
    allowed = set(Role) - _MAPS
    if parameter == "original0" or (re.search("Norm|GRN", name) and not isinstance(module, nn.Embedding)):
        allowed = {Role.NORM}
    elif "bias" in parameter and not re.search("table|relative|position|biases", parameter):
        allowed = {Role.BIAS, Role.STATE}
    elif isinstance(module, nn.Embedding):
        allowed = _TABLES
    elif isinstance(module, nn.modules.conv._ConvNd):
        allowed = {Role.CONVOLUTION}
        if role.slices != module.groups:
            return f"{role.slices} slices of {module.groups} groups"
    elif isinstance(module, nn.Linear) and parameter == "weight":
        allowed = {Role.OUTPUT_HEAD} if is_head else {Role.LINEAR, Role.OUTPUT_HEAD}
        if shape == in_memory and (role.transposed or (role.rows, role.columns) != shape):
            return f"{role.matrices} transposed={role.transposed}, {shape} in nn.Linear"
    elif name == "Conv1D":
        allowed = {Role.LINEAR}
        if not role.transposed:
            return "(in, out) not known"
    elif len(in_memory) > 1 and ("Experts" in name or "ExpertGLU" in name):
        allowed = {Role.FUSED_EXPERTS}
        return _experts_problem(module, parameter, shape, role)
    elif len(in_memory) > 1 and parameter not in ("A_log", "D"):
        allowed = set(Role)
    return "" if role.role in allowed else f"{role.role} in {name}"


def _experts_problem(module: Any, parameter: str, shape: tuple[int, ...], role: TensorRole) -> str:
    """Return what is wrong with the role of fused experts' weight, by the module's own sizes."""
    if role.role is not Role.FUSED_EXPERTS:
        return f"{role.role} in {type(module).__name__}"
    sizes = [getattr(module, key, None) for key in ("num_experts", "moe_num_experts", "n_routed_experts")]
    count = next((size for size in sizes if size is not None), shape[0])
    if role.slices != count:
        return f"{role.slices} slices of {count} experts"
    hidden = next(
        (s for key in ("hidden_size", "hidden_dim") if isinstance(s := getattr(module, key, None), int)), None
    )
    if hidden is None or (role.rows == hidden) == (role.columns == hidden):
        return ""
    ends_in_hidden = "down" in parameter or parameter == "w2"
    is_in_out = (role.columns == hidden) == ends_in_hidden
    return "" if is_in_out == role.transposed else f"transposed={role.transposed} of {role.matrices}"


def _heads(model: Any) -> Iterator[str]:
    """Yield the name of the module that the model says is its output head."""
    head = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        head = model.get_output_embeddings()
    yield from (name for name, module in model.named_modules() if module is head)
