"""The registry of merge methods: this library's, those that a program registers, and those of installed packages."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Final, TypeVar

from torch import Tensor

from resm_kernels.files import shortened
from resm_kernels.methods._method import BlockRule, Method, StatisticsKind, StatisticsModel
from resm_kernels.methods._signature import read_signature
from resm_kernels.suggestions import did_you_mean

F = TypeVar("F", bound=Callable[..., Tensor])

ENTRY_POINTS: Final = "resm_kernels.methods"
"""The entry-point group in which installed packages name their methods: ``name = module``."""

_methods: Final[dict[str, Method]] = {}
_loaded: Final[set[tuple[str, str]]] = set()
"""Names and values of the entry points that have been loaded."""


def plain_workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Bytes of a method in plain torch: two float64 tensors for each expert and four more."""
    return (8 << 20) + 8 * (2 * n_experts + 4) * math.prod(shape)


def merge_method(
    *,
    title: str,
    reference: str,
    name: str | None = None,
    workspace: Callable[[tuple[int, ...], int], int] = plain_workspace,
    min_experts: int = 1,
    max_experts: int | None = None,
    ignores_base: bool = False,
    statistics: StatisticsKind | None = None,
    statistics_model: StatisticsModel = "expert",
    blocks: BlockRule | None = None,
    **preset: Any,
) -> Callable[[F], F]:
    """Register the decorated function as a merge method, and return the function unchanged.

    The function is ``function(base, experts, *, …, out_dtype)`` and returns the merged tensor, in `out_dtype` or else
    in base's dtype. Its signature says all about its parameters:

    - ``base: Tensor`` needs a base; ``base: Tensor | None`` merges models where a recipe has none.
    - ``steps: Annotated[int, Option("its meaning", minimum=0)] = 300`` is the recipe's parameter ``steps``. Its type
      is float, int, bool or a Literal of strings, or one of these or None with the default None. An argument without a
      default must be in the recipe. ``lambda_`` is the recipe's ``lambda``.
    - ``density: Annotated[list[float], Option(…)] = each(1.0)`` has one value for each expert, and arrives as a list.
    - ``seed: int`` gets the key of this tensor's random numbers.
    - ``statistics: list[Tensor | None]`` gets each expert's statistic of this tensor, None for a tensor without, and
      ``transposed: bool`` says whether a weight is stored as (in, out); see the argument `statistics`.

    Args:
        title: The method's name in prose, such as "TIES".
        reference: Where the method is defined, an address.
        name: What recipes call it (`merge_method`); the function's name by default.
        workspace: ``workspace(shape, n_experts)``, an upper bound of the bytes that a call allocates beyond its
            inputs and its output. The default is enough for two float64 tensors for each expert and four more.
        min_experts, max_experts: How many experts it merges, not counting the base; None: any number.
        ignores_base: True for a ``base: Tensor | None`` from which no differences are formed.
        statistics: The kind of statistics that the function takes beside the weights: "gram", the (in, in) Gram matrix
            of a linear layer's inputs, for which the function takes `transposed` too, or "fisher", a Fisher information
            for each weight. None for a method that merges weights alone.
        statistics_model: Whose statistics they are: "expert" for those of each expert itself, "merged" for those of one
            merged model, computed with each expert's prompts.
        blocks: ``blocks(shape, parameters)``, the number of elements of which the blocks of a streamed tensor
            (`resm_kernels.streams`) have to be multiples; None if this tensor has to be whole. A function has a rule
            if it calls nothing on its tensors but functions that take streamed ones.
        preset: Other defaults, or values of arguments without an `Option`, which recipes cannot set. One function can
            thus be several methods: give it one decorator for each.

    Raises:
        TypeError: The signature is not one of a merge method.
        ValueError: The name is taken.

    Examples:
        >>> @merge_method(title="Half way", reference="https://example.org")
        ... def half_way(base: Tensor, experts: list[Tensor], *, out_dtype: torch.dtype | None) -> Tensor:
        ...     return torch.lerp(base, experts[0], 0.5).to(out_dtype or base.dtype)
    """

    def decorate(function: F) -> F:
        if unknown := sorted(preset.keys() - inspect.signature(function).parameters.keys()):
            raise TypeError(f"merge_method: {unknown[0]}: neither a keyword here nor an argument of the function")
        method_function = functools.partial(function, **preset) if preset else function
        signature = read_signature(method_function)
        taken = {None: (False, False), "gram": (True, True), "fisher": (True, False)}[statistics]
        if (signature.statistics, signature.transposed) != taken:
            raise TypeError(
                f"{getattr(function, '__name__', function)}: merge_method(statistics={statistics!r}) needs a function "
                f"with{'' if taken[0] else 'out'} the argument statistics and with{'' if taken[1] else 'out'} the "
                "argument transposed"
            )
        method_name = name or str(getattr(function, "__name__", ""))
        if not method_name:
            raise TypeError("merge_method: name: missing; a functools.partial has no name")
        register(
            Method(
                name=method_name,
                title=title,
                reference=reference,
                needs_base=signature.needs_base,
                parameters=signature.parameters,
                function=method_function,
                workspace=workspace,
                optional_base=not signature.needs_base and not ignores_base,
                min_experts=min_experts,
                max_experts=max_experts,
                draws=signature.draws,
                statistics=statistics,
                statistics_model=statistics_model,
                blocks=blocks,
            )
        )
        return function

    return decorate


