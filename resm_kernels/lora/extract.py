"""Extracts a PEFT adapter from a fine-tuned model: the best low-rank approximation of each weight's task vector."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.dtypes import ADAPTER_DTYPES, FLOAT_DTYPES
from resm_kernels.files import shortened
from resm_kernels.linalg import TruncatedSVD, truncated_svd
from resm_kernels.linalg.products import frobenius_norm, task_matrix
from resm_kernels.linalg.threads import run
from resm_kernels.lora.extract_report import ExtractedLayer, ExtractReport, OtherTensor, least_error
from resm_kernels.lora.peft_names import NO_TARGETS, Adaptable, Kind, Layout, Selection, rank_patterns, stored_factors
from resm_kernels.lora.writer import AdapterWriter, Kept
from resm_kernels.ops import NonFiniteError
from resm_kernels.suggestions import did_you_mean
from resm_kernels.tensor_names import is_embedding_or_head, last_part, module_of

_BATCH_BYTES: Final = 256 << 20
"""The task vectors in fp32 that are decomposed side by side; one that is larger is decomposed alone."""
_PANEL: Final = 1 << 24
"""Elements of a tensor that is not decomposed whose change is formed at a time."""


class _Info(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


class Tensors(Protocol):
    """The tensors of a loaded model by their names in memory."""

    @property
    def folder(self) -> Path: ...
    @property
    def tensors(self) -> Mapping[str, _Info]: ...
    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What an extraction decomposes, and how exactly; `engine.extract_lora` documents the values.

    Raises:
        ValueError: A value is missing or out of range.
    """

    rank: int | None = None
    energy: float | None = None
    max_rank: int | None = None
    accuracy: float = 5e-2
    targets: Sequence[str] | None = None
    embeddings: bool = False
    save_rest: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        rank, energy, max_rank = self.rank, self.energy, self.max_rank
        if (rank is None) == (energy is None):
            raise ValueError(f"rank, energy: got {'both' if rank is not None else 'neither'}, need one of them")
        for name, value in (("rank", rank), ("max_rank", max_rank)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, need at least 1")
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(f"energy: got {energy}, need a share above 0 and at most 1")
        if max_rank is not None and energy is None:
            raise ValueError(
                f"max_rank: got {max_rank} without energy, need both: it bounds the ranks that energy chooses"
            )
        if self.dtype not in ADAPTER_DTYPES:
            raise ValueError(f"dtype: got {self.dtype}, need one of {', '.join(map(str, ADAPTER_DTYPES))}")


class Extraction:
    """The change of a model as an adapter.

    Args:
        layout: The base model, as far as an adapter depends on it.
        base, tuned: The tensors of both models.
        options: What is decomposed.

    Raises:
        ValueError: `options` name a module that cannot be adapted, or a rank beyond every dimension.
        CheckpointError: The models do not have the same tensors.
    """

    def __init__(self, layout: Layout, base: Tensors, tuned: Tensors, options: ExtractOptions) -> None:
        self._layout, self._base, self._tuned, self._options = layout, base, tuned, options
        self._names = _common_tensors(layout, base, tuned)
        self._copies = [
            copy for copy in layout.tied if copy in tuned.tensors and self._names[layout.tied[copy]] != copy
        ]
        self._targets = _chosen_targets(layout, base.folder, options)
        largest = max((n for name in self._targets for n in layout.tensors[name]), default=0)
        if options.rank is not None and largest and options.rank > largest:
            # Factors padded up to it would take any amount of memory.
            raise ValueError(
                f"rank: got {shortened(options.rank)}, need at most {largest}, the largest dimension of a weight"
            )

    def write(
        self, writer: AdapterWriter, out: Path, on_layer: Callable[[ExtractedLayer], None] | None
    ) -> tuple[ExtractReport, dict[str, Any]]:
        """Decompose the change, and add the adapter's tensors to `writer`.

        Returns:
            The report, and the entries of the adapter's configuration that depend on what was found.

        Raises:
            CheckpointError: A model has NaN or infinite values, or the models do not differ.
        """
        report = ExtractReport(out)
        kept: dict[str, tuple[Kept, Kept]] = {}
        for batch in self._batches():
            for layer, pair in self._decomposed(batch):
                report.layers.append(layer)
                if pair is not None:
                    kept[layer.name] = writer.keep(pair[0]), writer.keep(pair[1])
                if on_layer is not None:
                    on_layer(layer)
        changed = self._changed_rest()
        ranks = {layer.name: layer.rank for layer in report.layers if layer.rank}
        if not ranks and not (changed and self._options.save_rest):
            more = f"; {len(changed)} other tensors do, such as {next(iter(changed))}" if changed else ""
            raise CheckpointError(
                f"{self._tuned.folder}: no selected weight differs from {self._base.folder}{more}; there is nothing to "
                "extract"
            )
        selection = Selection(self._layout, ranks.keys())
        for name, factors in kept.items():
            for stored_name, tensor in zip(selection.factor_names(name), factors, strict=True):
                writer.add_kept(stored_name, tensor)
        modules = self._save_rest(writer, selection, changed, report) if self._options.save_rest else set()
        if not self._options.save_rest:
            report.lost += changed.values()
        report.nbytes = writer.nbytes
        return report, self._entries(selection, ranks, modules, report)

    def read_tuned(self, name: str) -> Tensor:
        """Return a tensor of the fine-tuned model by its name in memory, which may be that of a tied one."""
        return self._tuned.read(self._tuned_name(name))

    def _tuned_name(self, name: str) -> str:
        return name if name in self._copies else self._names[self._layout.tied.get(name, name)]

    def _batches(self) -> Iterator[list[Adaptable]]:
        """Yield targets in the order of the model's tensors, as many at a time as fit the limit."""
        batch: list[Adaptable] = []
        size = 0
        for name in self._layout.tensors:
            if name in self._targets:
                nbytes = 4 * math.prod(self._layout.tensors[name])
                if batch and size + nbytes > _BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
                batch.append(self._targets[name])
                size += nbytes
        if batch:
            yield batch

    def _decomposed(self, batch: Sequence[Adaptable]) -> Iterator[tuple[ExtractedLayer, tuple[Tensor, Tensor] | None]]:
        """Yield the layer of each target with its factors A and B, which are None for an unchanged one."""
        deltas = [self._difference(target.name, *self._pair(target.name)) for target in batch]
        matrices = [_matrices(target, delta) for target, delta in zip(batch, deltas, strict=True)]
        cut = _Truncation(self._options)
        # Every matrix is one task on one thread: together they use the threads better than each could.
        parts = run([functools.partial(cut, x) for stack in matrices for x in stack], torch.device("cpu"))
        for target, stack in zip(batch, matrices, strict=True):
            found, parts = parts[: len(stack)], parts[len(stack) :]
            shape = self._layout.tensors[target.name]
            norm = math.hypot(*(part.norm for part in found))
            rank = max(part.left.shape[1] for part in found)
            if norm == 0 or rank == 0:
                yield ExtractedLayer(target.name, shape, 0, 0.0, 0.0, 0.0, "none"), None
                continue
            error, least = (
                math.hypot(*(getattr(part, name) * part.norm for part in found)) / norm for name in ("error", "least")
            )
            width = self._options.rank or rank
            a, b = stored_factors(target, shape, [part.padded(width) for part in found])
            layer = ExtractedLayer(target.name, shape, width, error, least, norm, found[0].method)
            yield layer, (a.to(self._options.dtype), b.to(self._options.dtype))

    def _changed_rest(self) -> dict[str, OtherTensor]:
        """Return the tensors that differ and are not selected, by name in memory."""
        changed = {}
        for name in [*(n for n in self._layout.tensors if n not in self._targets), *self._copies]:
            base, tuned = self._pair(name)
            reason = self._layout.refused.get(name, "")
            if base.dtype not in FLOAT_DTYPES or tuned.dtype not in FLOAT_DTYPES:
                if base.dtype != tuned.dtype or not torch.equal(base, tuned):
                    changed[name] = OtherTensor(name, math.inf, 0.0, reason)
                continue
            # In panels, because a vocabulary's Δ in fp32 would be larger than both tables.
            panels = [x.split(max(1, _PANEL // max(x.shape[1], 1))) for x in (as_matrix(base), as_matrix(tuned))]
            pairs = list(zip(*panels, strict=True))
            norm = math.hypot(*(frobenius_norm(self._difference(name, *pair)) for pair in pairs))
            if norm > 0:
                base_norm = math.hypot(*(frobenius_norm(panel) for panel, _ in pairs))
                changed[name] = OtherTensor(name, norm / base_norm if base_norm else math.inf, norm, reason)
        return changed

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self._base.read(self._layout.tied.get(name, name)), self.read_tuned(name)

    def _difference(self, name: str, base: Tensor, tuned: Tensor) -> Tensor:
        """Return Δ of a tensor, or of some of its rows."""
        try:
            return task_matrix(base, tuned)
        except NonFiniteError as error:
            folders = self._tuned.folder, self._base.folder
            raise CheckpointError(
                f"{folders[error.index or 0]}: tensor {name!r} holds {error.count} NaN or infinite values; "
                "the model is damaged"
            ) from error

    def _save_rest(
        self, writer: AdapterWriter, selection: Selection, changed: Mapping[str, OtherTensor], report: ExtractReport
    ) -> set[str]:
        """Store changed tensors whole; return the modules that modules_to_save must name."""
        modules = selection.modules_to_save(changed)
        whole = {name: name for module in modules for name in self._layout.own(module)}
        for name, tensor in changed.items():
            if module_of(name) in modules:
                report.saved.append(tensor)
            elif name in self._copies:
                # What PEFT writes over a tied tensor changes the other one too.
                report.lost.append(tensor)
            else:
                report.saved.append(tensor)
                report.replaced.append(name)
                whole[name] = selection.whole_name(name)
        for name, stored_name in whole.items():
            info = self._tuned.tensors[self._tuned_name(name)]
            writer.add_from(stored_name, info.dtype, info.shape, functools.partial(self.read_tuned, name))
        return modules

    def _entries(
        self, selection: Selection, ranks: Mapping[str, int], modules: set[str], report: ExtractReport
    ) -> dict[str, Any]:
        rank = self._options.rank or max(ranks.values(), default=1)
        varied = self._options.rank is None and len(set(ranks.values())) > 1
        patterns = rank_patterns({selection.pattern_name(n): r for n, r in ranks.items()}) if varied else {}
        adapted = {module_of(name) for name in ranks}
        biased = any(last_part(n) == "bias" and module_of(n) in adapted for n in report.replaced)
        targets = self._layout.targets
        entries: dict[str, Any] = {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": selection.target_modules if ranks else NO_TARGETS,
            "modules_to_save": sorted(modules) or None,
            "bias": "lora_only" if biased else "none",
            "fan_in_fan_out": any(targets[name].kind is Kind.CONV1D for name in ranks),
        }
        if selection.target_parameters:
            entries["target_parameters"] = selection.target_parameters
        return entries


@dataclass(frozen=True)
class _Part:
    """The decomposition of one matrix Δ ≈ left·rightᵀ; left (m, k) and right (n, k) have the roots of σ as factors."""

    left: Tensor
    right: Tensor
    error: float
    least: float
    norm: float
    method: str

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return both sides with columns of zeros up to `rank`."""
        missing = rank - self.left.shape[1]
        pad = torch.nn.functional.pad
        return pad(self.left, (0, missing)), pad(self.right, (0, missing))


class _Truncation:
    """Decomposes task vectors to the rank that `rank`, or `energy` and `max_rank`, ask for."""

    def __init__(self, options: ExtractOptions) -> None:
        self._options = options

    def __call__(self, delta: Tensor) -> _Part:
        norm = frobenius_norm(delta)
        if norm == 0:
            empty = delta.new_zeros(delta.shape[0], 0), delta.new_zeros(delta.shape[1], 0)
            return _Part(*empty, 0.0, 0.0, 0.0, "none")
        svd = self._svd(delta)
        roots = svd.singular_values.sqrt()
        # Only results in fp32 may be as far from the best as the accuracy allows.
        residual = self._options.accuracy if svd.left.dtype == torch.float32 else 0.0
        least = least_error(svd.error, svd.singular_values.tolist(), norm, residual)
        return _Part(svd.left * roots, svd.right * roots, svd.error, least, norm, svd.method)

    def _svd(self, delta: Tensor) -> TruncatedSVD:
        energy, max_rank, accuracy = self._options.energy, self._options.max_rank, self._options.accuracy
        full_rank = min(delta.shape)
        if energy is None:
            return truncated_svd(delta, rank=min(self._options.rank or full_rank, full_rank), accuracy=accuracy)
        if max_rank is None or max_rank >= full_rank:
            return truncated_svd(delta, energy=energy, accuracy=accuracy)
        # The energy may need a far higher rank than the bound, so decompose to the bound and truncate the result.
        svd = truncated_svd(delta, rank=max_rank, accuracy=accuracy)
        squares = svd.singular_values.square()
        # The squared norm of the part within the rank is the share 1 − error² of ‖Δ‖².
        total = float(squares.sum()) / max(1 - svd.error**2, torch.finfo(torch.float64).eps)
        k = int((squares.cumsum(0) < energy * total).sum()) + 1
        error = math.sqrt(svd.error**2 + float(squares[k:].sum()) / total) if total else 0.0
        left, values, right = svd.left[:, :k], svd.singular_values[:k], svd.right[:, :k]
        return svd._replace(left=left, singular_values=values, right=right, error=error)


def _matrices(target: Adaptable, delta: Tensor) -> list[Tensor]:
    """Return the task matrices of a target: the slices of a stack, a convolution as (out, in·kernel)."""
    if delta.ndim == 3 and target.kind is Kind.PARAMETER:
        return list(delta.unbind())
    return [delta.flatten(1)]


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor with its first dimension as rows and all others as columns; a vector is one row."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def _common_tensors(layout: Layout, base: Tensors, tuned: Tensors) -> dict[str, str]:
    """Return for each tensor of the base its name in the fine-tuned model, which may be one that it is tied to.

    Raises:
        CheckpointError: Names or shapes of the models differ.
    """
    names = {name: name for name in layout.tensors}
    for copy, original in layout.tied.items():
        if original not in tuned.tensors and copy in tuned.tensors:
            names[original] = copy
    lacking = [name for name, found in names.items() if found not in tuned.tensors]
    extra = [n for n in tuned.tensors if n not in layout.tensors and n not in layout.tied]
    for model, other, missing in ((tuned, base, lacking), (base, tuned, extra)):
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(f"{model.folder}: tensor {missing[0]!r} of {other.folder} is missing{more}")
    for name, found in names.items():
        shape = tuned.tensors[found].shape
        if shape != layout.tensors[name]:
            is_vocabulary = is_embedding_or_head(module_of(name))
            hint = "; the vocabularies differ in size: resize the base's embeddings first" if is_vocabulary else ""
            raise CheckpointError(
                f"{tuned.folder}: tensor {name!r} has shape {shape}, need {layout.tensors[name]} as in "
                f"{base.folder}{hint}"
            )
    return names


def _chosen_targets(layout: Layout, folder: Path, options: ExtractOptions) -> dict[str, Adaptable]:
    """Return the targets to decompose, by name."""
    shared = sorted(n for n in set(layout.tied.values()) if len(layout.tensors[n]) > 1)
    if options.targets is None:
        chosen = {n: t for n, t in layout.targets.items() if options.embeddings or not t.vocabulary}
        wanted_shared = shared if options.embeddings else []
    else:
        chosen, wanted_shared = {}, []
        for wanted in options.targets:
            matches = {n: t for n, t in layout.targets.items() if _is_called(t.label, wanted)}
            tied = [n for n in shared if _is_called(module_of(n), wanted)]
            if not matches and not tied:
                raise ValueError(_no_target(layout, wanted))
            chosen |= matches
            wanted_shared += tied
    if wanted_shared:
        raise CheckpointError(
            f"{folder}: {module_of(wanted_shared[0])!r} is tied to the output head or embedding, which cannot have "
            "another adapter; leave it out and pass save_rest to store it whole"
        )
    return chosen


def _no_target(layout: Layout, wanted: str) -> str:
    refused = next((n for n in layout.refused if _is_called(module_of(n), wanted) or _is_called(n, wanted)), None)
    if refused is not None:
        return f"targets: got {wanted!r}, whose weight PEFT cannot adapt: {layout.refused[refused]}"
    labels = {target.label for target in layout.targets.values()}
    hint = did_you_mean(wanted, sorted({last_part(label) for label in labels} | labels))
    return f"targets: got {wanted!r}, which is no module with a weight matrix{hint}"


def _is_called(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")
