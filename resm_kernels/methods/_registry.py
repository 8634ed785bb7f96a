"""What a merge method is: a function on tensors plus the description that recipes, the CLI and plug-ins read.

One `Method` per module of this package; `get` finds it by the name that recipes use.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from resm_kernels.suggestions import did_you_mean
from resm_kernels.tensor_names import is_vocabulary

REQUIRED: Final = object()
"""Default of a parameter that has none: leaving it out is an error."""

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


@dataclass(frozen=True)
class Parameter:
    """One named choice of a merge method.

    Attributes:
        name: The key that recipes use, in the field's (mergekit's) spelling.
        kind: `float`, `int`, `bool`, or a tuple of allowed strings.
        default: The value when it is left out; `REQUIRED` if it must be given. `None` means "decided by the method".
        doc: One line for help texts and errors: meaning, unit, why this default.
        per_expert: True if each expert has its own value.
        minimum, maximum: Inclusive bounds of a number.
        vocabulary: The value when it is left out for a tensor with a row for each token (embeddings, output heads),
            where that is another one.
        ignored: True if it is accepted, because recipes made for mergekit have it, and changes nothing.
    """

    name: str
    kind: type | tuple[str, ...]
    default: Any
    doc: str
    per_expert: bool = False
    minimum: float | None = None
    maximum: float | None = None
    vocabulary: Any = None
    ignored: bool = False

    @property
    def keyword(self) -> str:
        """The parameter's name as a Python keyword argument (`lambda` is a reserved word: `lambda_`)."""
        return "lambda_" if self.name == "lambda" else self.name

    def default_for(self, tensor: str) -> Any:
        """The value when it is left out for the tensor of that name."""
        return self.vocabulary if self.vocabulary is not None and is_vocabulary(tensor) else self.default

    def validate(self, value: Any) -> Any:
        """Return `value` converted to the parameter's kind, or raise a ValueError that names parameter and need."""
        if value is None and self.default is None:
            return None
        if isinstance(self.kind, tuple):
            return self._validate_choice(value, self.kind)
        if self.kind is bool:
            return self._validate_bool(value)
        return self._validate_number(value)

    def _validate_choice(self, value: Any, choices: tuple[str, ...]) -> str:
        if value in choices:
            return str(value)
        raise ValueError(f"{self.name}: got {value!r}, need one of {', '.join(choices)}{did_you_mean(value, choices)}")

    def _validate_bool(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, (int, float)) and value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
            return value.lower() in _TRUE
        raise ValueError(f"{self.name}: got {value!r}, need true or false")

    def _validate_number(self, value: Any) -> float | int:
        wanted = "a whole number" if self.kind is int else "a number"
        try:
            # YAML 1.1 reads 1e-3 as a string; mergekit's recipes rely on it being a number.
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{self.name}: got {value!r}, need {wanted}{self._bounds()}") from None
        below = self.minimum is not None and number < self.minimum
        above = self.maximum is not None and number > self.maximum
        fractional = self.kind is int and not number.is_integer()
        if isinstance(value, bool) or not math.isfinite(number) or below or above or fractional:
            raise ValueError(f"{self.name}: got {value!r}, need {wanted}{self._bounds()}")
        return int(number) if self.kind is int else number

    def _bounds(self) -> str:
        if self.minimum is not None and self.maximum is not None:
            return f" from {self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f" of at least {self.minimum:g}"
        return f" of at most {self.maximum:g}" if self.maximum is not None else ""


@dataclass(frozen=True)
class Method:
    """A merge method: call it like its function, `method(base, experts, **parameters)`.

    Attributes:
        name: The name that recipes use (`merge_method`).
        title: The method's name in prose.
        reference: Where it is defined.
        needs_base: False if it averages models rather than task vectors; then `base` may be None.
        optional_base: True if it merges task vectors where there is a base, and models where there is none.
        min_experts, max_experts: How many experts it merges, the base not counted; None: any number.
        parameters: Every choice, each a keyword argument of the call.
        function: `function(base, experts, *, out_dtype, **parameters)`; per-expert parameters arrive as lists.
        workspace: `workspace(shape, n_experts)` is an upper bound in bytes of what one call allocates beyond its
            inputs and its output.
        draws: True if it draws random numbers; then `function` takes `seed`, the 64-bit key to draw with.
        wraps: True if it calls another method; then `function` takes the call's own `name` and `seed` to hand on.
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
    wraps: bool = False

    def check_count(self, n_experts: int) -> None:
        """Raise a ValueError unless the method merges that many experts."""
        least, most = self.min_experts, self.max_experts
        if n_experts < least or (most is not None and n_experts > most):
            needed = f"at least {least}" if most is None else str(least) if least == most else f"{least} to {most}"
            beside = " beside the base" if self.needs_base else ""
            raise ValueError(f"got {n_experts}, but {self.name} merges {needed}{beside}")

    def parameter(self, name: str) -> Parameter:
        """Return the parameter of that recipe key, or raise a ValueError that names the nearest one."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = tuple(p.name for p in self.parameters)
        raise ValueError(
            f"{self.name} has no parameter {name!r}{did_you_mean(name, known)}; it has {', '.join(known) or 'none'}"
        )

    def resolve(self, n_experts: int, given: dict[str, Any], name: str = "") -> dict[str, Any]:
        """Check `given` (by keyword), fill in defaults, and spread per-expert scalars over the experts.

        What is ignored is checked and left out. `name` is the tensor's, on which defaults may depend.
        """
        by_keyword = {p.keyword: p for p in self.parameters}
        for keyword in given:
            if keyword not in by_keyword:
                self.parameter(keyword)  # raises, naming the nearest
                raise TypeError(f"{self.name}: pass {keyword!r} as {self.parameter(keyword).keyword!r}")
        values = {k: _resolve_one(p, given.get(k, p.default_for(name)), n_experts) for k, p in by_keyword.items()}
        return {k: value for k, value in values.items() if not by_keyword[k].ignored}

    def __call__(
        self,
        base: Tensor | None,
        experts: Sequence[Tensor],
        *,
        out_dtype: Any = None,
        name: str = "",
        seed: int = 0,
        **given: Any,
    ) -> Tensor:
        """Merge one tensor; on `name` some defaults depend, and with `seed` random numbers."""
        if isinstance(experts, Tensor) or len(experts) == 0:
            raise ValueError(
                f"experts: got {'a tensor' if isinstance(experts, Tensor) else 'none'}, need a sequence of "
                "one or more tensors"
            )
        try:
            self.check_count(len(experts))
        except ValueError as error:
            raise ValueError(f"experts: {error}") from None
        if self.needs_base and base is None:
            raise ValueError(f"base: got None, but {self.name} merges task vectors and needs the base tensor")
        parameters = self.resolve(len(experts), given, name)
        if self.draws:
            parameters["seed"] = tensor_key(seed, name)
        if self.wraps:
            parameters |= {"name": name, "seed": seed}
        return self.function(base, list(experts), out_dtype=out_dtype, **parameters)


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
