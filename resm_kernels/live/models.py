"""Models that are opened once and merged again and again, into a module in memory or for an inference engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from resm_kernels.checkpoint import CheckpointError, parse_size
from resm_kernels.engine.devices import devices_by_name
from resm_kernels.engine.merge import compute_tensor
from resm_kernels.engine.models import MergeError, Model, OpenedModels, open_models
from resm_kernels.engine.plan import MergePlan, plan_merge
from resm_kernels.engine.tensor_jobs import TensorJob
from resm_kernels.linalg.threads import thread_count
from resm_kernels.live.module import ModuleTensors
from resm_kernels.lora import AdapterReader
from resm_kernels.options import LIVE_MEMORY, MergeOptions
from resm_kernels.recipe import Recipe, RecipeSource, Source, load_recipe
from resm_kernels.stages import StageStore, keeping

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.11 has it in `typing`


@dataclass(frozen=True)
class LiveReport:
    """One merge into a module.

    Attributes:
        tensors: Tensors of the merge.
        seconds: Wall time, from reading the recipe on.
        reused, computed: Stages, and tensors of the models, that were kept from earlier merges, and those that were
            computed or read for this one.
        bytes_kept: Bytes that are kept for the next merge.
    """

    tensors: int
    seconds: float
    reused: int
    computed: int
    bytes_kept: int


class LiveModels:
    """Models that recipes name, opened when the first recipe names them, and merged as often as asked.

    Every recipe of `merge_checkpoints` can be merged, but for those of several documents or with a quantised output.
    The tensors have the bits that `merge_checkpoints` writes. What a change of the recipe leaves valid is kept: the
    models' tensors, the statistics and decompositions of task vectors, the thresholds of densities, the masks of seeds.
    A new weight, λ or β of RESM and TSV-M then costs a product of kept directions for each matrix, and a new weight of
    TIES one pass.

    Use it as a context manager; it holds the models' files open. One thread may use it at a time.

    Args:
        memory_limit: The most bytes that are kept between merges, as a number or as a size such as "4GB" (the default).
            What is least useful is dropped, and read or computed anew. One tensor's inputs, result and workspace come
            on top.
        device: Where models are kept and merged: "cpu" (the default) or a GPU such as "cuda" or "cuda:1", whose results
            are within the tolerances of docs/gpu.md. On a GPU the limit is one on its memory.
        threads, random_seed, mixed_architectures, trust_remote_code: As for `merge_checkpoints`.

    Raises:
        ValueError: An option is out of its range.

    Examples:
        >>> with LiveModels(memory_limit="8GB") as models:  # doctest: +SKIP
        ...     for weight in (0.5, 0.75, 1.0):
        ...         models.merge_into(model, recipe | {"parameters": {"weight": weight}})
        ...         print(weight, accuracy(model))
    """

    def __init__(
        self,
        *,
        memory_limit: str | int = LIVE_MEMORY,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        random_seed: int = 0,
        mixed_architectures: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        (self.device, *others) = devices_by_name(device)
        if others:
            raise ValueError(f"device: got {str(device)!r}, need one device, on which models are kept")
        self.store = StageStore(parse_size(memory_limit, "memory_limit"))
        self._options = MergeOptions(
            threads=threads,
            random_seed=random_seed,
            mixed_architectures=mixed_architectures,
            trust_remote_code=trust_remote_code,
        )
        self._open = contextlib.ExitStack()
        self._opened: dict[Hashable, OpenedModels] = {}
        self._readers: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the models' files, and drop what is kept."""
        self._open.close()
        self._opened.clear()
        self._readers.clear()
        self.store.clear()

    def tensors(self, recipe: RecipeSource) -> Iterator[tuple[str, Tensor]]:
        """Merge as the recipe says, and yield the name and the value of each tensor of the output.

        Names and dtypes are those of the folder that `merge_checkpoints` would write, which is what the weight updates
        of inference engines expect: `model.load_weights(models.tensors(recipe))` in vLLM. A tensor may be one that is
        kept: copy it before you change it.

        Raises:
            RecipeError, CheckpointError, MergeError: As for `merge_checkpoints`.
        """
        with self.plan(recipe) as plan:
            yield from self._merged(plan)

    def merge_into(self, module: nn.Module, recipe: RecipeSource) -> LiveReport:
        """Merge as the recipe says, and write the result into a module, in place.

        Every merged tensor is rounded to the recipe's dtype, or the base model's, as `merge_checkpoints` would store
        it, and then to the dtype of the module's parameter: the module ends up with the values that transformers would
        load from the merged folder in that dtype. Parameters stay the same objects in the same memory, so that
        optimisers, compiled graphs and tied weights remain valid.

        Args:
            module: A model of transformers, which may have another dtype and lie on another device than the files
                say, or any torch module whose parameters are named as in the base model's files. It, or its layers, may
                be wrapped by torch.compile, and it by DataParallel or DistributedDataParallel.

        Raises:
            RecipeError, CheckpointError: As for `merge_checkpoints`.
            MergeError: As for `merge_checkpoints`; or module and merge do not have the same tensors: one has a tensor
                that the other lacks or has in another shape, the module ties parameters that are merged to different
                values, its parameters are quantised, on the meta device or different views of the same memory, or it
                has adapters of peft. This is found before anything is written, but for errors that a tensor's values
                cause.
        """
        began = time.perf_counter()
        before = self.store.hits, self.store.misses
        with self.plan(recipe) as plan:
            written = ModuleTensors(module, plan)
            try:
                for name, tensor in self._merged(plan):
                    written.write(name, tensor)
            except (MergeError, CheckpointError) as error:
                raise type(error)(f"{error}; the module holds parts of this merge now") from error
            return LiveReport(
                tensors=len(plan.jobs),
                seconds=time.perf_counter() - began,
                reused=self.store.hits - before[0],
                computed=self.store.misses - before[1],
                bytes_kept=self.store.nbytes,
            )

    @contextlib.contextmanager
    def merged(self, module: nn.Module, recipe: RecipeSource) -> Iterator[LiveReport]:
        """Merge into a module within the context; at its end the module has the values that it had before.

        They are copied meanwhile, into the memory of the module's device. See `merge_into`.
        """
        with self.plan(recipe) as plan:
            kept = ModuleTensors(module, plan).kept()
        try:
            yield self.merge_into(module, recipe)
        finally:
            for tensor in kept:
                tensor.restore()

    def reference(self, recipe: RecipeSource) -> Model:
        """Return the opened model whose configuration and tokenizer the merge takes."""
        return self._models(load_recipe(recipe)).reference

    def plan(self, recipe: RecipeSource) -> MergePlan:
        """Return the plan of a merge, whose models stay open when it is closed.

        Raises:
            RecipeError, CheckpointError, MergeError: As for `merge_checkpoints`.
        """
        recipe = load_recipe(recipe)
        if recipe.output_format is not None:
            raise MergeError(f"out_dtype: got {recipe.output_format}, but live merges have full weights; need a dtype")
        return plan_merge(recipe, None, self._options, models=self._models(recipe))

    def _models(self, recipe: Recipe) -> OpenedModels:
        """Return the recipe's models, which are opened if no recipe had the same ones before."""
        if recipe.documents:
            raise MergeError(
                f"recipe: has {1 + len(recipe.documents)} documents, but live merges are of one; merge "
                f"{', '.join(recipe.documents)} to folders first (merge --keep-intermediates writes them), "
                "and name these"
            )
        key, other = (_models_key(recipe, spectral=s) for s in (_is_spectral(recipe), not _is_spectral(recipe)))
        if key not in self._opened and other in self._opened and not _has_adapters(self._opened[other]):
            key = other
        if key not in self._opened:
            with contextlib.ExitStack() as on_error:
                self._opened[key] = open_models(recipe, on_error)
                self._open.push(on_error.pop_all())
            self._readers |= {id(model.reader) for model in self._opened[key].all()}
        opened = self._opened[key]
        by_name = {source.model: model for source, model in opened.by_source.items()}
        by_source = {source: by_name[source.model] for source in recipe.sources}
        return OpenedModels(opened.reference, by_source, opened.notes)

    def _merged(self, plan: MergePlan) -> Iterator[tuple[str, Tensor]]:
        self.store.begin_round()
        structure = _structure(plan.recipe)
        for job in plan.jobs:
            with thread_count(self._options.threads), torch.no_grad():
                inputs = [self._input(structure, job, i) for i in range(len(job.inputs))]
                with keeping(self.store, (structure, job.name, job.factors is None), inputs):
                    result = compute_tensor(plan, job, inputs)
            yield job.name, result

    def _input(self, structure: Hashable, job: TensorJob, position: int) -> Tensor:
        """Return a tensor that a job reads, on the device."""
        reader, info = job.inputs[position]
        # A plan has readers of its own for statistics and for embeddings whose rows it aligns.
        own: Hashable = (structure, job.name, position)
        key = ("input", id(reader) if id(reader) in self._readers else own, info.name, info.dtype)
        return self.store.get(key, lambda: reader.read_info(info).to(self.device))


def _is_spectral(recipe: Recipe) -> bool:
    """Return True for methods for which adapters' weights are formed in float64 (`open_models`)."""
    return any(p.name == "spectral" for p in recipe.method.parameters)


def _has_adapters(opened: OpenedModels) -> bool:
    return any(isinstance(model.reader, AdapterReader) for model in opened.all())


def _models_key(recipe: Recipe, *, spectral: bool) -> Hashable:
    """Return all of a recipe on which the tensors of its opened models depend."""
    names = tuple(dict.fromkeys(source.model for source in recipe.sources))
    return recipe.reference, names, spectral, recipe.config_source, recipe.state_dict_key


def _structure(recipe: Recipe) -> Hashable:
    """Return all of a recipe on which the values of a job's inputs depend."""

    def of(source: Source | None) -> Hashable:
        return None if source is None else (source.model, source.layers, source.statistics)

    parts = tuple(
        (part.name, tuple((of(piece.base), tuple(map(of, piece.experts))) for piece in part.slices))
        for part in recipe.parts
    )
    tokenizer = recipe.output_tokenizer
    about_files = recipe.config_source, recipe.state_dict_key, _is_spectral(recipe)
    return recipe.reference, parts, about_files, None if tokenizer is None else tokenizer.model_dump_json()
