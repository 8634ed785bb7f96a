"""This library's methods inside mergekit, under their names here and, on request, instead of its built-in methods.

mergekit plans, reads and writes; the arithmetic is this library's.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Optional

import torch
import yaml
from pydantic import Field
from torch import Tensor

from resm_kernels.methods import REQUIRED, Method, Parameter, get, names

FIRST_VERSION: Final = "0.1.5"
"""The first mergekit that has this plug-in interface."""


def register(*, replace: bool = False) -> tuple[str, ...]:
    """Make the merge methods of `resm_kernels.methods.names()`, installed plug-ins included, known to mergekit.

    Methods that need statistics (RegMean, Fisher merging) are left out: mergekit passes a method weights alone.

    mergekit itself does not look for plug-ins: call this in the same process before it reads a recipe, or run
    ``resm-kernels mergekit RECIPE OUT``. Results are rounded once, to the dtype of the tensors that mergekit passes
    (a recipe's `dtype`, else the widest of the models').

    Args:
        replace: True also runs mergekit's built-in methods on these kernels, with mergekit's parameters and defaults.
            It is False by default because results change: in bf16 by the rounding of mergekit's bf16 arithmetic, in
            fp32 in the last bits; and DARE and DELLA draw other masks, from the seed that mergekit-yaml's --random-seed
            sets.

    Returns:
        Names of the methods that run on this library's kernels. A second call only adds what `replace` adds.

    Raises:
        ImportError: mergekit is missing, or too old to have this interface.
        ValueError: Another plug-in has taken one of the names.
    """
    registry = _interface("merge_methods.registry")._METHODS
    registered = []
    for name in names():
        method, present = get(name), registry.get(name)
        if method.statistics is not None:
            continue
        if present is None:
            registry[name] = _plug_in(method, _spec(method))
        elif not isinstance(implementation := getattr(present, "implementation", present), _Implementation):
            if not implementation.__module__.startswith("mergekit."):
                raise ValueError(
                    f"{name}: another plug-in ({implementation.__module__}) has registered this name with mergekit"
                )
            if not replace:
                continue
            registry[name] = _plug_in(method, present.spec)
        registered.append(name)
    return tuple(registered)


def run(arguments: Sequence[str], *, replace: bool = False) -> None:
    """Run mergekit-yaml, or mergekit-multi for a recipe of several documents, with this library's methods registered.

    Args:
        arguments: The arguments of mergekit-yaml: the recipe, the output folder, options. With several documents,
            mergekit-multi's `--intermediate-dir` keeps the merges of those with a name; without it they are in a hidden
            folder beside the output while mergekit works.
        replace: As for `register`.

    Raises:
        ImportError, ValueError: As `register`.
        SystemExit: With mergekit's status.
    """
    register(replace=replace)
    name = "resm-kernels mergekit"
    if not _has_several_documents(arguments):
        _interface("scripts.run_yaml").main.main(args=list(arguments), prog_name=name)
        return
    recipe, *rest = arguments
    with contextlib.ExitStack() as stack:
        if rest and not rest[0].startswith("-"):
            rest[:1] = ["--out-path", rest[0]]
        kept = any(a == "-I" or a.partition("=")[0] == "--intermediate-dir" for a in rest)
        if not kept and "--out-path" in rest[:-1]:
            out = Path(rest[rest.index("--out-path") + 1]).resolve()
            out.parent.mkdir(parents=True, exist_ok=True)
            hidden = tempfile.TemporaryDirectory(prefix=f".{out.name}.intermediates-", dir=out.parent)
            rest += ["--intermediate-dir", stack.enter_context(hidden)]
        _interface("scripts.multimerge").main.main(args=[recipe, *rest], prog_name=name)


def _has_several_documents(arguments: Sequence[str]) -> bool:
    """Return True if the first argument is a recipe of several documents, or of one that has a name."""
    file = Path(arguments[0]) if arguments else None
    if file is None or not file.is_file():
        return False
    documents = list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
    return len(documents) > 1 or any(isinstance(d, dict) and "name" in d for d in documents)


def _interface(module: str) -> Any:
    """A module of mergekit, or an ImportError that names the package to install."""
    try:
        return importlib.import_module(f"mergekit.{module}")
    except ImportError as error:
        try:
            installed = f"version {importlib.metadata.version('mergekit')}"
        except importlib.metadata.PackageNotFoundError:
            installed = "none"
        need = f"need {FIRST_VERSION} or later (pip install 'mergekit>={FIRST_VERSION}')"
        raise ImportError(f"mergekit: got {installed}, {need}: {error}") from error


@dataclass(frozen=True)
class _Implementation:
    """A method as mergekit calls it, with the inputs of one output tensor and the parameters by their recipe keys."""

    method: Method

    def __call__(self, group: Any, /, **parameters: Any) -> Tensor:
        base = group.base if self.method.needs_base or self.method.optional_base else None
        experts = group.entries if base is None else group.non_base
        if not experts:
            copy: Tensor = group.base.tensor.clone()
            return copy
        arguments = {}
        for parameter in self.method.parameters:
            if parameter.name in parameters:
                value = parameters.pop(parameter.name)
                if value is not None or parameter.vocabulary is None:
                    arguments[parameter.keyword] = value.values_for(experts) if parameter.per_expert else value
        if unknown := sorted(parameters):
            raise TypeError(f"{self.method.name}: this mergekit has a parameter {unknown[0]!r} that is not known here")
        # mergekit may pass tensors that record gradients, which methods here refuse.
        with torch.no_grad():
            return self.method(
                None if base is None else base.tensor,
                [e.tensor for e in experts],
                name=group.metadata.name or "",
                seed=torch.initial_seed(),
                **arguments,
            )


def _plug_in(method: Method, spec: Any) -> Any:
    return _interface("merge_methods.base").FunctionalGroupMergeMethod(spec, _Implementation(method))


def _spec(method: Method) -> Any:
    kinds = _interface("merge_methods.base")
    policy = "REQUIRED" if method.needs_base else "OPTIONAL" if method.optional_base else "IGNORED"
    return kinds.MergeMethodSpec(
        name=method.name,
        pretty_name=method.title,
        reference_url=method.reference,
        parameters=tuple(_parameter_spec(p, method) for p in method.parameters),
        contract=kinds.InputContract(
            base=kinds.BasePolicy[policy], min_non_base=method.min_experts, max_non_base=method.max_experts
        ),
    )


def _parameter_spec(parameter: Parameter, method: Method) -> Any:
    kinds = _interface("merge_methods.base")
    scope = kinds.ParameterScope.SHARED
    if parameter.per_expert:
        base_aware = method.needs_base or method.optional_base
        scope = kinds.ParameterScope.NON_BASE if base_aware else kinds.ParameterScope.INPUT
    kind: Any = Literal[parameter.kind] if isinstance(parameter.kind, tuple) else parameter.kind
    if parameter.minimum is not None or parameter.maximum is not None:
        # mergekit then checks bounds when it reads the recipe, before it reads models.
        kind = Annotated[kind, Field(ge=parameter.minimum, le=parameter.maximum)]
    # mergekit has one default for all tensors. None leaves a default that depends on the tensor to the method.
    default = parameter.default if parameter.vocabulary is None else None
    return kinds.ParameterSpec(
        name=parameter.name,
        value_type=Optional[kind] if default is None else kind,  # noqa: UP045 (kind is a value)
        scope=scope,
        default=kinds.MISSING if default is REQUIRED else default,
        description=parameter.doc,
    )
