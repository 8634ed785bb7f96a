"""The record of a merge method's parameter: its name, kind, default and bounds, and the check of its values."""

from __future__ import annotations

import keyword
import math
from dataclasses import dataclass
from typing import Any, Final

from resm_kernels.files import shortened
from resm_kernels.suggestions import did_you_mean
from resm_kernels.tensor_names import is_vocabulary

REQUIRED: Final = object()
"""Default of a parameter that has none: leaving it out is an error."""

MAX_NUMBER: Final = 1e30
MAX_WHOLE: Final = 2**53
"""The largest magnitude of a number and of a whole number. Products of such numbers and weights are fp32 numbers."""

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


@dataclass(frozen=True)
class Parameter:
    """One named parameter of a merge method.

    Attributes:
        name: The key that recipes use, in the field's (mergekit's) spelling.
        kind: `float`, `int`, `bool`, or a tuple of allowed strings.
        default: The value when it is left out; `REQUIRED` if it must be set. `None` means that the method decides.
        doc: One line for help texts and errors: meaning, unit, why this default.
        per_expert: True if each expert has a separate value.
        minimum, maximum: Inclusive bounds of a number.
        vocabulary: The default for tensors with a row for each token (embeddings, output heads), if it differs from
            `default`; None if it does not.
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
        """The parameter's name as a Python keyword argument: `lambda`, a reserved word, becomes `lambda_`."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name

    def default_for(self, tensor: str) -> Any:
        """The default for the tensor of that name."""
        return self.vocabulary if self.vocabulary is not None and is_vocabulary(tensor) else self.default

    def validate(self, value: Any) -> Any:
        """Return `value` converted to the parameter's kind, or raise a ValueError that says which are allowed."""
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
        raise ValueError(
            f"{self.name}: got {shortened(value)}, need one of {', '.join(choices)}{did_you_mean(value, choices)}"
        )

    def _validate_bool(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, (int, float)) and value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
            return value.lower() in _TRUE
        raise ValueError(f"{self.name}: got {shortened(value)}, need true or false")

    def _validate_number(self, value: Any) -> float | int:
        needed = "a whole number" if self.kind is int else "a number"
        try:
            # YAML 1.1 reads 1e-3 as a string; mergekit's recipes rely on it being a number.
            number = float(value)
        except (OverflowError, TypeError, ValueError):
            raise ValueError(f"{self.name}: got {shortened(value)}, need {needed}{self._bounds()}") from None
        below = self.minimum is not None and number < self.minimum
        above = self.maximum is not None and number > self.maximum
        fractional = self.kind is int and not (math.isfinite(number) and number.is_integer())
        limit = MAX_WHOLE if self.kind is int else MAX_NUMBER
        if isinstance(value, bool) or not abs(number) <= limit or below or above or fractional:
            raise ValueError(f"{self.name}: got {shortened(value)}, need {needed}{self._bounds(number)}")
        return int(number) if self.kind is int else number

    def _bounds(self, number: float = 0.0) -> str:
        """Return the words for what a number may be; that it has a largest magnitude is said where it matters."""
        limit = MAX_WHOLE if self.kind is int else MAX_NUMBER
        low, high = self.minimum, self.maximum
        if abs(number) > limit:
            low, high = -limit if low is None else low, limit if high is None else high
        if low is not None and high is not None:
            return f" from {low:g} to {high:g}"
        if low is not None:
            return f" of at least {low:g}"
        return f" of at most {high:g}" if high is not None else ""
