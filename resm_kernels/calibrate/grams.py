"""Gram matrices of the inputs of linear layers, summed up while the modules run.

It is independent of how modules come into memory: a whole model, or one block of a model at a time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.ops import gram_matrix


class GramSums:
    """Sums Σ x·xᵀ over the inputs x of linear layers, in float64.

    Layers that get the same tensor, such as q_proj, k_proj and v_proj, have one sum.

    Attributes:
        sums: Layer → Σ x·xᵀ, (in, in), of the first of the layers that share an input.
        leaders: Every layer that has run → the layer that has its sum.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.leaders: dict[str, str] = {}
        self._kept: Tensor = torch.empty(0, dtype=torch.bool)
        self._seen: dict[int, tuple[Tensor, int, str]] = {}

    def start(self, kept: Tensor) -> None:
        """Begin a batch.

        Args:
            kept: (batch, length) bool, True for positions that count, False for padding.
        """
        self._kept = kept
        self._seen.clear()

    def finish(self) -> None:
        """End a batch, and drop its tensors."""
        self._seen.clear()

    def add(self, name: str, x: Tensor) -> None:
        """Add the input of a layer that is being run."""
        # Holding the tensor keeps its id from being given to another one. A tensor that was changed in between is
        # another input.
        _, version, leader = self._seen.setdefault(id(x), (x, x._version, name))
        leader = leader if version == x._version else name
        if self.leaders.setdefault(name, leader) != leader:
            raise CalibrationError(
                f"statistics: layer {name!r} had the inputs of {self.leaders[name]!r} before, and now has others; need "
                "a model whose layers share their inputs always or never"
            )
        if leader != name:
            return
        gram = gram_matrix(self._rows(name, x).to(torch.float32).contiguous())
        known = self.sums.get(name)
        self.sums[name] = gram if known is None else known.add_(gram)

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """The vectors of x that are not padding."""
        if bool(self._kept.all()):
            return x.reshape(-1, x.shape[-1])
        if x.shape[:-1] == self._kept.shape:
            return x[self._kept]
        if x.ndim == 2 and len(x) == self._kept.numel():
            return x[self._kept.flatten()]
        raise CalibrationError(
            f"statistics: layer {name!r} gets {list(x.shape)}, in which the padding of a batch of "
            f"{list(self._kept.shape)} cannot be told apart; need batch_tokens: 1, so that prompts are not padded"
        )


def gather_grams(
    layers: Mapping[str, nn.Module],
    batches: Iterable[Tensor],
    run: Callable[[int], object],
) -> GramSums:
    """Run a module for every batch, and return the Gram sums of its linear layers' inputs.

    Args:
        layers: The module's linear layers by name.
        batches: For each batch, which of its (batch, length) positions are not padding.
        run: `run(i)` runs the module for batch i. Gradients are not recorded.

    Raises:
        CalibrationError: A layer gets inputs whose padding cannot be told apart, or that are not finite.

    Determinism: batches are added up in order; the same bits as long as the module's inputs have the same bits.
    """
    grams = GramSums()
    with torch.no_grad(), _hooks(layers, grams):
        for i, kept in enumerate(batches):
            grams.start(kept)
            run(i)
            grams.finish()
    for name, total in grams.sums.items():
        if not bool(torch.isfinite(total).all()):
            raise CalibrationError(f"statistics: layer {name!r} gets NaN or infinite inputs; the model is damaged")
    return grams


@contextlib.contextmanager
def _hooks(layers: Mapping[str, nn.Module], grams: GramSums) -> Iterator[None]:
    def hook(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        grams.add(name, args[0])

    handles = [m.register_forward_pre_hook(functools.partial(hook, name)) for name, m in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
