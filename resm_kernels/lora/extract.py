"""Extracts a PEFT adapter from a fine-tuned model: the best low-rank approximation of each weight's task vector."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from resm_kernels.checkpoint import (
    CheckpointError,
    CheckpointReader,
    TensorInfo,
    check_output_folder,
    format_bytes,
    open_form,
)
from resm_kernels.dtypes import ADAPTER_DTYPES, FLOAT_DTYPES
from resm_kernels.files import shortened
from resm_kernels.hub import begin
from resm_kernels.linalg import TruncatedSVD, truncated_svd
from resm_kernels.linalg.products import frobenius_norm, task_matrix
from resm_kernels.lora.config import CONFIG_FILE, CONV1D_MODELS, is_tied
from resm_kernels.lora.modules import Rest, rank_patterns, target_names
from resm_kernels.lora.writer import AdapterWriter, adapter_config
from resm_kernels.ops import NonFiniteError
from resm_kernels.recipe import model_folder
from resm_kernels.suggestions import did_you_mean
from resm_kernels.tensor_names import HEAD_MODULES, OUTPUT_HEAD, is_embedding_module, is_embedding_or_head, last_part


@dataclass(frozen=True)
class ExtractedLayer:
    """The adapter of one weight, with Δ the weight's task vector.

    Attributes:
        name: The weight's name.
        shape: The weight's shape.
        rank: The rank of the factors; 0 if fine-tuning did not change the weight, which then gets no adapter.
        error: An upper bound of ‖Δ − s·B·A‖_F / ‖Δ‖_F, before the factors are rounded to their dtype.
        norm: ‖Δ‖_F.
        method: The method that decomposed Δ, see `linalg.truncated_svd`.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    error: float
    norm: float
    method: str

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        result = f"rank {self.rank:>4}  error {self.error:.2%}" if self.rank else "unchanged"
        return f"{self.name}  {shape}  {result}"


@dataclass(frozen=True)
class OtherTensor:
    """A changed tensor that is not decomposed. `size` is ‖Δ‖_F / ‖θ₀‖_F, which is infinite for θ₀ = 0."""

    name: str
    size: float


