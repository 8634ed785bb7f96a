"""From a fine-tuned model to a PEFT adapter: the best low-rank approximation of every weight's change."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import (
    CheckpointError,
    CheckpointReader,
    TensorInfo,
    check_output_folder,
    format_bytes,
    read_config,
)
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.linalg import TruncatedSVD, truncated_svd
from resm_kernels.linalg.products import frobenius_norm, task_matrix
from resm_kernels.lora.config import CONFIG_FILE, CONV1D_MODELS, EMBEDDING_NAMES, HEAD_NAMES, is_tied
from resm_kernels.lora.modules import HEAD, Rest, last_part, rank_patterns, target_names
from resm_kernels.lora.writer import AdapterWriter, adapter_config
from resm_kernels.ops import NonFiniteError
from resm_kernels.suggestions import did_you_mean

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExtractedLayer:
    """One weight's adapter.

    Attributes:
        name: The weight.
        shape: Its shape.
        rank: Directions kept; 0 for a weight that fine-tuning left unchanged, which gets no adapter.
        error: ‖Δ − s·B·A‖_F / ‖Δ‖_F is at most this (before the factors are rounded to their dtype).
        norm: ‖Δ‖_F.
        method: The route of the decomposition.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    error: float
    norm: float
    method: str

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        found = f"rank {self.rank:>4}  error {self.error:.2%}" if self.rank else "unchanged"
        return f"{self.name}  {shape}  {found}"


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that changed but has no low-rank form: `size` is ‖Δ‖_F / ‖θ₀‖_F (infinite for θ₀ = 0)."""

    name: str
    size: float


@dataclass
class ExtractReport:
    """What an extraction did.

    Attributes:
        out: The adapter's folder.
        layers: Every weight that was to be decomposed.
        saved: Other changed tensors, stored whole in the adapter.
        lost: Other changed tensors, which the adapter does not hold.
        nbytes: Bytes of the adapter's tensors.
    """

    out: Path
    layers: list[ExtractedLayer] = field(default_factory=list)
    saved: list[OtherTensor] = field(default_factory=list)
    lost: list[OtherTensor] = field(default_factory=list)
    nbytes: int = 0

    @property
    def error(self) -> float:
        """Relative error of all decomposed changes together, ‖Δ − Δ_k‖_F / ‖Δ‖_F over all layers."""
        total = math.fsum(layer.norm**2 for layer in self.layers)
        lost = math.fsum((layer.norm * layer.error) ** 2 for layer in self.layers)
        return math.sqrt(lost / total) if total else 0.0

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.layers if layer.rank]
        kept = f"rank {min(ranks)}" + (f" to {max(ranks)}" if min(ranks) < max(ranks) else "")
        lines = [
            f"extracted {len(ranks)} adapters, {kept}, error {self.error:.2%} of the change: {self.out} "
            f"({format_bytes(self.nbytes)})"
        ]
        if unchanged := len(self.layers) - len(ranks):
            lines.append(f"unchanged, no adapter: {unchanged} weights")
        for verb, tensors in (("saved whole", self.saved), ("LOST", self.lost)):
            if tensors:
                largest = max(tensors, key=lambda t: t.size)
                names = ", ".join(t.name for t in tensors[:3]) + (", …" if len(tensors) > 3 else "")
                hint = "; --save-rest stores what can be" if verb == "LOST" and not self.saved else ""
                lines.append(
                    f"{verb}: {len(tensors)} changed tensors that are not decomposed ({names}), the largest change "
                    f"{largest.size:.2%} of {largest.name}{hint}"
                )
        return "\n".join(lines)


def extract_lora(
    finetuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    accuracy: float = 5e-2,
    targets: Sequence[str] | None = None,
    embeddings: bool = False,
    save_rest: bool = False,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    on_layer: Callable[[ExtractedLayer], None] | None = None,
) -> ExtractReport:
    """Write the PEFT adapter that takes `base` nearest to `finetuned`.

    For each weight matrix Δ = θ − θ₀ ≈ U·Σ·Vᵀ is truncated to k directions, the best of that rank (Eckart and Young),
    and stored as B = U·Σ^½ (out, k), A = Σ^½·Vᵀ (k, in), with lora_alpha = k so that s = α/r = 1. One pair of tensors
    is in memory at a time, and what its decomposition needs.

    Args:
        finetuned, base: Model folders of the same architecture; dtypes may differ.
        out: Folder to create; it appears when it is complete.
        rank: k of every matrix; a change of lower rank is padded with zeros, so that all have one rank.
        energy: Smallest k that keeps this share of ‖Δ‖²_F, for each matrix (PEFT's rank_pattern).
        max_rank: Upper bound of k with `energy`.
        accuracy: As for `linalg.truncated_svd`.
        targets: Modules to decompose: full names, or their last parts as in PEFT's target_modules. None: all with a
            matrix as weight, but for embeddings and output heads.
        embeddings: Decompose embeddings and heads too, if `targets` is None.
        save_rest: Store other changed tensors whole (modules_to_save, bias), so that nothing is lost but for what no
            module of its own holds. Without, they stay as in `base` and the report lists them.
        dtype: Of the factors: fp32 (default), bf16 or fp16.
        overwrite: Replace `out` if it is an adapter folder.
        on_layer: Called with each layer when it is done.

    Returns:
        ExtractReport; `str()` of it is a summary.

    Raises:
        ValueError: A choice is missing or out of range.
        CheckpointError: The models do not fit together, hold NaN or infinite values, or do not differ.

    Determinism: the same adapter for the same models, whatever the number of threads.
    """
    _check_choices(rank, energy, max_rank, dtype)
    folder = check_output_folder(out, overwrite=overwrite, inputs=[finetuned, base], marker=CONFIG_FILE)
    cut = _Cut(rank, energy, max_rank, accuracy)
    report = ExtractReport(folder)
    with CheckpointReader(base) as old, CheckpointReader(finetuned) as new, AdapterWriter(folder) as writer:
        config = read_config(Path(base))
        tied = is_tied(config, old.tensors)
        infos = _shared(old, new, tied)
        modules = _targets(infos, targets, embeddings)
        if tied and (both := [m for m in modules if m in HEAD_NAMES or last_part(m) in EMBEDDING_NAMES]):
            raise CheckpointError(
                f"{base}: {both[0]!r} is tied to the output head or embedding, which cannot have an adapter of its "
                "own; leave it out and pass save_rest to store it whole"
            )
        transposed = config.get("model_type") in CONV1D_MODELS
        changed: dict[str, float] = {}
        folders = new.folder, old.folder
        for info in infos:
            pair = old.read(info.name), new.read(info.name)
            module = info.name.removesuffix(".weight")
            if module in modules:
                layer = _extract(writer, module, info, pair, cut, transposed, dtype, folders)
                report.layers.append(layer)
                if on_layer is not None:
                    on_layer(layer)
            elif (size := _relative_change(info.name, *pair, folders)) > 0:
                changed[info.name] = size
        ranks = {layer.name.removesuffix(".weight"): layer.rank for layer in report.layers if layer.rank}
        if not ranks:
            raise CheckpointError(f"{finetuned}: no selected weight differs from {base}; there is nothing to extract")
        rest = Rest.of(changed, old.tensors, ranks, tied) if save_rest else Rest()
        for stored, source in rest.tensors.items():
            own = new.tensors[source]
            writer.add_later(stored, own.dtype, own.shape, partial(new.read, source))
        for name, size in changed.items():
            (report.saved if name in rest.saved else report.lost).append(OtherTensor(name, size))
        report.nbytes = writer.nbytes
        common = rank or max(ranks.values())
        patterns = rank_patterns(ranks) if rank is None and len(set(ranks.values())) > 1 else {}
        choices = {
            "r": common,
            "lora_alpha": common,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": target_names(ranks, old.tensors),
            "modules_to_save": sorted(rest.modules) or None,
            "bias": "lora_only" if rest.biases else "none",
            "fan_in_fan_out": transposed,
        }
        writer.commit(adapter_config(base, config.get("architectures"), **choices))
    return report


def _check_choices(rank: int | None, energy: float | None, max_rank: int | None, dtype: torch.dtype) -> None:
    if (rank is None) == (energy is None):
        raise ValueError(f"rank, energy: got {'both' if rank is not None else 'neither'}, need one of them")
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, need at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy: got {energy}, need a share above 0 and at most 1")
    if max_rank is not None and energy is None:
        raise ValueError("max_rank: given without energy, which it bounds; with rank it has no meaning")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, need one of {', '.join(map(str, DTYPES))}")


def _shared(old: CheckpointReader, new: CheckpointReader, tied: bool) -> list[TensorInfo]:
    """The tensors of both models in the base's order; an error if they are not of the same names and shapes."""
    skipped = {HEAD} if tied and not (HEAD in old.tensors and HEAD in new.tensors) else set()
    for here, there in ((old, new), (new, old)):
        missing = [n for n in there.tensors if n not in here.tensors and n not in skipped]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(f"{here.folder}: tensor {missing[0]!r} of {there.folder} is missing{more}")
    infos = [info for info in old.tensors.values() if info.name not in skipped]
    for info in infos:
        shape = new.tensors[info.name].shape
        if shape != info.shape:
            embedding = last_part(info.name.removesuffix(".weight")) in EMBEDDING_NAMES + HEAD_NAMES
            hint = "; the vocabularies differ in size: resize the base's embeddings first" if embedding else ""
            raise CheckpointError(
                f"{new.folder}: tensor {info.name!r} has shape {shape}, need {info.shape} as in {old.folder}{hint}"
            )
    return infos


def _targets(infos: Sequence[TensorInfo], targets: Sequence[str] | None, embeddings: bool) -> set[str]:
    """The modules to decompose, each with a floating-point matrix as its `.weight`."""
    modules = [
        info.name.removesuffix(".weight")
        for info in infos
        if info.name.endswith(".weight") and len(info.shape) == 2 and info.dtype in FLOAT_DTYPES and info.numel
    ]
    if targets is None:
        return {m for m in modules if embeddings or last_part(m) not in EMBEDDING_NAMES + HEAD_NAMES}
    found = {t: {m for m in modules if m == t or m.endswith("." + t)} for t in targets}
    for target, matches in found.items():
        if not matches:
            near = did_you_mean(target, sorted({last_part(m) for m in modules} | set(modules)))
            raise ValueError(f"targets: got {target!r}, which is no module with a weight matrix{near}")
    return set().union(*found.values())


@dataclass(frozen=True)
class _Cut:
    rank: int | None
    energy: float | None
    max_rank: int | None
    accuracy: float

    def __call__(self, base: Tensor, expert: Tensor) -> TruncatedSVD:
        most = min(base.shape)
        if self.energy is None:
            return truncated_svd(base, expert, rank=min(self.rank or most, most), accuracy=self.accuracy)
        if self.max_rank is None or self.max_rank >= most:
            return truncated_svd(base, expert, energy=self.energy, accuracy=self.accuracy)
        # Decomposing to the bound costs less than to an energy that may need far more directions.
        found = truncated_svd(base, expert, rank=self.max_rank, accuracy=self.accuracy)
        power = found.singular_values.square()
        # The error is relative to ‖Δ‖: what is kept is 1 − error² of it.
        total = float(power.sum()) / max(1 - found.error**2, torch.finfo(torch.float64).eps)
        k = int((power.cumsum(0) < self.energy * total).sum()) + 1
        error = math.sqrt(found.error**2 + float(power[k:].sum()) / total) if total else 0.0
        left, values, right = found.left[:, :k], found.singular_values[:k], found.right[:, :k]
        return found._replace(left=left, singular_values=values, right=right, error=error)


def _extract(
    writer: AdapterWriter,
    module: str,
    info: TensorInfo,
    pair: tuple[Tensor, Tensor],
    cut: _Cut,
    conv1d: bool,
    dtype: torch.dtype,
    folders: tuple[Path, Path],
) -> ExtractedLayer:
    """Decompose one weight and store its factors."""
    norm = frobenius_norm(_change(info.name, *pair, folders))
    if norm == 0:
        return ExtractedLayer(info.name, info.shape, 0, 0.0, 0.0, "none")
    found = cut(*pair)
    root = found.singular_values.sqrt()
    rows, columns = found.left * root, found.right * root
    embedding = last_part(module) in EMBEDDING_NAMES
    # Embeddings and Conv1D store (in, out), the transpose of what B·A is for PEFT.
    b, a = (columns, rows.mT) if embedding or conv1d else (rows, columns.mT)
    if cut.rank is not None:
        missing = cut.rank - b.shape[1]
        b, a = torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    for name, factor in zip(names, (a, b), strict=True):
        writer.add(f"{module}.{name}", factor.to(dtype))
    return ExtractedLayer(info.name, info.shape, len(root), found.error, norm, found.method)


def _change(name: str, base: Tensor, expert: Tensor, folders: tuple[Path, Path]) -> Tensor:
    try:
        return task_matrix(base, expert)
    except NonFiniteError as error:
        raise CheckpointError(
            f"{folders[error.index or 0]}: tensor {name!r} holds {error.count} NaN or infinite values; "
            "the model is damaged"
        ) from error


def _relative_change(name: str, base: Tensor, expert: Tensor, folders: tuple[Path, Path]) -> float:
    if base.dtype not in FLOAT_DTYPES or expert.dtype not in FLOAT_DTYPES:
        return 0.0 if base.dtype == expert.dtype and torch.equal(base, expert) else math.inf
    pair = _change(name, base, expert, folders), base
    change, size = (frobenius_norm(x.flatten(1) if x.ndim > 1 else x.reshape(1, -1)) for x in pair)
    return change / size if size else (math.inf if change else 0.0)
