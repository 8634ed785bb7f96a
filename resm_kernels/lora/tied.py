"""Changes of an embedding and of the output head that is tied to it, which are one tensor in the model's files.

PEFT adapts one of the two while the adapter is in use: the other one keeps its values. One merged tensor cannot do
this, so that a user has to choose between two tensors and one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, TensorInfo
from resm_kernels.lora.changes import LowRank
from resm_kernels.lora.config import is_tied
from resm_kernels.lora.loaded import LoadedModel, Parameter, whole_parameter
from resm_kernels.lora.targets import Target
from resm_kernels.tensor_names import OUTPUT_HEAD, is_tied_embedding, is_vocabulary, layer_position, module_of


class TiedModel(LoadedModel):
    """A model whose tied parameters can be named by each of their names.

    Args:
        model: The model.
        config: Its config.json.
        tensors: Its tensors by the names that its reader gives them.
        names: The names of all parameters that an adapter changes. Ties are looked up only if one of them is outside
            the layers, because that may mean to import transformers.
        saved: The tensors that the adapter stores whole, by their names in the loaded model. Embeddings and heads among
            them may have another number of rows than the base's, because tokens were added.

    Attributes:
        originals: For each tied parameter that the files have under another's name only, the other's name.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        names: Sequence[str],
        saved: Mapping[str, TensorInfo],
    ) -> None:
        self._model, self._saved = model, saved
        self.originals: dict[str, str] = {}
        if all(layer_position(name) is not None for name in names):
            return
        tied = dict(model.tied)
        if not tied and is_tied(config, tensors):
            tied[OUTPUT_HEAD] = next((name for name in tensors if is_tied_embedding(name)), OUTPUT_HEAD)
        for copy, original in tied.items():
            of_copy, of_original = model.locate(copy), model.locate(original)
            if of_original is not None and (of_copy is None or of_copy.placements == of_original.placements):
                self.originals[copy] = original

    @property
    def tied(self) -> Mapping[str, str]:
        return self.originals

    def locate(self, name: str) -> Parameter | None:
        found = self._model.locate(self.originals.get(name, name))
        saved, whole = self._saved.get(name), None if found is None else found.stored_whole
        if found is None or saved is None or whole is None or not is_vocabulary(whole):
            return found
        return whole_parameter(found.name, replace(saved, name=whole)) if saved.shape[1:] == found.shape[1:] else found

    def is_resized(self, name: str) -> bool:
        """Return True if a parameter is stored whole in another shape, so that those tied to it must follow."""
        saved, found = self._saved.get(name), self._model.locate(name)
        return saved is not None and found is not None and saved.shape != found.shape

    def parameters(self, module: str) -> Sequence[str] | None:
        return self._model.parameters(module)

    def is_transposed(self, module: str) -> bool | None:
        return self._model.is_transposed(module)

    def group(self, name: str) -> frozenset[str]:
        """Return the names of all parameters that are one with this one, its own among them."""
        original = self.originals.get(name, name)
        return frozenset((original, *(copy for copy, source in self.originals.items() if source == original)))


def settle_tied(
    targets: Sequence[Target],
    saved: Mapping[str, TensorInfo],
    model: TiedModel,
    choice: str,
    read: Callable[[TensorInfo], Tensor],
    folders: tuple[Path, Path],
    modules: Collection[str],
) -> tuple[list[Target], dict[str, TensorInfo]]:
    """Return the changes of an adapter so that tied parameters are changed once.

    Args:
        targets: The changes.
        saved: The tensors that are stored whole, by their names in the loaded model.
        model: The base model.
        choice: With "both" a change of one tied parameter is one of all; else it is an error.
        read: Reads a stored tensor.
        folders: The folders of the adapter and of the base model.
        modules: The adapter's modules_to_save, of which PEFT makes copies; it saves all modules whose names end so.

    Raises:
        CheckpointError: One of several tied parameters is changed, or several are and not alike, and `choice` does not
            say what to do.
    """
    left, kept = list(targets), dict(saved)
    groups = {model.group(name): name for name in (*saved, *(target.name for target in targets))}
    for group, name in groups.items():
        changes = [target for target in left if target.name in group]
        whole = [other for other in kept if other in group]
        if len(group) == 1 or not (changes or whole):
            continue
        original = model.originals.get(name, name)
        if not changes and len(whole) == len(group):
            if all(torch.equal(read(kept[original]), read(kept[other])) for other in whole):
                kept = {other: info for other, info in kept.items() if other not in group or other == original}
                continue
            if OUTPUT_HEAD in group:
                continue  # the model's configuration decides when the merge is planned
        # PEFT trains the rows of tied tensors together.
        alike = all(target.rows is not None for target in changes) and not whole
        # What modules_to_save does not name, PEFT writes over the base's one tensor.
        alike = alike or (not changes and not any(module_of(other).endswith(tuple(modules)) for other in whole))
        if not alike and len(changes) == len(group) and _same_change(changes, read):
            left = [target for target in left if target not in changes[1:]]
        elif not alike and choice != "both" and not model.is_resized(original):
            raise CheckpointError(_message(name, group, choice, folders))
        for other in whole:
            kept[original] = kept.pop(other)
    return left, kept


def _message(name: str, group: frozenset[str], choice: str, folders: tuple[Path, Path]) -> str:
    adapter, base = folders
    others = ", ".join(repr(other) for other in sorted(group - {name}))
    tied = f"{adapter}: adapts {name!r}, which {base} ties to {others}"
    both = "tied_embeddings: both, which changes the tied tensor, as PEFT's merge_and_unload does"
    if choice == "untie":
        return f"{tied}, whatever tie_word_embeddings in its config.json says; choose {both}"
    return (
        f"{tied}; choose tied_embeddings: untie, which stores both so that {others} keeps its values, as while the "
        f"adapter is in use; or {both}"
    )


def _same_change(targets: Sequence[Target], read: Callable[[TensorInfo], Tensor]) -> bool:
    """Return True if LoRA changes an embedding and its head by the same product, as with `ensure_weight_tying`."""
    products = []
    for target in targets:
        if not isinstance(target.change, LowRank) or target.magnitude is not None:
            return False
        left, right, scale = target.change.factors(read(target.change.a), read(target.change.b))
        products.append((left, right, scale))
    first = products[0]
    return all(
        torch.equal(first[0], left) and torch.equal(first[1], right) and first[2] == scale
        for left, right, scale in products[1:]
    )