@dataclass
class ExtractReport:
    """The result of an extraction; `str()` of it is a summary of some lines.

    Attributes:
        out: The adapter's folder.
        layers: Every weight that was selected for decomposition.
        saved: The other changed tensors that the adapter stores whole.
        lost: The other changed tensors that the adapter does not store.
        nbytes: The size of the adapter's tensors in bytes.
    """

    out: Path
    layers: list[ExtractedLayer] = field(default_factory=list)
    saved: list[OtherTensor] = field(default_factory=list)
    lost: list[OtherTensor] = field(default_factory=list)
    nbytes: int = 0

    @property
    def error(self) -> float:
        """The relative error ‖Δ − Δ_k‖_F / ‖Δ‖_F of all decomposed task vectors together."""
        total = math.fsum(layer.norm**2 for layer in self.layers)
        residual = math.fsum((layer.norm * layer.error) ** 2 for layer in self.layers)
        return math.sqrt(residual / total) if total else 0.0

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.layers if layer.rank]
        rank_range = f"rank {min(ranks)}" + (f" to {max(ranks)}" if min(ranks) < max(ranks) else "")
        lines = [
            f"extracted {len(ranks)} adapters, {rank_range}, error {self.error:.2%} of the change: {self.out} "
            f"({format_bytes(self.nbytes)})"
        ]
        if unchanged := len(self.layers) - len(ranks):
            lines.append(f"unchanged, no adapter: {unchanged} weights")
        for verb, tensors in (("saved whole", self.saved), ("LOST", self.lost)):
            if tensors:
                largest = max(tensors, key=lambda t: t.size)
                names = ", ".join(t.name for t in tensors[:3]) + (", …" if len(tensors) > 3 else "")
                hint = (
                    "; --save-rest stores those that an adapter can hold" if verb == "LOST" and not self.saved else ""
                )
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
    """Write the PEFT adapter of rank k with which `base` approximates `finetuned` best.

    The task vector Δ = θ − θ₀ of each weight matrix is replaced by its truncated SVD U·Σ·Vᵀ of rank k, the best
    approximation of that rank (Eckart and Young). It is stored as B = U·Σ^½ (out, k) and A = Σ^½·Vᵀ (k, in), with
    lora_alpha = k so that s = α/r = 1. Only one tensor of each model is in memory at a time.

    Args:
        finetuned, base: Model folders of the same architecture; their dtypes may differ.
        out: The folder to create. It appears when it is complete.
        rank: The rank k of all matrices. Factors of a task vector of lower rank are padded with zeros.
        energy: Take for each matrix the smallest k for which ‖Δ_k‖²_F is at least this share of ‖Δ‖²_F. The ranks are
            written as PEFT's rank_pattern. Exactly one of `rank` and `energy` is needed.
        max_rank: An upper bound of k, with `energy` only.
        accuracy: See `linalg.truncated_svd`.
        targets: The modules to decompose, by full names, or by last parts of names as in PEFT's target_modules. By
            default all modules whose weight is a matrix, except embeddings and output heads.
        embeddings: Decompose embeddings and output heads too, if `targets` is None.
        save_rest: Store the other changed tensors whole (modules_to_save, bias), where PEFT can load them. Without
            this option they keep the values of `base`, and the report lists them.
        dtype: The dtype of the factors, one of `dtypes.ADAPTER_DTYPES`; fp32 by default.
        overwrite: Replace `out` if it is an adapter folder.
        on_layer: This function is called with each layer as soon as it is decomposed.

    Returns:
        An ExtractReport.

    Raises:
        ValueError: An argument is missing or out of range.
        CheckpointError: The models do not fit together, have NaN or infinite values, or do not differ.

    Determinism: the adapter has the same bits for any number of threads.
    """
    _check_choices(rank, energy, max_rank, dtype)
    begin()
    inputs = [finetuned, base]
    folder = check_output_folder(out, overwrite=overwrite, inputs=inputs, marker=CONFIG_FILE, goes_on=False)
    truncate = _Truncation(rank, energy, max_rank, accuracy)
    report = ExtractReport(folder)
    writing = AdapterWriter(folder, overwrite=overwrite)
    reader, config, _ = open_form(model_folder(os.fspath(base), "base"))
    with reader as original, open_form(model_folder(os.fspath(finetuned), "finetuned"))[0] as tuned, writing as writer:
        tied = is_tied(config, original.tensors)
        infos = _common_tensors(original, tuned, tied)
        modules = _target_modules(infos, targets, embeddings)
        _check_largest(rank, [info for info in infos if info.name.removesuffix(".weight") in modules])
        if tied and (refused := [m for m in modules if m in HEAD_MODULES or is_embedding_module(m)]):
            raise CheckpointError(
                f"{base}: {refused[0]!r} is tied to the output head or embedding, which cannot have another adapter; "
                "leave it out and pass save_rest to store it whole"
            )
        transposed = config.get("model_type") in CONV1D_MODELS
        changed: dict[str, float] = {}
        folders = tuned.folder, original.folder
        for info in infos:
            pair = original.read(info.name), tuned.read(info.name)
            module = info.name.removesuffix(".weight")
            if module in modules:
                layer = _extract(writer, module, info, pair, truncate, transposed, dtype, folders)
                report.layers.append(layer)
                if on_layer is not None:
                    on_layer(layer)
            elif (size := _relative_change(info.name, *pair, folders)) > 0:
                changed[info.name] = size
        ranks = {layer.name.removesuffix(".weight"): layer.rank for layer in report.layers if layer.rank}
        if not ranks:
            raise CheckpointError(f"{finetuned}: no selected weight differs from {base}; there is nothing to extract")
        rest = Rest.collect(changed, original.tensors, ranks, tied) if save_rest else Rest()
        for stored_name, name in rest.tensors.items():
            info = tuned.tensors[name]
            writer.add_from(stored_name, info.dtype, info.shape, functools.partial(tuned.read, name))
        for name, size in changed.items():
            (report.saved if name in rest.saved else report.lost).append(OtherTensor(name, size))
        report.nbytes = writer.nbytes
        default_rank = rank or max(ranks.values())
        patterns = rank_patterns(ranks) if rank is None and len(set(ranks.values())) > 1 else {}
        entries = {
            "r": default_rank,
            "lora_alpha": default_rank,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": target_names(ranks, original.tensors),
            "modules_to_save": sorted(rest.modules) or None,
            "bias": "lora_only" if rest.biases else "none",
            "fan_in_fan_out": transposed,
        }
        writer.commit(adapter_config(base, config.get("architectures"), **entries))
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
        raise ValueError(f"max_rank: got {max_rank} without energy, need both: it bounds the ranks that energy chooses")
    if dtype not in ADAPTER_DTYPES:
        raise ValueError(f"dtype: got {dtype}, need one of {', '.join(map(str, ADAPTER_DTYPES))}")


def _common_tensors(original: CheckpointReader, tuned: CheckpointReader, tied: bool) -> list[TensorInfo]:
    """Return the base's tensors in its order; raise a CheckpointError if names or shapes of the models differ.

    A tied output head that only one of the models stores is left out.
    """
    skipped = {OUTPUT_HEAD} if tied and not all(OUTPUT_HEAD in model.tensors for model in (original, tuned)) else set()
    for model, other in ((original, tuned), (tuned, original)):
        missing = [n for n in other.tensors if n not in model.tensors and n not in skipped]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(f"{model.folder}: tensor {missing[0]!r} of {other.folder} is missing{more}")
    infos = [info for info in original.tensors.values() if info.name not in skipped]
    for info in infos:
        shape = tuned.tensors[info.name].shape
        if shape != info.shape:
            embedding = is_embedding_or_head(info.name.removesuffix(".weight"))
            hint = "; the vocabularies differ in size: resize the base's embeddings first" if embedding else ""
            raise CheckpointError(
                f"{tuned.folder}: tensor {info.name!r} has shape {shape}, need {info.shape} as in "
                f"{original.folder}{hint}"
            )
    return infos


