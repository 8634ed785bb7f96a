"""Timers around the library's building blocks: what a merge spends where, and on how many flops.

A symmetric eigenproblem of order n counts as (4/3 + 4/3 + 2)·n³ flops (reduction, divide and conquer,
back-transformation), a Gram matrix of (m, n) as m·n·(n + 1).
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final

REGIONS: Final = {
    "form Δ": ("linalg.products:task_matrix", "spectral.task_matrices:task_vector"),
    "statistics": ("ops.delta_stats:delta_stats",),
    "decompose": (
        "linalg.decompose:decompose",
        "linalg.decompose:decompose_list",
        "linalg.subspace:subspaces",
        "linalg.randomized:randomized",
    ),
    "left bases": ("linalg.gram_fp32:_pair", "linalg.decompose:_left_of", "linalg.decompose:Decomposition.truncate"),
    "merged product": ("spectral.low_rank:orthogonalized_sum",),
    "polar": ("linalg.polar:polar", "linalg.polar:polar_factors"),
    "join": ("spectral.low_rank:join", "spectral.task_matrices:averaged_unless_matrix"),
}
"""Stages, and the functions whose insides they are."""
LEAVES: Final = {
    "gram": "linalg.products:gram_list",
    "products": "linalg.products:matmul_list",
    "eigh": "linalg.products:eigen_list",
    "gram, eigh, ΔP": "linalg.dominant:dominant_list",
    "orthonormalise": "linalg.orthonormalize:orthonormalize",
}
"""What stages are made of; Gram matrices, eigenproblems and their images ΔP that overlap in time are one leaf."""


def flops(leaf: str, arguments: Any, result: Any) -> dict[str, float]:
    """Floating point operations of one call by dtype; of products, Gram matrices and eigenproblems alone."""
    counts: dict[str, float] = defaultdict(float)
    if leaf == "gram":
        for x, out in zip(arguments, result, strict=True):
            counts[str(out.dtype)] += x.shape[0] * x.shape[1] * (x.shape[1] + 1)
    elif leaf == "products":
        for (a, b), out in zip(arguments, result, strict=True):
            counts[str(out.dtype)] += 2 * a.shape[0] * a.shape[1] * b.shape[1]
    elif leaf == "eigh":
        for x in arguments:
            counts[str(x.dtype)] += 14 / 3 * x.shape[0] ** 3
    elif leaf == "gram, eigh, ΔP":
        for x, svd in zip(arguments, result, strict=True):
            (m, n), k = x.shape, svd.vectors.shape[1]
            counts[str(svd.image.dtype)] += m * n * (n + 1) + 14 / 3 * n**3 + 2 * m * n * k
    return counts


class Stages:
    """While entered, timers sit around `REGIONS` and `LEAVES`; `seconds` and `flops` grow by stage.

    A leaf's stage is named after the region around it. Only the entering thread is timed: what the library shares out
    to its own threads passes within the call that waits for it. The library's modules get their functions back.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.missing: list[str] = []
        self.flops: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._stack: list[list[Any]] = []  # [region, seconds of the calls inside]
        self._restore: list[tuple[Any, str, Any]] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> Stages:
        self.missing.clear()
        for region, targets in REGIONS.items():
            for target in targets:
                self._wrap(target, region, None)
        for leaf, target in LEAVES.items():
            self._wrap(target, None, leaf)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, value in reversed(self._restore):
            setattr(owner, name, value)
        self._restore.clear()

    def call(self, function: Callable[[], object]) -> None:
        """Run the function; what no stage inside it accounts for is 'other'."""
        self._timed(function, "", None, (), {})

    def _wrap(self, target: str, region: str | None, leaf: str | None) -> None:
        module_name, path = target.split(":")
        try:
            owner: Any = importlib.import_module(f"resm_kernels.{module_name}")
        except ModuleNotFoundError:
            self.missing.append(target)
            return
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        function = getattr(owner, name, None)
        if function is None:
            self.missing.append(target)
            return

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread or not self._stack:
                return function(*args, **kwargs)
            return self._timed(function, region, leaf, args, kwargs)

        # `from … import` has left the function in other modules too.
        owners = [owner] if parents else [m for n, m in sys.modules.items() if n.split(".")[0] == "resm_kernels"]
        for holder in owners:
            for attribute, value in list(vars(holder).items()):
                if value is function:
                    self._restore.append((holder, attribute, function))
                    setattr(holder, attribute, wrapped)

    def _timed(self, function: Callable[..., Any], region: str | None, leaf: str | None, args: Any, kwargs: Any) -> Any:
        around = self._stack[-1][0] if self._stack else ""
        frame: list[Any] = [around if region is None else region, 0.0]
        self._stack.append(frame)
        started = time.perf_counter()
        result = function(*args, **kwargs)
        seconds = time.perf_counter() - started
        self._stack.pop()
        stage = f"{frame[0] or 'merge'}: {leaf or 'other'}"
        self.seconds[stage] += seconds - frame[1]
        if self._stack:
            self._stack[-1][1] += seconds
        if leaf is not None:
            arguments = args[0] if args else next(iter(kwargs.values()))
            for dtype, count in flops(leaf, arguments, result).items():
                self.flops[stage][dtype] += count
        return result
