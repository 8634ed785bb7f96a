"""From a recipe to a list of tensor jobs: opens the models, checks that they fit together, plans the output."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from resm_kernels.checkpoint import (
    Auxiliary,
    CheckpointError,
    CheckpointReader,
    OutputPlan,
    TensorInfo,
    parse_size,
    plan_output,
    read_config,
)
from resm_kernels.engine.window import DEFAULT_WINDOW, Job, Window
from resm_kernels.lora import AdapterReader, StoredFactors, check_recorded_base, is_adapter_folder
from resm_kernels.lora.factors import factors_workspace, mergeable
from resm_kernels.methods import Method
from resm_kernels.ops._library import FLOAT_DTYPES
from resm_kernels.recipe import Recipe, RecipeError, load_recipe, model_and_adapter, model_folder, tensor_depths

DEFAULT_SHARD_SIZE: Final = "5GB"
_HEAD: Final = "lm_head.weight"
_EMBEDDINGS: Final = ("model.embed_tokens.weight", "transformer.wte.weight", "language_model.model.embed_tokens.weight")


class MergeError(ValueError):
    """A merge cannot be done with these models; the message names tensor, model, what was got and what is needed."""


@dataclass(frozen=True)
class Model:
    """One opened model: a folder, or an adapter's with the folder of its base model, whose config and files it has."""

    folder: Path
    reader: CheckpointReader
    config: Mapping[str, Any]
    base_folder: Path


@dataclass(frozen=True)
class TensorJob(Job):
    """A tensor to merge (or, if it is no floating-point one, to copy) with all that its computation needs.

    `factors`, if not None, says that the inputs are the base's tensor and A and B of each expert that changes it (None
    for one that does not), to be merged as `lora.merge_factors` does.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    copied: bool
    parameters: Mapping[str, Any]
    factors: tuple[StoredFactors | None, ...] | None = None


@dataclass(frozen=True)
class MergePlan:
    """A merge that has been checked as far as it can be without reading tensors.

    Attributes:
        recipe: The recipe.
        base: The base model if the method works on differences from it, else None.
        reference: The model whose tensor names, order, dtypes and config the output takes: the recipe's base model, or
            the first model.
        experts: The models that are merged, in the recipe's order.
        jobs: One per output tensor, in the order they lie in the reference model's files.
        output: Files and places of the output.
        window: How memory is shared out; `window.bound` is the most bytes in flight.
        tied: True if an output head that equals the embedding is left out because the config ties the two.
    """

    recipe: Recipe
    base: Model | None
    reference: Model
    experts: tuple[Model, ...]
    jobs: tuple[TensorJob, ...]
    output: OutputPlan
    window: Window
    tied: bool

    @property
    def method(self) -> Method:
        return self.recipe.method

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data that the merge reads."""
        return sum(j.input_bytes for j in self.jobs)

    @property
    def folders(self) -> list[Path]:
        """Every input folder, each once."""
        return list(dict.fromkeys(f for m in (self.reference, *self.experts) for f in (m.folder, m.base_folder)))

    def inputs_label(self, position: int | None) -> Path:
        """Folder of the expert at that position, or of the base for None."""
        return (self.base or self.reference).folder if position is None else self.experts[position].folder

    def auxiliary_files(self) -> Mapping[str, bytes]:
        """Configuration and tokenizer files of the output."""
        source = self.recipe.tokenizer_source
        tokenizer = self.reference.base_folder
        if source not in (None, "base"):
            tokenizer = model_folder(str(source), "tokenizer_source")
        auxiliary = Auxiliary(self.reference.base_folder, tokenizer, self.recipe.chat_template)
        sizes: dict[torch.dtype, int] = {}
        for job in self.jobs:
            if not job.copied:
                sizes[job.dtype] = sizes.get(job.dtype, 0) + job.output_bytes
        main = max(sizes, key=lambda d: sizes[d], default=torch.float32)
        return auxiliary.files(main, everywhere=self.recipe.output_dtype is not None)

    def close(self) -> None:
        """Close all input files."""
        for model in (self.reference, *self.experts):
            model.reader.close()

    def __enter__(self) -> MergePlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan_merge(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    *,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    memory_limit: str | int = DEFAULT_WINDOW,
    dense: bool = False,
) -> MergePlan:
    """Read the recipe and the models' headers, check that they fit, and plan the merge without doing it.

    Args:
        recipe: Path of a YAML file, a mapping of the same structure, or a `Recipe`.
        max_shard_size: Most bytes of tensor data in one output file.
        memory_limit: Bytes of tensor data to keep in flight. One tensor of all models, its result and the method's
            workspace must fit at once, so the plan's `window.bound` is larger if the largest tensor needs it.
        dense: Form the weights of LoRA adapters even where their factors are enough for the merge.

    Raises:
        RecipeError, CheckpointError, MergeError: The recipe, a model folder, or the models together cannot be used.
    """
    recipe = load_recipe(recipe)
    shard_size = parse_size(max_shard_size, "max_shard_size")
    limit = parse_size(memory_limit, "memory_limit")
    with contextlib.ExitStack() as on_error:
        reference, experts = _open_models(recipe, on_error)
        models = (reference, *experts)
        _check_configs(models)
        tied = _check_tied(models)
        skipped = {_HEAD} if tied else set()
        tensors = [t for t in reference.reader.tensors.values() if t.name not in skipped]
        for expert in experts:
            _check_tensors(reference, expert, skipped)
        _check_weights(models)
        base = reference if recipe.merges_differences else None
        jobs = _jobs(recipe, base, reference, experts, tensors, dense)
        output = plan_output(((j.name, j.dtype, j.shape) for j in jobs), shard_size)
        plan = MergePlan(recipe, base, reference, experts, jobs, output, Window.fit(jobs, limit), tied)
        if recipe.tokenizer_source not in (None, "base"):
            model_folder(str(recipe.tokenizer_source), "tokenizer_source")
        on_error.pop_all()
    return plan


