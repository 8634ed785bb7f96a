"""The tensors of the output: which tensor of which model each is merged from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from resm_kernels.checkpoint import TensorInfo
from resm_kernels.engine.models import MergeError, Model, OpenedModels
from resm_kernels.recipe import (
    Part,
    Recipe,
    RecipeError,
    Slice,
    Source,
    dotted,
)
from resm_kernels.suggestions import did_you_mean
from resm_kernels.tensor_names import is_before_layers, layer_depth, layer_position, module_names, tensor_depths


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output.

    Attributes:
        name: Its name in the output.
        piece: The slice it belongs to, whose sources it is merged from.
        inputs: Its name in each of `piece.sources`: another layer's where layers are stacked anew.
        depth: What gradients of parameters are evaluated at.
        lead: The model whose tensor, `inputs[0]` by name, it takes its dtype from.
    """

    name: str
    piece: Slice
    inputs: tuple[str, ...]
    depth: float
    lead: Model


@dataclass(frozen=True)
class LayerOrigin:
    """The layer of a model that a layer of the output has its entries in the config from."""

    model: Model
    number: int


@dataclass(frozen=True)
class Layout:
    """The output's tensors, and where the layers are from in modules (by name) that are stacked anew."""

    tensors: tuple[OutputTensor, ...]
    origins: Mapping[str | None, tuple[LayerOrigin, ...]]


def plan_layout(recipe: Recipe, models: OpenedModels, skipped: set[str]) -> Layout:
    """Say what the output consists of, leaving out the tensors named in `skipped`.

    Raises:
        RecipeError: A layer range or module that a model does not have.
        MergeError: Models that do not have the same tensors where they are to be merged.
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
                f"modules.{name}: {reference.folder} has no such module{did_you_mean(name, known)}; "
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
            tensors = models.of[source].reader.tensors
            modules = module_names(tensors) if part.name is not None else {}
            own = {n: i for n, i in tensors.items() if n not in skipped and modules.get(n) == part.name}
            self._stored[source] = own

    def whole(self, piece: Slice) -> Iterator[OutputTensor]:
        """Every tensor under its own name, in the order of the reference model's files."""
        sources = piece.sources
        lead = next((s for s in sources if self._models.of[s] is self._models.reference), sources[0])
        for source in sources:
            self._check_same(lead, source)
        depths = tensor_depths(self._stored[lead])
        for name, depth in depths.items():
            yield OutputTensor(name, piece, (name,) * len(sources), depth, self._models.of[lead])

    def stacked(self) -> Iterator[OutputTensor]:
        """The first slice's tensors before the layers, the slices' layers numbered anew, the last one's after them."""
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
            yield OutputTensor(inputs[0], piece, inputs, 0.0, self._models.of[piece.sources[0]])

    def _layers(self, piece: Slice) -> Iterator[OutputTensor]:
        lead = piece.sources[0]
        stacks = [self._stack(source) for source in piece.sources]
        ranges = [source.layers for source in piece.sources if source.layers is not None]
        count = ranges[0][1] - ranges[0][0]
        for i in range(count):
            names = [stack[first + i] for stack, (first, _) in zip(stacks, ranges, strict=True)]
            number = len(self.origins)
            self.origins.append(LayerOrigin(self._models.of[lead], ranges[0][0] + i))
            for inputs in self._aligned(piece, names):
                place = layer_position(inputs[0])
                assert place is not None
                if self._stack_name not in (None, place.stack):
                    raise MergeError(
                        f"{self._models.of[lead].folder}: tensor {inputs[0]!r} is in layers named {place.stack!r}, "
                        f"need {self._stack_name!r} as in the first slice ({dotted(lead.location)})"
                    )
                self._stack_name = place.stack
                name = f"{place.stack}{number}{place.rest}"
                yield OutputTensor(name, piece, inputs, layer_depth(i, count), self._models.of[lead])

    def _stack(self, source: Source) -> dict[int, dict[str, str]]:
        """Names of the source's layers: number → name without it → name."""
        layers: dict[int, dict[str, str]] = {}
        stacks: dict[str, None] = {}
        for name in self._stored[source]:
            if (place := layer_position(name)) is not None:
                stacks.setdefault(place.stack)
                layers.setdefault(place.number, {})[place.stack + place.rest] = name
        folder = self._models.of[source].folder
        where = f"{dotted(source.location)}.layer_range"
        if len(stacks) != 1:
            found = f"{len(stacks)} stacks of layers ({', '.join(stacks)}); list its modules apart, under modules"
            raise RecipeError(f"{where}: {folder} has {found if stacks else 'no layers, need some'}")
        assert source.layers is not None
        if any(number not in layers for number in range(*source.layers)):
            last = max(layers) + 1
            raise RecipeError(
                f"{where}: got {list(source.layers)}, but {folder} has layers 0 to {last - 1}: [0, {last}]"
            )
        return layers

    def _aligned(self, piece: Slice, names: list[dict[str, str]]) -> Iterator[tuple[str, ...]]:
        """The names of one tensor in each source, for every tensor; each source must have all of them."""
        for source, other in zip(piece.sources[1:], names[1:], strict=True):
            self._check_names(piece.sources[0], names[0], source, other)
        for key in names[0]:
            yield tuple(own[key] for own in names)

    def _check_names(self, lead: Source, wanted: dict[str, str], source: Source, own: dict[str, str]) -> None:
        first, folder = self._models.of[lead].folder, self._models.of[source].folder
        if missing := [n for key, n in wanted.items() if key not in own]:
            raise MergeError(
                f"{folder}: has no tensor for {missing[0]!r} of {first}{_and_more(missing)} "
                f"({dotted(source.location)}); need the same tensors in all sources of a slice"
            )
        if extra := [n for key, n in own.items() if key not in wanted]:
            raise MergeError(
                f"{folder}: tensor {extra[0]!r} has none in {first} beside it{_and_more(extra)} "
                f"({dotted(source.location)}); need the same tensors in all sources of a slice"
            )

    def _check_same(self, lead: Source, expert: Source) -> None:
        """Refuse whole models that do not have the same tensors."""
        wanted, stored = self._stored[lead], self._stored[expert]
        reference, folder = self._models.of[lead].folder, self._models.of[expert].folder
        if missing := [name for name in wanted if name not in stored]:
            raise MergeError(
                f"{folder}: tensor {missing[0]!r} is missing{_and_more(missing)}; need every tensor of {reference}"
            )
        if extra := [name for name in stored if name not in wanted]:
            raise MergeError(
                f"{folder}: tensor {extra[0]!r} is not in {reference}{_and_more(extra)}; "
                "need the same tensors in all models"
            )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
