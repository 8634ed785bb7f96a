"""Plans the tensors of the output, and which tensors of which models each is merged from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from resm_kernels.checkpoint import TensorInfo
from resm_kernels.engine.models import MergeError, Model, OpenedModels
from resm_kernels.recipe import Part, Recipe, RecipeError, Slice, Source, dotted
from resm_kernels.suggestions import did_you_mean
from resm_kernels.tensor_names import is_before_layers, layer_depth, layer_position, module_names, tensor_depths


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output.

    Attributes:
        name: Its name in the output.
        piece: The slice it belongs to, whose sources it is merged from.
        inputs: Its name in each of `piece.sources`; where layers are stacked anew, the number of the layer may differ.
        depth: The depth at which gradients of parameters are evaluated, from 0 to 1.
        lead: The model that the tensor takes its dtype from.
    """

    name: str
    piece: Slice
    inputs: tuple[str, ...]
    depth: float
    lead: Model


@dataclass(frozen=True)
class LayerOrigin:
    """The layer of a model whose entries in the config a layer of the output takes, and one of its tensors."""

    model: Model
    number: int
    tensor: str


@dataclass(frozen=True)
class Layout:
    """The output's tensors, and for modules (by name) whose layers are stacked anew the origin of each layer."""

    tensors: tuple[OutputTensor, ...]
    origins: Mapping[str | None, tuple[LayerOrigin, ...]]


def plan_layout(recipe: Recipe, models: OpenedModels, skipped: set[str]) -> Layout:
    """Return the tensors that the output consists of, without those named in `skipped`.

    Raises:
        RecipeError: The recipe names a layer range or module that a model does not have.
        MergeError: Models that are to be merged do not have the same tensors.
    """
    if recipe.modules is not None:
        _check_modules(recipe, models.reference)
    tensors: list[OutputTensor] = []
    origins: dict[str | None, tuple[LayerOrigin, ...]] = {}
    for part in recipe.parts:
        planner = _PartPlanner(part, models, skipped)
        if part.slices[0].sources[0].layers is None:
            tensors += planner.whole(part.slices[0])
        else:
            tensors += planner.stacked()
            origins[part.name] = tuple(planner.origins)
    return Layout(tuple(tensors), origins)


def _check_modules(recipe: Recipe, reference: Model) -> None:
    known = list(dict.fromkeys(module_names(reference.reader.tensors).values()))
    named = [str(part.name) for part in recipe.parts]
    for name in named:
        if name not in known:
            raise RecipeError(
                f"{dotted(('modules', name))}: {reference.folder} has no such module{did_you_mean(name, known)}; "
                f"it has {', '.join(known)}"
            )
    missing = [name for name in known if name not in named]
    if missing:
        raise RecipeError(f"modules: {', '.join(missing)} missing; the output needs every module of the model")


