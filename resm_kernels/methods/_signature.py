"""Reads the parameters of a merge method from the annotated signature of its function."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from resm_kernels.methods._parameter import REQUIRED, Parameter

T = TypeVar("T")

_GIVEN: Final = ("out_dtype", "seed", "statistics", "transposed")
"""Keyword arguments of a method's function that are no parameters: whoever calls it derives them from the tensor."""


@dataclass(frozen=True)
class Option:
    """The part of a parameter's annotation next to its type: ``Annotated[float, Option("…", minimum=0)]``.

    Attributes:
        doc: One line for help texts and errors: meaning, unit, why this default.
        minimum, maximum: Inclusive bounds of a number.
        vocabulary: The default for embeddings and output heads, if it differs from the signature's.
        ignored: True if the parameter is accepted and changes nothing.
    """

    doc: str
    minimum: float | None = None
    maximum: float | None = None
    vocabulary: Any = None
    ignored: bool = False


def each(value: T) -> list[T]:
    """The default of a per-expert parameter, ``weight: Weight = each(1.0)``: every expert has this value."""
    return [value]


@dataclass(frozen=True)
class Signature:
    """The facts about a method that its signature states.

    Attributes:
        parameters: The keyword arguments that have an `Option`, in the signature's order.
        needs_base: True if `base` is a Tensor, False if it is a Tensor or None.
        draws: True if the function takes `seed`.
        statistics: True if it takes `statistics`.
        transposed: True if it takes `transposed`.
    """

    parameters: tuple[Parameter, ...]
    needs_base: bool
    draws: bool
    statistics: bool = False
    transposed: bool = False


def read_signature(function: Callable[..., Tensor]) -> Signature:
    """Read ``function(base, experts, *, option: Annotated[…, Option(…)] = default, …, out_dtype)``.

    The function may be a `functools.partial`: keywords that it sets are other defaults, or, for arguments without an
    `Option`, values that recipes cannot change.

    Raises:
        TypeError: The signature is not one of a merge method; the message names the argument.
    """
    inner = function.func if isinstance(function, functools.partial) else function
    title = getattr(inner, "__name__", str(inner))
    hints = {name: _annotated(hint) for name, hint in get_type_hints(inner, include_extras=True).items()}
    arguments = list(inspect.signature(function).parameters.values())
    if [a.name for a in arguments[:2]] != ["base", "experts"]:
        raise TypeError(f"{title}: a merge method's first two arguments are base and experts")
    parameters: list[Parameter] = []
    for argument in arguments[2:]:
        if argument.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise TypeError(f"{title}: {argument.name}: need a keyword-only argument, behind a * in the signature")
        options = [o for o in getattr(hints.get(argument.name), "__metadata__", ()) if isinstance(o, Option)]
        if options:
            # An alias that has an Option may be annotated with another one, which then counts.
            parameters.append(_parameter(title, argument, get_args(hints[argument.name])[0], options[-1]))
        elif argument.name not in _GIVEN and argument.name not in getattr(function, "keywords", {}):
            raise TypeError(f"{title}: {argument.name}: annotate it, such as Annotated[float, Option('what it means')]")
    names = {argument.name for argument in arguments}
    if "out_dtype" not in names:
        raise TypeError(f"{title}: need a keyword argument out_dtype: torch.dtype | None, the dtype of the result")
    needs_base = not _without_none(hints["base"])[1]
    return Signature(tuple(parameters), needs_base, *(name in names for name in ("seed", "statistics", "transposed")))


def _parameter(title: str, argument: inspect.Parameter, annotation: Any, option: Option) -> Parameter:
    per_expert = get_origin(annotation) is list
    if per_expert:
        (annotation,) = get_args(annotation)
    annotation, optional = _without_none(annotation)
    kind = get_args(annotation) if get_origin(annotation) is Literal else annotation
    if not isinstance(kind, tuple) and kind not in (float, int, bool):
        raise TypeError(
            f"{title}: {argument.name}: got {annotation}, need float, int, bool, a Literal, or a list of one"
        )
    default = REQUIRED if argument.default is argument.empty else argument.default
    if per_expert and default is not REQUIRED:
        if not isinstance(default, list) or len(default) != 1:
            raise TypeError(f"{title}: {argument.name}: got the default {default!r}, need each(value)")
        (default,) = default
    parameter = Parameter(
        argument.name.removesuffix("_"),
        kind,
        default,
        option.doc,
        per_expert=per_expert,
        minimum=option.minimum,
        maximum=option.maximum,
        vocabulary=option.vocabulary,
        ignored=option.ignored,
    )
    if optional != (default is None):
        raise TypeError(f"{title}: {argument.name}: need the default None for a type that allows None, and only there")
    if parameter.keyword != argument.name:
        raise TypeError(f"{title}: {argument.name}: a trailing underscore is for Python's reserved words alone")
    if default is not REQUIRED:
        parameter.validate(default)
    return parameter


def _annotated(hint: Any) -> Any:
    """The hint as it was written: Python 3.10 makes Optional[Annotated[…]] of it where the default is None."""
    members = get_args(hint) if get_origin(hint) is Union else ()
    return next((member for member in members if get_origin(member) is Annotated), hint)


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """The annotation without None, and whether None was part of it."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    members = [member for member in get_args(annotation) if member is not type(None)]
    return members[0] if len(members) == 1 else annotation, True
