"""Models that other documents of the same recipe merge: their tensors are merged when they are read.

A document is planned like a merge of its own. A merge that refers to it reads it through a `DocumentReader`, which
gives the bytes that the document's output would have on disk. Its small files lie in a temporary folder.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointError, CheckpointReader, TensorInfo
from resm_kernels.checkpoint.format import byte_view
from resm_kernels.checkpoint.forms import read_form_config
from resm_kernels.checkpoint.quantised import formed, without_quantization
from resm_kernels.engine.job import input_files
from resm_kernels.engine.models import MergeError, Model
from resm_kernels.linalg.threads import thread_count
from resm_kernels.options import MergeOptions
from resm_kernels.recipe import Recipe, RecipeError, kept_folders, unread_documents

if TYPE_CHECKING:
    from resm_kernels.engine.plan import MergePlan
    from resm_kernels.engine.tensor_jobs import TensorJob


class DocumentReader(CheckpointReader):
    """The tensors of a merge that has been planned, with the interface of `CheckpointReader`.

    A tensor, or the blocks of it that a read touches, are merged at every read. The last result is kept, so that
    several reads of parts of it, or by several merges, compute it once.

    Args:
        name: The document's name.
        plan: Its plan, which is closed with this reader.
        folder: The temporary folder of its small files, which is deleted with it.
        lock: Held while a tensor is merged, so that documents of one level take the memory of one of them.
    """

    def __init__(self, name: str, plan: MergePlan, folder: Path, lock: threading.RLock) -> None:
        from resm_kernels.engine.merge import streaming_of  # merge imports plan, which imports this module

        self.folder = Path(name)
        self.plan = plan
        self._name, self._small_files, self._merging = name, folder, lock
        slots = sorted(plan.output.slots.values(), key=lambda slot: (slot.shard, slot.offset))
        infos = [TensorInfo(slot.name, slot.dtype, slot.shape, self.folder, 0, slot.nbytes) for slot in slots]
        self.tensors = MappingProxyType({info.name: info for info in infos})
        self._pieces: dict[str, list[TensorJob]] = {}
        for piece in plan.pieces:
            for stored, *_ in piece.stored:
                self._pieces.setdefault(stored, []).append(piece)
        self._streaming = streaming_of(plan)
        self._workspace = max(map(self._need, plan.pieces), default=0)
        self._last: tuple[TensorJob, dict[str, Tensor]] | None = None

    @property
    def files(self) -> list[Path]:
        """Return the files that the tensors are merged from."""
        return input_files(self.plan)

    @property
    def workspace(self) -> int:
        """Bytes that merging a tensor, or a block of one, takes beyond the buffer that is filled."""
        return self._workspace

    def is_stored(self, name: str) -> bool:
        """Return False: the tensor lies in no file."""
        return False

    def has_parts(self, name: str) -> bool:
        """Return True if the tensor is merged in blocks, or is small enough to be merged whole within the limit."""
        pieces = self._pieces[name]
        return len(pieces) > 1 or self._need(pieces[0]) <= self.plan.options.window_bytes

    def read_bytes(self, info: TensorInfo, first: int, buffer: Tensor) -> None:
        """Fill `buffer` with the bytes of a tensor from byte `first` on."""
        begin, size = info.offset + first, buffer.nbytes
        target, itemsize = byte_view(buffer), self.tensors[info.name].dtype.itemsize
        done = 0
        with self._merging, document_named(self._name):
            for piece in self._pieces[info.name]:
                start = piece.start * itemsize
                end = start + (piece.output_bytes if piece.rounding is None else self.tensors[info.name].nbytes)
                low, high = max(start, begin), min(end, begin + size)
                if low < high:
                    source = byte_view(self._merged(piece)[info.name])
                    target[low - begin : high - begin] = source[low - start : high - start]
                    done += high - low
        if done != size:
            raise ValueError(f"{info.name!r}: got a read of bytes {begin} to {begin + size}, which it does not have")

    def read_runs(self, info: TensorInfo, starts: object, length: int) -> Tensor:
        """Raise a ValueError: runs are read only of tensors that lie in a file, for which `is_stored` is True."""
        raise ValueError(f"{info.name!r}: got a read of runs, need a tensor that lies in a file; this one is merged")

    def _need(self, piece: TensorJob) -> int:
        """Return the bytes that a job takes: its inputs, its result and a copy of it, its workspace, its passes."""
        window = self.plan.window
        return piece.input_bytes + 2 * piece.output_bytes + piece.workspace + window.passes + window.keys

    def _merged(self, piece: TensorJob) -> dict[str, Tensor]:
        """Return the tensors of the output's files that a job makes."""
        if self._last is not None and self._last[0] is piece:
            return self._last[1]
        from resm_kernels.engine.merge import compute_job

        self._last = None
        with thread_count(self.plan.options.threads), torch.no_grad():
            inputs = [reader.read_info(info) for reader, info in piece.inputs]
            result = compute_job(self.plan, self._streaming, piece, inputs)
            stored = {piece.name: result} if piece.rounding is None else piece.rounding.encode(result)[0]
        self._last = piece, {name: tensor.contiguous() for name, tensor in stored.items()}
        return self._last[1]

    def close(self) -> None:
        """Close the files that the tensors are merged from, and delete the temporary folder."""
        self.plan.close()
        shutil.rmtree(self._small_files, ignore_errors=True)


