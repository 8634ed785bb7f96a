"""What a report measures of a tensor: sums that add up, so that several tensors can be measured as one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.engine import Kept, TensorStats
from resm_kernels.engine.rounding import together
from resm_kernels.linalg.threads import run
from resm_kernels.ops import inner_products

_CPU: Final = torch.device("cpu")
_CHUNK: Final = 1 << 17
"""The number of weights that a thread rounds at once: their temporaries stay in its cache."""


@dataclass(frozen=True)
class Sums:
    """Sums over the weights of one or several tensors, of T experts.

    Attributes:
        tensors: The names of the tensors.
        shapes: Their shapes.
        role: Their role; empty where no role is asked for.
        numel: The number of weights.
        squared: ‖θ₀‖², or ‖θ‖² of the merged model where there is no base.
        gram: ⟨Δ_s, Δ_t⟩, (T + 1, T + 1), float64; the last is the merged model. NaN where there is none.
        kept: How the mean of the experts fares when it is rounded to the output's dtype; None if that is not known.
        changed: The number of weights that some expert changes.
        surviving: How many of these are still changed when the mean of the experts is rounded.
        merged_changed: How many of these the merged model changes; None without a merged model.
        weights: The weight that the method gives each expert, for each tensor or matrix; empty if it has none.
        stats: RESM's statistics of each tensor or matrix; empty where they do not apply.
        places: The positions of the experts that these statistics have figures of, in the order of their lists.
        problems: Which models have NaN or infinite values, a line each.
    """

    tensors: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    role: str
    numel: int
    squared: float
    gram: Tensor
    kept: Kept | None = None
    changed: int = 0
    surviving: int | None = None
    merged_changed: int | None = None
    weights: tuple[tuple[float, ...], ...] = ()
    stats: tuple[TensorStats, ...] = ()
    places: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def experts(self) -> int:
        """T."""
        return len(self.gram) - 1

    def norm(self, t: int) -> float:
        """‖Δ_t‖, of the merged model for t = T."""
        return float(self.gram[t, t].sqrt())

    def cosine(self, s: int, t: int) -> float:
        """The cosine of the angle between Δ_s and Δ_t; NaN if one of them is 0."""
        return float(self.gram[s, t] / (self.gram[s, s] * self.gram[t, t]).sqrt())

    def are_equal(self, s: int, t: int) -> bool:
        """Return True if the two are the same to the bit: their sums are the same then, and only then."""
        return float(self.gram[s, s]) == float(self.gram[s, t]) == float(self.gram[t, t])


def joined(parts: Sequence[Sums]) -> Sums:
    """Return the sums over several groups of tensors."""
    first = parts[0]
    if len(parts) == 1:
        return first
    kept = [part.kept for part in parts if part.kept is not None]
    surviving = [part.surviving for part in parts if part.surviving is not None]
    merged = [part.merged_changed for part in parts if part.merged_changed is not None]
    grams = torch.stack([part.gram for part in parts])
    nothing = torch.isnan(grams).all(0)
    names = dict.fromkeys(zip((n for p in parts for n in p.tensors), (s for p in parts for s in p.shapes), strict=True))
    return Sums(
        tensors=tuple(name for name, _ in names),
        shapes=tuple(shape for _, shape in names),
        role=first.role,
        numel=sum(part.numel for part in parts),
        squared=sum(part.squared for part in parts),
        gram=torch.where(nothing, torch.nan, grams.nansum(0)),
        kept=together(kept) if kept else None,
        changed=sum(part.changed for part in parts),
        surviving=sum(surviving) if surviving else None,
        merged_changed=sum(merged) if merged else None,
        weights=tuple(weights for part in parts for weights in part.weights),
        stats=tuple(row for part in parts for row in part.stats),
        places=first.places,
        problems=tuple(problem for part in parts for problem in part.problems),
    )


def grams(base: Tensor | None, models: Sequence[Tensor], places: Sequence[int], size: int) -> Tensor:
    """Return ⟨Δ_s, Δ_t⟩ of some models in a matrix of all, with NaN for the others and for values that are not finite.

    Args:
        base: θ₀; None for the models' own inner products.
        models: The models.
        places: The position of each model in the result.
        size: The number of rows of the result.
    """
    gram = torch.full((size, size), torch.nan, dtype=torch.float64)
    if models:
        index = torch.tensor(places)
        own = inner_products(base, models, check_finite=False)
        gram[index[:, None], index] = torch.where(torch.isfinite(own), own, torch.nan)
    return gram


@dataclass(frozen=True)
class Rounded:
    """What `round_mean` returns; see `Sums`."""

    kept: Kept | None
    changed: int
    surviving: int | None
    merged_changed: int | None


def round_mean(
    name: str, base: Tensor, experts: Sequence[Tensor], merged: Tensor | None, dtype: torch.dtype | None
) -> Rounded:
    """Return how much of the experts' mean change is left when the mean is rounded to a dtype, and how many weights.

    Args:
        name: The tensor.
        base: θ₀.
        experts: θ_1 … θ_T, at least one.
        merged: The merged model's tensor, if there is one.
        dtype: The output's dtype; None if the output is quantised, so that only the changed weights are counted.
    """
    flat = [tensor.reshape(-1) for tensor in (base, *experts)]
    result = None if merged is None else merged.reshape(-1)
    wide = compute_dtype(*flat)

    def part(first: int) -> tuple[Tensor, list[int]]:
        own, *others = (tensor[first : first + _CHUNK] for tensor in flat)
        differs = own != others[0]
        for other in others[1:]:
            differs |= own != other
        counts = [int(torch.count_nonzero(differs)), 0, 0]
        if result is not None:
            piece = result[first : first + _CHUNK]
            counts[2] = int(torch.count_nonzero(differs & (piece != own.to(piece.dtype))))
        if dtype is None:
            return torch.zeros(3, 3, dtype=torch.float64), counts
        origin = own.to(wide)
        change = others[0].to(wide) - origin
        for other in others[1:]:
            change += other.to(wide) - origin
        change /= len(others)
        theta = origin + change
        rounded = theta.to(dtype)
        counts[1] = int(torch.count_nonzero(differs & (rounded != origin.to(dtype))))
        return inner_products(None, [rounded.to(wide) - theta, theta, change], check_finite=False), counts

    parts = run([functools.partial(part, first) for first in range(0, flat[0].numel(), _CHUNK)], _CPU)
    changed, surviving, merged_changed = (sum(counts[i] for _, counts in parts) for i in range(3))
    if dtype is None:
        return Rounded(None, changed, None, None if merged is None else merged_changed)
    gram = torch.stack([torch.zeros(3, 3, dtype=torch.float64), *(own for own, _ in parts)]).sum(0)
    kept = Kept(name, float(gram[0, 0]), float(gram[1, 1]), float(gram[2, 2]), float(gram[2, 2] + gram[0, 2]))
    return Rounded(kept, changed, surviving, None if merged is None else merged_changed)


def count_nonfinite(tensor: Tensor) -> int:
    """Return how many values are NaN or infinite."""
    return sum(part.numel() - int(torch.isfinite(part).sum()) for part in tensor.reshape(-1).split(_CHUNK))


def placed(values: Sequence[float], places: Sequence[int], size: int) -> tuple[float, ...]:
    """Return values at their places in a list of that size, with NaN elsewhere."""
    everyone = [math.nan] * size
    for place, value in zip(places, values, strict=True):
        everyone[place] = value
    return tuple(everyone)