def _open_models(recipe: Recipe, on_error: contextlib.ExitStack) -> tuple[Model, tuple[Model, ...]]:
    opened: dict[str, Model] = {}

    # Spectral methods would take the rounding of an adapter's fp32 weights for directions of their own.
    double = any(p.name == "spectral" for p in recipe.method.parameters)

    def open_whole(folder: Path) -> Model:
        key = os.path.realpath(folder)
        if key not in opened:
            reader = on_error.enter_context(CheckpointReader(folder))
            opened[key] = Model(folder, reader, read_config(folder), folder)
        return opened[key]

    def open_adapter(folder: Path, base: Model) -> Model:
        reader = AdapterReader(folder, base.reader, base.config, double=double)
        return Model(folder, on_error.enter_context(reader), base.config, base.folder)

    def open_model(path: str, where: str) -> Model:
        both = model_and_adapter(path, where)
        if both is not None:
            return open_adapter(both[1], open_whole(both[0]))
        folder = model_folder(path, where)
        if not is_adapter_folder(folder):
            return open_whole(folder)
        if where == "base_model" or recipe.base_model is None or model_and_adapter(recipe.base_model, "base_model"):
            raise RecipeError(f"{where}: {folder} is a LoRA adapter; name its base model too, as BASE+{folder}")
        base = model_folder(recipe.base_model, "base_model")
        adapter = open_adapter(folder, open_whole(base))
        assert isinstance(adapter.reader, AdapterReader)
        check_recorded_base(folder, adapter.reader.config.base_name, base)
        return adapter

    first = recipe.models[0].model if recipe.base_model is None else recipe.base_model
    reference = open_model(first, "models[0].model" if recipe.base_model is None else "base_model")
    entries = [(i, entry) for i, entry in enumerate(recipe.models) if entry in recipe.experts]
    experts = [open_model(entry.model, f"models[{i}].model") for i, entry in entries]
    return reference, tuple(experts)


def _check_configs(models: tuple[Model, ...]) -> None:
    reference = models[0]
    for model in models:
        quantization = model.config.get("quantization_config")
        if quantization:
            kind = quantization.get("quant_method", "unnamed") if isinstance(quantization, Mapping) else quantization
            raise CheckpointError(
                f"{model.folder}: is quantised ({kind}); dequantise it first, merging needs full weights"
            )
        for key in ("model_type", "architectures"):
            got, needed = model.config.get(key), reference.config.get(key)
            if got != needed and None not in (got, needed):
                raise MergeError(
                    f"{model.folder}: another architecture: {key} is {got!r}, need {needed!r} as in {reference.folder}"
                )


def _tie_flag(config: Mapping[str, Any]) -> bool | None:
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def _check_tied(models: tuple[Model, ...]) -> bool:
    """True if the output leaves the head out; an error if that would lose a head that is not the embedding."""
    reference = models[0]
    storing = [m for m in models if _HEAD in m.reader.tensors]
    flag = _tie_flag(reference.config)
    if not storing or (flag is not True and len(storing) == len(models)):
        return False
    lacking = next((m for m in models if m not in storing), None)
    if flag is False and lacking is not None:
        raise MergeError(
            f"{lacking.folder}: tensor {_HEAD!r} is missing, {storing[0].folder} stores it and "
            f"{reference.folder / 'config.json'} says tie_word_embeddings: false"
        )
    for model in storing:
        embedding = next((e for e in _EMBEDDINGS if e in model.reader.tensors), None)
        if embedding is None or not model.reader.same_bytes(_HEAD, embedding):
            others = f", and {lacking.folder} stores none" if lacking is not None else ""
            raise MergeError(
                f"{model.folder}: tensor {_HEAD!r} differs from {embedding or _EMBEDDINGS[0]!r} although the models' "
                f"embeddings are tied ({reference.folder / 'config.json'}: tie_word_embeddings){others}; if the head "
                "is separate on purpose, set that to false and store it in every model"
            )
    return True


