"""The record of a merge method: a function on tensors, and the description that recipes and plug-ins read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from resm_kernels.files import shortened
from resm_kernels.methods._parameter import REQUIRED, Parameter
from resm_kernels.suggestions import did_you_mean

StatisticsKind: TypeAlias = Literal["gram", "fisher"]
StatisticsModel: TypeAlias = Literal["expert", "merged"]
BlockRule: TypeAlias = Callable[[tuple[int, ...], Mapping[str, Any]], "int | None"]


@dataclass(frozen=True)
class Method:
    """A merge method, which is called like its function: `method(base, experts, **parameters)`.

    `merge_method` makes one from a function and its annotated signature.

    Attributes:
        name: The name that recipes use (`merge_method`).
        title: The method's name in prose.
        reference: Where it is defined.
        needs_base: False if it can merge models rather than task vectors; then `base` may be None.
        parameters: All parameters, each of which is a keyword argument of the call.
        function: `function(base, experts, *, out_dtype, **parameters)`; per-expert parameters arrive as lists.
        workspace: `workspace(shape, n_experts)` is an upper bound of the bytes that one call allocates beyond its
            inputs and its output.
        optional_base: True if it merges task vectors where there is a base, and models where there is none.
        min_experts, max_experts: How many experts it merges, not counting the base; None: any number.
        draws: True if it draws random numbers; then `function` takes `seed`, the 63-bit key of the tensor.
        statistics: The kind of statistics that `function` takes as `statistics`, one for each expert: "gram", with
            which it takes `transposed` too, or "fisher". None if it merges weights alone.
        statistics_model: Whose statistics: those of each "expert" itself, or of one "merged" model.
        blocks: `blocks(shape, parameters)` is the unit of the blocks in which a tensor of that shape may be merged
            (`resm_kernels.streams`): each begins at a multiple of so many elements, and is flat, or has whole rows if
            the unit is a multiple of a row. It is None, as the whole rule may be, if the tensor has to be whole.
    """

    name: str
    title: str
    reference: str
    needs_base: bool
    parameters: tuple[Parameter, ...]
    function: Callable[..., Tensor]
    workspace: Callable[[tuple[int, ...], int], int]
    optional_base: bool = False
    min_experts: int = 1
    max_experts: int | None = None
    draws: bool = False
    statistics: StatisticsKind | None = None
    statistics_model: StatisticsModel = "expert"
    blocks: BlockRule | None = None

    def check_count(self, n_experts: int) -> None:
        """Raise a ValueError unless the method merges that many experts."""
        least, most = self.min_experts, self.max_experts
        if n_experts < least or (most is not None and n_experts > most):
            needed = f"at least {least}" if most is None else str(least) if least == most else f"{least} to {most}"
            base = " beside the base" if self.needs_base else ""
            raise ValueError(f"got {n_experts}, but {self.name} merges {needed}{base}")

    def parameter(self, name: str) -> Parameter:
        """Return the parameter of that recipe key, or raise a ValueError that names the nearest one."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = tuple(p.name for p in self.parameters)
        raise ValueError(
            f"{self.name} has no parameter {shortened(name)}{did_you_mean(name, known)}; it has "
            f"{', '.join(known) or 'none'}"
        )

    def resolve(self, n_experts: int, arguments: dict[str, Any], name: str = "") -> dict[str, Any]:
        """Check the arguments, fill in defaults, and repeat single values of per-expert parameters for each expert.

        Args:
            arguments: Values by keyword, such as lambda_.
            name: The tensor's name, on which defaults may depend.

        Returns:
            The value of every parameter by keyword, but for ignored ones, which are only checked.

        Raises:
            ValueError, TypeError: An unknown, missing or bad argument, or a number of experts that cannot be merged.
        """
        try:
            self.check_count(n_experts)
        except ValueError as error:
            raise ValueError(f"experts: {error}") from None
        by_keyword = {p.keyword: p for p in self.parameters}
        for keyword in arguments:
            if keyword not in by_keyword:
                self.parameter(keyword)  # raises, naming the nearest
                raise TypeError(f"{self.name}: pass {keyword!r} as {self.parameter(keyword).keyword!r}")
        values = {k: _resolve_one(p, arguments.get(k, p.default_for(name)), n_experts) for k, p in by_keyword.items()}
        return {k: value for k, value in values.items() if not by_keyword[k].ignored}

    def __call__(
        self,
        base: Tensor | None,
        experts: Sequence[Tensor],
        *,
        out_dtype: torch.dtype | None = None,
        name: str = "",
        seed: int = 0,
        statistics: Sequence[Tensor | None] | None = None,
        transposed: bool = False,
        **arguments: Any,
    ) -> Tensor:
        """Merge one tensor. Some defaults depend on its `name`; random numbers depend on `name` and `seed`.

        `statistics` has one entry for each expert, None for a tensor without; `transposed` says that the weight is
        stored as (in, out). Methods that merge weights alone take neither.
        """
        if isinstance(experts, Tensor) or len(experts) == 0:
            raise ValueError(
                f"experts: got {'a tensor' if isinstance(experts, Tensor) else 'none'}, need a sequence of "
                "one or more tensors"
            )
        if self.needs_base and base is None:
            raise ValueError(f"base: got None, but {self.name} merges task vectors and needs the base tensor")
        parameters = self.resolve(len(experts), arguments, name)
        if self.draws:
            parameters["seed"] = tensor_key(seed, name)
        parameters |= self._given_statistics(len(experts), statistics, transposed)
        return self.function(base, list(experts), out_dtype=out_dtype, **parameters)

    def _given_statistics(
        self, n_experts: int, statistics: Sequence[Tensor | None] | None, transposed: bool
    ) -> dict[str, Any]:
        """Return the arguments `statistics` and `transposed` that the function takes."""
        if self.statistics is None:
            if statistics is not None:
                raise ValueError(f"statistics: got some, but {self.name} merges weights alone; need none")
            return {}
        if statistics is None or isinstance(statistics, Tensor):
            raise ValueError(
                f"statistics: got {'none' if statistics is None else 'a tensor'}, but {self.name} needs a list of "
                f"{self.statistics} statistics, one for each expert, None for a tensor without"
            )
        if len(statistics) != n_experts:
            raise ValueError(f"statistics: got {len(statistics)}, need one for each of the {n_experts} experts")
        given: dict[str, Any] = {"statistics": list(statistics)}
        return given | {"transposed": transposed} if self.statistics == "gram" else given


def tensor_key(seed: int, name: str) -> int:
    """A 63-bit key of one tensor's random numbers, unrelated to those of other seeds and other names."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed: got {seed!r}, need a whole number")
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little") >> 1


def _resolve_one(parameter: Parameter, value: Any, n_experts: int) -> Any:
    if value is REQUIRED:
        raise ValueError(f"{parameter.name}: missing; {parameter.doc}")
    if not parameter.per_expert:
        return parameter.validate(value)
    if isinstance(value, Tensor):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return [parameter.validate(value)] * n_experts
    if len(value) != n_experts:
        raise ValueError(f"{parameter.name}: got {len(value)} values, need one for each of the {n_experts} experts")
    return [parameter.validate(v) for v in value]
