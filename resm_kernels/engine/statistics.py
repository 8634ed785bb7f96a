"""Opens the statistics that a recipe gives its experts, and checks that they belong to these models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from resm_kernels.checkpoint import TensorInfo
from resm_kernels.checkpoint.statistics import StatisticsReader
from resm_kernels.engine.models import MergeError, Model, OpenedModels
from resm_kernels.files import expanded
from resm_kernels.methods import Method
from resm_kernels.recipe import Recipe, RecipeError, Source, dotted
from resm_kernels.suggestions import did_you_mean

Statistics = Mapping[Source, StatisticsReader]


def open_statistics(recipe: Recipe, models: OpenedModels, on_error: contextlib.ExitStack) -> Statistics:
    """Open the statistics of every expert, each file once; `on_error` closes those that have been opened.

    Raises:
        CheckpointError: A file cannot be read or holds no statistics.
        MergeError: Statistics are of another kind than the method's, or of other models.
    """
    by_file: dict[str, StatisticsReader] = {}
    statistics: dict[Source, StatisticsReader] = {}
    for source in recipe.experts:
        if source.statistics is None:
            continue
        file = expanded(source.statistics, RecipeError, f"{dotted(source.location)}.statistics")
        key = os.path.realpath(file)
        if key not in by_file:
            by_file[key] = on_error.enter_context(StatisticsReader(file))
        statistics[source] = by_file[key]
        _check_kind(recipe.method, by_file[key])
        _check_shapes(models.by_source[source], by_file[key])
    if recipe.method.statistics_model == "merged":
        _check_one_model(models, statistics)
    else:
        for source, reader in statistics.items():
            _check_model(models.by_source[source], reader)
    return statistics


def statistics_files(statistics: Statistics) -> list[Path]:
    """Every file of statistics once."""
    return list(dict.fromkeys(reader.file for reader in statistics.values()))


def _check_kind(method: Method, reader: StatisticsReader) -> None:
    if reader.about.kind != method.statistics:
        raise MergeError(
            f"{reader.file}: holds {reader.about.kind} statistics, but {method.name} needs {method.statistics} "
            f"statistics: resm-kernels statistics --kind {method.statistics}"
        )


def _check_model(model: Model, reader: StatisticsReader) -> None:
    """Refuse statistics of another model than the expert."""
    if reader.about.fingerprint != model.reader.fingerprint():
        raise MergeError(
            f"{reader.file}: was computed on other weights ({reader.about.model}) than those of {model.folder}; "
            "compute the statistics of this model"
        )


def _check_one_model(models: OpenedModels, statistics: Statistics) -> None:
    """Refuse statistics that were not all computed on one model, or that were computed on an expert."""
    readers = list(statistics.values())
    for reader in readers[1:]:
        if reader.about.fingerprint != readers[0].about.fingerprint:
            raise MergeError(
                f"{reader.file}: was computed on other weights ({reader.about.model}) than {readers[0].file} "
                f"({readers[0].about.model}); need statistics of one merged model, with the prompts of each expert"
            )
    for source, reader in statistics.items():
        folder = models.by_source[source].folder
        if reader.about.fingerprint == models.by_source[source].reader.fingerprint():
            raise MergeError(
                f"{reader.file}: was computed on the expert {folder} itself, which is what regmean takes; need "
                "statistics of a merged model"
            )


def _check_shapes(model: Model, reader: StatisticsReader) -> None:
    """Refuse statistics of tensors that the model does not have, or has in other shapes."""
    tensors = {model.reader.stored_name(name): info for name, info in model.reader.tensors.items()}
    for name in reader.names:
        if name not in tensors:
            raise MergeError(
                f"{reader.file}: has a statistic of {name!r}, which {model.folder} does not have"
                f"{did_you_mean(name, tuple(tensors))}; compute the statistics of this model"
            )
        stored, shape = reader.statistic(name), tensors[name].shape
        assert stored is not None
        needed = shape
        if reader.about.kind == "gram":
            width = shape[0 if reader.is_transposed(name) else -1] if len(shape) == 2 else 0
            needed = (width, width)
        if stored.shape != needed:
            raise MergeError(
                f"{reader.file}: the statistic of {name!r} has shape {stored.shape}, need {needed} for the shape "
                f"{shape} that it has in {model.folder}"
            )


def statistics_of(
    statistics: Statistics, sources: Sequence[Source], names: Sequence[str]
) -> tuple[tuple[tuple[StatisticsReader, TensorInfo], ...], bool]:
    """Return where the statistics of one tensor are stored in each expert's file, and whether it is transposed.

    The first result is empty if no expert has any.

    Args:
        sources: The experts.
        names: The tensor's name in each expert's files.

    Raises:
        MergeError: Only some experts have a statistic of the tensor, or they contradict each other.
    """
    if not statistics:
        return (), False
    readers = [statistics[source] for source in sources]
    found = [reader.statistic(name) for reader, name in zip(readers, names, strict=True)]
    lacking = next((t for t, info in enumerate(found) if info is None), None)
    if lacking is not None:
        present = next((t for t, info in enumerate(found) if info is not None), None)
        if present is not None:
            raise MergeError(
                f"{readers[lacking].file}: has no statistic of {names[lacking]!r}, but {readers[present].file} has; "
                "need one of each expert"
            )
        return (), False
    ways = {reader.is_transposed(name) for reader, name in zip(readers, names, strict=True)}
    if len(ways) > 1:
        raise MergeError(f"statistics of {names[0]!r}: some say that it is stored as (in, out), others (out, in)")
    return tuple((r, info) for r, info in zip(readers, found, strict=True) if info is not None), ways.pop()