def register(method: Method) -> None:
    """Make a method known under its name: to `merge`, to recipes, and to the mergekit plug-in.

    Raises:
        ValueError: Another method has this name. A method that is defined again, as in a notebook, replaces itself.
    """
    known = _methods.get(method.name)
    if known is not None and _origin(known) != _origin(method):
        raise ValueError(
            f"merge method {method.name!r}: got two, one from {_origin(known)} and one from {_origin(method)}; need "
            "different names"
        )
    _methods[method.name] = method


def get(name: str) -> Method:
    """Return the method that recipes call `name`, or raise a ValueError that names the nearest one."""
    if name not in _methods:
        _load_entry_points(name)
    if name not in _methods:
        known = names()
        raise ValueError(
            f"unknown merge method {shortened(name)}{did_you_mean(name, known)}; known: {', '.join(known)}"
        )
    return _methods[name]


def names() -> tuple[str, ...]:
    """Names of all merge methods, in alphabetical order; those of installed packages are loaded for it."""
    _load_entry_points()
    return tuple(sorted(_methods))


def registered() -> tuple[Method, ...]:
    """The methods that have been registered so far, by name in alphabetical order."""
    return tuple(_methods[name] for name in sorted(_methods))


def _origin(method: Method) -> str:
    function: Any = getattr(method.function, "func", method.function)  # of a functools.partial
    return f"{function.__module__}.{function.__qualname__}"


def _load_entry_points(name: str | None = None) -> None:
    """Import the modules that installed packages name in the entry-point group, or only that of one method.

    Raises:
        ValueError: An entry point cannot be imported, registers no method of its name, or one whose name is taken.
    """
    from importlib.metadata import entry_points  # takes longer to import than most callers need

    for point in entry_points(group=ENTRY_POINTS):
        if (point.name, point.value) in _loaded or name not in (None, point.name):
            continue
        package = "" if point.dist is None else f" of {point.dist.name} {point.dist.version}"
        plug_in = f"the plug-in {point.name!r}{package} (entry point {point.value!r} in {ENTRY_POINTS})"
        try:
            point.load()
        except Exception as error:
            raise ValueError(f"{plug_in} could not be loaded: {type(error).__name__}: {error}") from error
        if point.name not in _methods:
            raise ValueError(f"{plug_in} registers no merge method of that name")
        _loaded.add((point.name, point.value))
