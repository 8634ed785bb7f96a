"""What an extraction kept of a fine-tuned model's change, and what it lost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resm_kernels.checkpoint import format_bytes


@dataclass(frozen=True)
class ExtractedLayer:
    """The adapter of one tensor, with Δ its task vector: a matrix, a convolution as (out, in·kernel), or a stack.

    Attributes:
        name: The tensor's name in the loaded model.
        shape: Its shape.
        rank: The rank of the factors; 0 if fine-tuning did not change the tensor, which then gets no adapter.
        error: An upper bound of ‖Δ − s·B·A‖_F / ‖Δ‖_F, before the factors are rounded to their dtype.
        least: A lower bound of the least error that factors of this rank can have; see `least_error`.
        norm: ‖Δ‖_F.
        method: The method that decomposed Δ, see `linalg.truncated_svd`; of a stack that of its first matrix.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    error: float
    least: float
    norm: float
    method: str

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        result = f"rank {self.rank:>4}  error {self.error:.2%}" if self.rank else "unchanged"
        return f"{self.name}  {shape}  {result}"


@dataclass(frozen=True)
class OtherTensor:
    """A changed tensor that is not decomposed.

    Attributes:
        name: Its name in the loaded model.
        size: ‖Δ‖_F / ‖θ₀‖_F, which is infinite for θ₀ = 0 and for tensors that are not floating-point.
        norm: ‖Δ‖_F; 0 for tensors that are not floating-point.
        reason: Why PEFT cannot adapt it; "" if it could, or is no matrix.
    """

    name: str
    size: float
    norm: float
    reason: str = ""


@dataclass
class ExtractReport:
    """The result of an extraction; `str()` of it is a summary of some lines.

    Attributes:
        out: The adapter's folder.
        layers: Every tensor that was selected for decomposition.
        saved: The other changed tensors that the adapter stores whole.
        lost: The other changed tensors that the adapter does not store.
        replaced: Those of `saved` that PEFT writes over the base's as it loads the adapter, because modules_to_save
            cannot name them. They stay when the adapter is disabled or deleted.
        notes: What is left out of the models, renamed or added, a line each.
        nbytes: The size of the adapter's tensors in bytes.
        verified: What PEFT gave for this adapter, in words; "" if that was not asked for.
    """

    out: Path
    layers: list[ExtractedLayer] = field(default_factory=list)
    saved: list[OtherTensor] = field(default_factory=list)
    lost: list[OtherTensor] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    nbytes: int = 0
    verified: str = ""

    @property
    def error(self) -> float:
        """The relative error ‖Δ − Δ_k‖_F / ‖Δ‖_F of all decomposed task vectors together."""
        total = _squares(layer.norm for layer in self.layers)
        return math.sqrt(_squares(layer.norm * layer.error for layer in self.layers) / total) if total else 0.0

    @property
    def excess(self) -> float:
        """An upper bound on how far `error` is above the least possible error at these ranks, as a share of it."""
        least = math.sqrt(_squares(layer.norm * layer.least for layer in self.layers))
        found = math.sqrt(_squares(layer.norm * layer.error for layer in self.layers))
        return found / least - 1 if least else 0.0

    @property
    def missing(self) -> float:
        """The share of ‖Δ‖² of the whole model that is not in the adapter: errors of factors, and lost tensors."""
        return self._share([*(layer.norm * layer.error for layer in self.layers), *(t.norm for t in self.lost)])

    def _share(self, norms: Sequence[float]) -> float:
        total = _squares([*(layer.norm for layer in self.layers), *(t.norm for t in (*self.saved, *self.lost))])
        return _squares(norms) / total if total else 0.0

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.layers if layer.rank]
        size = f"{self.out} ({format_bytes(self.nbytes)})"
        lines = list(self.notes)
        if ranks:
            rank_range = f"rank {min(ranks)}" + (f" to {max(ranks)}" if min(ranks) < max(ranks) else "")
            excess = f", at most {self.excess:.2%} above the least of these ranks" if self.excess >= 5e-5 else ""
            lines.append(
                f"extracted {len(ranks)} adapters, {rank_range}, error {self.error:.2%} of the change{excess}: {size}"
            )
        else:
            lines.append(f"extracted no adapter, but whole tensors: {size}")
        if unchanged := len(self.layers) - len(ranks):
            lines.append(f"unchanged, no adapter: {unchanged} weights")
        for verb, tensors in (("saved whole", self.saved), ("LOST", self.lost)):
            if tensors:
                lines.append(self._listed(verb, tensors))
        if self.replaced:
            lines.append(
                f"of these {len(self.replaced)} are written over the base's as PEFT loads the adapter, and stay when "
                f"it is disabled: {_names(self.replaced)}"
            )
        lines.append(f"not in the adapter: {self.missing:.2%} of ‖Δ‖² of the whole model")
        if self.verified:
            lines.append(self.verified)
        return "\n".join(lines)

    def _listed(self, verb: str, tensors: Sequence[OtherTensor]) -> str:
        largest = max(tensors, key=lambda t: t.size)
        closed = [t for t in tensors if t.reason]
        reasons = f"; PEFT cannot adapt {closed[0].name} ({closed[0].reason})" if closed and verb == "LOST" else ""
        hint = "; --save-rest stores them" if verb == "LOST" and not self.saved else ""
        return (
            f"{verb}: {len(tensors)} changed tensors that are not decomposed ({_names([t.name for t in tensors])}), "
            f"{self._share([t.norm for t in tensors]):.2%} of ‖Δ‖², the largest change {largest.size:.2%} of "
            f"{largest.name}{reasons}{hint}"
        )


def least_error(error: float, values: Sequence[float], norm: float, residual: float) -> float:
    """Return a lower bound of the least relative error of rank k, given that of a singular value decomposition found.

    Let Q and P be the k left and right vectors that were found, C = diag(σ̂), and Δ = [[C, 0], [F, E]] in bases that
    begin with Q and P, where ‖F‖_F = residual·‖Δ‖_F. The k largest eigenvalues of ΔᵀΔ sum up to at most
    Σσ̂² + ‖F‖² + ‖FᵀE‖_*, as a sum of that kind is at most that of the blocks on the diagonal and the nuclear norm of
    the block beside it, if σ̂_k is at least ‖E‖₂; and ‖FᵀE‖_* ≤ √k·‖F‖_F·‖E‖₂. What they leave of ‖Δ‖² is the square of
    the least error (Eckart and Young).

    Args:
        error: ‖Δ − Δ_k‖_F / ‖Δ‖_F of the decomposition.
        values: σ̂, descending.
        norm: ‖Δ‖_F.
        residual: An upper bound of ‖F‖_F / ‖Δ‖_F.
    """
    if not len(values) or not norm:
        return error
    left = min(values[-1] / norm, error)
    return math.sqrt(max(error**2 - residual**2 - math.sqrt(len(values)) * residual * left, 0.0))


def _squares(norms: Iterable[float]) -> float:
    return math.fsum(norm**2 for norm in norms)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
