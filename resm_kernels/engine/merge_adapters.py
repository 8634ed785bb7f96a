"""Merges of adapters of any base model: its files may name or join its tensors otherwise than the loaded model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resm_kernels.checkpoint import open_form
from resm_kernels.engine.models import Model
from resm_kernels.engine.spelling import Spellings
from resm_kernels.lora import BaseModel, MergedModule, MergeLoraReport, merge_adapters
from resm_kernels.options import MergeLoraKeywords
from resm_kernels.recipe import Recipe

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.11 has it in `typing`


def merge_lora(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    on_module: Callable[[MergedModule], None] | None = None,
    **options: Unpack[MergeLoraKeywords],
) -> MergeLoraReport:
    """Merge PEFT adapters of one base model to one adapter, as the recipe says, and write it to the folder `out`.

    The result is the adapter that a merge of the whole models and an extraction would give: with M what the recipe's
    method makes of the task vectors Δ_t = s_t·B_t·A_t, the adapter has B·A = M, or the best approximation of a lower
    rank. A module that an adapter does not have counts as one that it does not change.

    - Methods whose M is of low rank (`lora.routes.Route` says which) merge factors, in float64, and no matrix of a
      weight's size is formed. The rank of the result is at most the sum of the adapters' ranks.
    - The other methods (TIES, DARE, DELLA, Breadcrumbs, SCE, …) form the task vectors block by block. M is truncated
      to `rank` or `energy`, and the report and the output's record have the error of every module.
    - DoRA adapters are merged with their magnitudes; they, tensors that adapters store whole, and methods that use the
      weights themselves (SLERP, Karcher mean, Arcee Fusion) need the recipe's `base_model`.

    Args:
        recipe: As for `merge_checkpoints`; `models` are adapter folders, or BASE+ADAPTER, and `base_model` may be left
            out where the base's weights are not needed.
        out: The folder to create. It appears when it is complete.
        on_module: This function is called with each module as soon as it is merged.
        rank: At most so many directions of each module. By default all, or the sum of the adapters' ranks where M is
            not of low rank.
        energy: Take for each module the fewest directions that hold this share of ‖M‖²_F.
        max_rank: An upper bound of the rank, with `energy` only.
        uniform_rank: Pad the factors of all modules with zeros to one rank (default: False). Without it, PEFT's
            rank_pattern has the ranks of modules that differ.
        dtype: The dtype of the factors, one of `dtypes.ADAPTER_DTYPES`, by default the recipe's `out_dtype` or `dtype`,
            else the widest of the adapters'.
        accuracy: Of the decomposition of an M that is not of low rank, see `linalg.truncated_svd`; 5e-2 by default.
        random_seed: As for `merge_checkpoints`.
        overwrite: Replace `out` if it is an adapter folder (default: False).
        threads: Number of threads to compute with; None, the default, leaves torch's setting.

    Returns:
        A MergeLoraReport.

    Raises:
        ValueError: An option is out of its range.
        RecipeError, CheckpointError: The recipe or the adapters cannot be used, or do not fit together.

    Determinism: the same bits for any number of threads.
    """
    return merge_adapters(recipe, out, on_module=on_module, open_base=_open_base, **options)


def _open_base(folder: Path, stack: contextlib.ExitStack) -> BaseModel:
    """Open a base model; transformers is asked for its names only if one is not in its files."""
    reader, config, form = open_form(folder)
    stack.enter_context(reader)
    spellings = Spellings([Model(folder, reader, config, folder, form)], as_stored=True)
    return BaseModel(folder, spellings.readers[0], config, spellings.loaded_model(0))