class Documents:
    """The documents of a recipe as models, each planned once, when a merge refers to it.

    Args:
        recipe: The output's recipe.
        options: How the output is merged.
        plan: Plans a document's merge: `plan_merge`.
        written: Folders that documents have been written to already, by name.

    Attributes:
        plans: The plans so far, each after those that it reads.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: MergeOptions,
        plan: Callable[[Recipe, MergeOptions, Documents], MergePlan],
        written: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        self._recipes, self._options, self._plan, self.written = recipe.documents, options, plan, written
        self._levels: dict[str, int] = {}
        for name, document in recipe.documents.items():
            self._levels[name] = max((self._levels[other] + 1 for other in document.documents), default=0)
        self._locks = [threading.RLock() for _ in self._levels]
        self._models: dict[str, Model] = {}
        self.plans: dict[str, MergePlan] = {}

    def model(self, name: str, on_error: contextlib.ExitStack) -> Model:
        """Return a document as a model; `on_error` closes it."""
        if name not in self._models:
            self._models[name] = self._planned(name)
        on_error.callback(self._models[name].reader.close)
        return self._models[name]

    def _planned(self, name: str) -> Model:
        level, height = self._levels[name], 1 + max(self._levels.values())
        # A document's workspace includes that of the documents that it reads. All have the same share, and the output.
        memory = max(self._options.window_bytes * (level + 1) // (height + 1), 1)
        with document_named(name):
            plan = self._plan(self._recipes[name], document_options(self._options, memory), self)
        folder = Path(tempfile.mkdtemp(prefix="resm-kernels-"))
        try:
            for file, content in plan.auxiliary_files().items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
            form = plan.models.reference.form
            has_config = form.config_file is not None and (folder / form.config_file).exists()
            config = read_form_config(folder, form) if has_config else {}
            reader = formed(DocumentReader(name, plan, folder, self._locks[level]), config)
        except BaseException:
            plan.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.plans[name] = plan
        return Model(Path(name), reader, without_quantization(config), folder, form, plan=plan)


def document_options(options: MergeOptions, memory: int) -> MergeOptions:
    """Return how a document is merged that others read: on the CPU of this process, to safetensors."""
    return replace(
        options,
        memory_limit=memory,
        device="cpu",
        device_memory=None,
        engine="local",
        address=None,
        workers=None,
        out_format=MergeOptions.out_format,
        copy_tokenizer=True,
        keep_intermediates=None,
    )


@contextlib.contextmanager
def document_named(name: str) -> Iterator[None]:
    """Put the document's name before the message of an error within the context."""
    try:
        yield
    except (RecipeError, CheckpointError, MergeError) as error:
        raise type(error)(f"document {name!r}: {error}") from (error.__cause__ or error)


def check_documents(recipe: Recipe, options: MergeOptions) -> None:
    """Refuse a document that no other refers to, unless it is kept."""
    unread = unread_documents(recipe)
    if unread and options.keep_intermediates is None:
        raise RecipeError(
            f"document {unread[0]!r}: no other document refers to it, so that it has no effect; remove it, or keep its "
            "merge with --keep-intermediates"
        )


def document_notes(recipe: Recipe, options: MergeOptions) -> list[str]:
    """Return a line for each document whose name a folder has too, and for each that is kept."""
    places = kept_folders(recipe, options.keep_intermediates)
    notes = [
        f"{name!r} means the document of that name, not the folder {Path(name).resolve()}"
        for name in recipe.documents
        if Path(name).is_dir()
    ]
    if options.keep_intermediates is not None and not places:
        notes.append("keep_intermediates: the recipe has one document, so that there are none")
    return [*notes, *(f"document {name!r}: its merge is kept in {place}" for name, place in places.items())]