def _check_tensors(reference: Model, expert: Model, skipped: set[str]) -> None:
    wanted, stored = reference.reader.tensors, expert.reader.tensors
    missing = [name for name in wanted if name not in stored and name not in skipped]
    if missing:
        raise MergeError(
            f"{expert.folder}: tensor {missing[0]!r} is missing{_and_more(missing)}; "
            f"need every tensor of {reference.folder}"
        )
    extra = [name for name in stored if name not in wanted and name not in skipped]
    if extra:
        raise MergeError(
            f"{expert.folder}: tensor {extra[0]!r} is not in {reference.folder}{_and_more(extra)}; "
            "need the same tensors in all models"
        )
    for name, info in wanted.items():
        if name not in skipped and stored[name].shape != info.shape:
            raise MergeError(
                f"{expert.folder}: tensor {name!r} has shape {stored[name].shape}, need {info.shape} as in "
                f"{reference.folder}{_vocabulary_hint(reference, name)}"
            )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _vocabulary_hint(reference: Model, name: str) -> str:
    is_vocabulary = name == _HEAD or name in _EMBEDDINGS
    return "; the vocabularies differ in size: resize the embeddings to one size first" if is_vocabulary else ""


def _check_weights(models: tuple[Model, ...]) -> None:
    for model in models:
        for info in model.reader.tensors.values():
            last = info.name.rsplit(".", 1)[-1]
            if info.dtype not in FLOAT_DTYPES and ("weight" in last or last in ("qzeros", "g_idx")):
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r} holds quantised weights ({info.dtype}); dequantise the model "
                    "first, merging needs F64, F32, F16 or BF16 weights"
                )


def _jobs(
    recipe: Recipe,
    base: Model | None,
    reference: Model,
    experts: tuple[Model, ...],
    tensors: list[TensorInfo],
    dense: bool,
) -> tuple[TensorJob, ...]:
    depths = tensor_depths(t.name for t in tensors)
    sources = (*((base,) if base is not None else ()), *experts)
    jobs = []
    for info in tensors:
        copied = info.dtype not in FLOAT_DTYPES
        inputs = tuple((m.reader, m.reader.tensors[info.name]) for m in sources)
        if copied:
            _check_buffer(info, reference, experts)
        dtype = recipe.output_dtype
        if copied or dtype is None:
            dtype = reference.reader.stored_dtype(info.name)
        parameters = {} if copied else recipe.tensor_parameters(info.name, depths[info.name])
        workspace = 0 if copied else recipe.method.workspace(info.shape, len(experts))
        if any(i.dtype == torch.float64 for _, i in inputs):
            workspace *= 2  # what methods state is for task vectors in fp32
        factors = None
        if base is not None and not copied and not dense and mergeable(recipe.method.name, parameters):
            factors = _factors(base, experts, info)
        if base is not None and factors is not None:
            stored = [(m.reader, i) for m, f in zip(experts, factors, strict=True) if f for i in (f.a, f.b)]
            inputs = ((base.reader, info), *stored)
            workspace = factors_workspace(info.shape, [f.rank if f else 0 for f in factors])
        jobs.append(
            TensorJob(
                name=info.name,
                inputs=inputs,
                output_bytes=info.numel * dtype.itemsize,
                workspace=workspace,
                dtype=dtype,
                shape=info.shape,
                copied=copied,
                parameters=parameters,
                factors=factors,
            )
        )
    return tuple(jobs)


def _factors(base: Model, experts: tuple[Model, ...], info: TensorInfo) -> tuple[StoredFactors | None, ...] | None:
    """The factors of all experts' changes to one matrix of the base; None if one has none or they are too many."""
    found: list[StoredFactors | None] = []
    for expert in experts:
        reader = expert.reader
        if not isinstance(reader, AdapterReader) or reader.base is not base.reader or len(info.shape) != 2:
            return None
        own = reader.stored_factors(info.name)
        if own is None and reader.is_changed(info.name):
            return None
        found.append(own)
    return tuple(found) if sum(f.rank for f in found if f) <= min(info.shape) else None


def _check_buffer(info: TensorInfo, reference: Model, experts: tuple[Model, ...]) -> None:
    for expert in experts:
        other = expert.reader.tensors[info.name]
        if other.dtype != info.dtype:
            raise MergeError(
                f"{expert.folder}: tensor {info.name!r} is {other.dtype}, need {info.dtype} as in {reference.folder}"
            )