def _check_largest(rank: int | None, infos: Sequence[TensorInfo]) -> None:
    """Refuse a rank beyond every dimension: factors padded up to it would take any amount of memory."""
    largest = max((n for info in infos for n in info.shape), default=0)
    if rank is not None and rank > largest:
        raise ValueError(f"rank: got {shortened(rank)}, need at most {largest}, the largest dimension of a weight")


def _target_modules(infos: Sequence[TensorInfo], targets: Sequence[str] | None, embeddings: bool) -> set[str]:
    """Return the modules to decompose, each of which has a floating-point matrix as its `.weight`."""
    modules = [
        info.name.removesuffix(".weight")
        for info in infos
        if info.name.endswith(".weight") and len(info.shape) == 2 and info.dtype in FLOAT_DTYPES and info.numel
    ]
    if targets is None:
        return {m for m in modules if embeddings or not is_embedding_or_head(m)}
    matches = {t: {m for m in modules if m == t or m.endswith("." + t)} for t in targets}
    for target, matching_modules in matches.items():
        if not matching_modules:
            hint = did_you_mean(target, sorted({last_part(m) for m in modules} | set(modules)))
            raise ValueError(f"targets: got {target!r}, which is no module with a weight matrix{hint}")
    return set().union(*matches.values())


@dataclass(frozen=True)
class _Truncation:
    """Decomposes task vectors to the rank that `rank`, or `energy` and `max_rank`, ask for."""

    rank: int | None
    energy: float | None
    max_rank: int | None
    accuracy: float

    def __call__(self, base: Tensor, expert: Tensor) -> TruncatedSVD:
        full_rank = min(base.shape)
        if self.energy is None:
            return truncated_svd(base, expert, rank=min(self.rank or full_rank, full_rank), accuracy=self.accuracy)
        if self.max_rank is None or self.max_rank >= full_rank:
            return truncated_svd(base, expert, energy=self.energy, accuracy=self.accuracy)
        # The energy may need a far higher rank than the bound, so decompose to the bound and truncate the result.
        svd = truncated_svd(base, expert, rank=self.max_rank, accuracy=self.accuracy)
        squares = svd.singular_values.square()
        # The squared norm of the part within the rank is the share 1 − error² of ‖Δ‖².
        total = float(squares.sum()) / max(1 - svd.error**2, torch.finfo(torch.float64).eps)
        k = int((squares.cumsum(0) < self.energy * total).sum()) + 1
        error = math.sqrt(svd.error**2 + float(squares[k:].sum()) / total) if total else 0.0
        left, values, right = svd.left[:, :k], svd.singular_values[:k], svd.right[:, :k]
        return svd._replace(left=left, singular_values=values, right=right, error=error)


def _extract(
    writer: AdapterWriter,
    module: str,
    info: TensorInfo,
    pair: tuple[Tensor, Tensor],
    truncate: _Truncation,
    conv1d: bool,
    dtype: torch.dtype,
    folders: tuple[Path, Path],
) -> ExtractedLayer:
    """Decompose the task vector of one weight, and add its factors to the adapter."""
    norm = frobenius_norm(_task_vector(info.name, *pair, folders))
    if norm == 0:
        return ExtractedLayer(info.name, info.shape, 0, 0.0, 0.0, "none")
    svd = truncate(*pair)
    roots = svd.singular_values.sqrt()
    left, right = svd.left * roots, svd.right * roots
    embedding = is_embedding_module(module)
    # Embeddings and Conv1D layers store their weight as (in, out), the transpose of PEFT's B·A.
    b, a = (right, left.mT) if embedding or conv1d else (left, right.mT)
    if truncate.rank is not None:
        missing = truncate.rank - b.shape[1]
        b, a = torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    for name, factor in zip(names, (a, b), strict=True):
        writer.add(f"{module}.{name}", factor.to(dtype))
    return ExtractedLayer(info.name, info.shape, len(roots), svd.error, norm, svd.method)


def _task_vector(name: str, base: Tensor, expert: Tensor, folders: tuple[Path, Path]) -> Tensor:
    """Return Δ as a matrix; NaN and infinite values are reported with the folder of the model that has them."""
    try:
        return task_matrix(base, expert)
    except NonFiniteError as error:
        raise CheckpointError(
            f"{folders[error.index or 0]}: tensor {name!r} holds {error.count} NaN or infinite values; "
            "the model is damaged"
        ) from error


def _relative_change(name: str, base: Tensor, expert: Tensor, folders: tuple[Path, Path]) -> float:
    """Return ‖Δ‖_F / ‖θ₀‖_F; of tensors that are not floating-point, infinity if they differ and 0 if not."""
    if base.dtype not in FLOAT_DTYPES or expert.dtype not in FLOAT_DTYPES:
        return 0.0 if base.dtype == expert.dtype and torch.equal(base, expert) else math.inf
    pair = _task_vector(name, base, expert, folders), base
    change, base_norm = (frobenius_norm(x.flatten(1) if x.ndim > 1 else x.reshape(1, -1)) for x in pair)
    return change / base_norm if base_norm else (math.inf if change else 0.0)