class _PartPlanner:
    """Plans the tensors of one module (or of the whole model, for a part without a name)."""

    def __init__(self, part: Part, models: OpenedModels, skipped: set[str]) -> None:
        self._part = part
        self._models = models
        self._stored: dict[Source, Mapping[str, TensorInfo]] = {}
        self._stack_name: str | None = None
        self.origins: list[LayerOrigin] = []
        for source in (s for piece in part.slices for s in piece.sources):
            tensors = models.by_source[source].reader.tensors
            modules = module_names(tensors) if part.name is not None else {}
            self._stored[source] = {
                name: info for name, info in tensors.items() if name not in skipped and modules.get(name) == part.name
            }

    def whole(self, piece: Slice) -> Iterator[OutputTensor]:
        """Yield every tensor under its name in the models, in the order of the reference model's files."""
        sources = piece.sources
        lead = next((s for s in sources if self._models.by_source[s] is self._models.reference), sources[0])
        for source in sources:
            self._check_same(lead, source)
        depths = tensor_depths(self._stored[lead])
        for name, depth in depths.items():
            yield OutputTensor(name, piece, (name,) * len(sources), depth, self._models.by_source[lead])

    def stacked(self) -> Iterator[OutputTensor]:
        """Yield the first slice's tensors before the layers, all layers renumbered, the last slice's after them."""
        slices = self._part.slices
        yield from self._outside(slices[0], before=True)
        for piece in slices:
            yield from self._layers(piece)
        yield from self._outside(slices[-1], before=False)

    def _outside(self, piece: Slice, *, before: bool) -> Iterator[OutputTensor]:
        names = [
            {n: n for n in self._stored[source] if layer_position(n) is None and is_before_layers(n) == before}
            for source in piece.sources
        ]
        for inputs in self._aligned(piece, names):
            yield OutputTensor(inputs[0], piece, inputs, 0.0, self._models.by_source[piece.sources[0]])

    def _layers(self, piece: Slice) -> Iterator[OutputTensor]:
        lead = piece.sources[0]
        stacks = [self._stack(source) for source in piece.sources]
        ranges = [source.layers for source in piece.sources if source.layers is not None]
        count = ranges[0][1] - ranges[0][0]
        for i in range(count):
            names = [stack[first + i] for stack, (first, _) in zip(stacks, ranges, strict=True)]
            number = len(self.origins)
            tensor = next(iter(names[0].values()))
            self.origins.append(LayerOrigin(self._models.by_source[lead], ranges[0][0] + i, tensor))
            for inputs in self._aligned(piece, names):
                position = layer_position(inputs[0])
                assert position is not None
                if self._stack_name not in (None, position.stack):
                    raise MergeError(
                        f"{self._models.by_source[lead].folder}: tensor {inputs[0]!r} is in layers named "
                        f"{position.stack!r}, need {self._stack_name!r} as in the first slice "
                        f"({dotted(lead.location)})"
                    )
                self._stack_name = position.stack
                name = f"{position.stack}{number}{position.rest}"
                yield OutputTensor(name, piece, inputs, layer_depth(i, count), self._models.by_source[lead])

    def _stack(self, source: Source) -> dict[int, dict[str, str]]:
        """Return the tensors of the source's layers: layer number → name without the number → name."""
        layers: dict[int, dict[str, str]] = {}
        stacks: dict[str, None] = {}
        for name in self._stored[source]:
            if (position := layer_position(name)) is not None:
                stacks.setdefault(position.stack)
                layers.setdefault(position.number, {})[position.unnumbered] = name
        folder = self._models.by_source[source].folder
        where = f"{dotted(source.location)}.layer_range"
        if len(stacks) != 1:
            shown = ", ".join(dotted((name,)) for name in list(stacks)[:3]) + (", …" if len(stacks) > 3 else "")
            several = f"{len(stacks)} stacks of layers ({shown}); list its modules apart, under modules"
            raise RecipeError(f"{where}: {folder} has {several if stacks else 'no layers, need some'}")
        assert source.layers is not None
        last = max(layers) + 1
        if source.layers[1] > last or any(number not in layers for number in range(*source.layers)):
            raise RecipeError(
                f"{where}: got {list(source.layers)}, but {folder} has layers 0 to {last - 1}: [0, {last}]"
            )
        return layers

    def _aligned(self, piece: Slice, names: list[dict[str, str]]) -> Iterator[tuple[str, ...]]:
        """Yield for every tensor its name in each source; each source must have all tensors."""
        for source, other in zip(piece.sources[1:], names[1:], strict=True):
            self._check_names(piece.sources[0], names[0], source, other)
        for key in names[0]:
            yield tuple(source_names[key] for source_names in names)

    def _check_names(self, lead: Source, lead_names: dict[str, str], source: Source, names: dict[str, str]) -> None:
        """Refuse a source of a slice that does not have the tensors of the first source."""
        first, folder = self._models.by_source[lead].folder, self._models.by_source[source].folder
        need = f"({dotted(source.location)}); need the same tensors in all sources of a slice"
        if missing := [n for key, n in lead_names.items() if key not in names]:
            raise MergeError(f"{folder}: has no tensor for {missing[0]!r} of {first}{and_more(missing)} {need}")
        if extra := [n for key, n in names.items() if key not in lead_names]:
            raise MergeError(f"{folder}: tensor {extra[0]!r} has no counterpart in {first}{and_more(extra)} {need}")

    def _check_same(self, lead: Source, expert: Source) -> None:
        """Refuse whole models that do not have the same tensors."""
        lead_tensors, expert_tensors = self._stored[lead], self._stored[expert]
        reference, folder = self._models.by_source[lead].folder, self._models.by_source[expert].folder
        need = "need the same tensors in all models"
        if missing := [name for name in lead_tensors if name not in expert_tensors]:
            raise MergeError(
                f"{folder}: tensor {missing[0]!r} is missing{and_more(missing)}; need every tensor of {reference}"
            )
        if extra := [name for name in expert_tensors if name not in lead_tensors]:
            raise MergeError(f"{folder}: tensor {extra[0]!r} is not in {reference}{and_more(extra)}; {need}")


def and_more(names: Sequence[str]) -> str:
    """Return how many further names there are after the first, in parentheses; nothing if there are none."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
