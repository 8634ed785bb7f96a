"""Makes the configuration of a model whose layers are stacked anew: what each layer is must be what its origin is.

Configurations say of each layer what it is in lists, by the numbers of some layers, or by numbers from which the
model's class derives it (every fourth layer has no window). Lists are written with each layer's own entry. Where
transformers has the model's class, the class is built without weights from the new configuration, and each of its
layers is compared with the layer that the weights come from.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

from resm_kernels.checkpoint.auxiliary import CONFIG_FILE
from resm_kernels.engine.architecture import Architecture, find_architecture, names_key
from resm_kernels.engine.layout import LayerOrigin, Layout
from resm_kernels.engine.models import MergeError, Model, OpenedModels
from resm_kernels.tensor_names import LayerPosition, layer_position

_COUNTS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
_MODULE_COUNTS: Final = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "num_layers"),
}
_SECTIONS: Final = {
    None: ("text_config",),
    "text_decoder": ("text_config",),
    "vision_tower": ("vision_config",),
    "vision_model": ("vision_config",),
    "encoder": ("encoder", "text_config"),
    "decoder": ("decoder", "text_config"),
}
"""Sections of configurations that may state the number of a module's layers."""

_PER_LAYER: Final = re.compile(
    r"\w*_types|layers_block_type|no_rope_layers|attention_layers|attn_type_list|\w*_pattern|intermediate_size"
    r"|num_(query|kv|key_value|attention)_heads|ffn_multipliers|\w*_per_layer|layer_\w+"
)
"""Lists, or texts, with one entry or letter for each layer, if there are as many of them as layers."""

_NUMBERS: Final = re.compile(
    r"mlp_only_layers|full_attn_idxs|moe_layers|cross_attention_layers|\w*layer_(ids|indices|indexes)|rope_scaling_layers"
    r"|slstm_at|(dense|global|local|swa|attn)_(attn_)?layers"
)
"""Lists of the numbers of layers of one kind."""

_FIRST_LAYERS: Final = ("first_k_dense_replace", "num_dense_layers")
"""How many of the first layers are of another kind than all others."""

_BY_NUMBER: Final = {
    "scale_attn_by_inverse_layer_idx": "its attention is scaled",
    "hidden_size_per_layer_input": "it takes its part of the embedding for all layers",
}
"""Entries that give something to layers by their numbers (GPT-2, Gemma 3n), and what that is."""

_OWN_NUMBER: Final = re.compile(r"(layer|block)_?(idx|id|index|number|num)|idx|\w*_layer_(idx|index)")
"""Attributes of modules that hold the number of their layer."""

_REASON: Final = 200
"""The most letters of a class's reason that an error shows."""

_PLAIN: Final = (bool, int, float, str, type(None))


def stacked_config(layout: Layout, models: OpenedModels) -> dict[str, Any]:
    """Return the content of config.json for the output; it is the reference model's if no layers are stacked anew.

    Raises:
        MergeError: The configuration cannot say of each layer what the layer is that its weights come from.
    """
    config = deepcopy(dict(models.reference.config))
    if not models.reference.has_config:
        return config
    stacks = [_Stack(config, module, origins, models.reference) for module, origins in layout.origins.items()]
    architectures: dict[str, Architecture | None] = {}
    if any(stack.is_changed for stack in stacks):
        for model in models.all():
            key = names_key(model.config)
            if key not in architectures:
                architectures[key] = find_architecture(model.base_folder, model.config)
    known = {key: found for key, found in architectures.items() if found is not None}
    if len(known) < len(architectures):
        known = {}
    for stack in stacks:
        stack.write(known)
    if known:
        names = [tensor.name for tensor in layout.tensors]
        for stack in stacks:
            stack.check(known, names)
    return config


class _Stack:
    """The layers of one module of the output.

    Args:
        config: The configuration to change: so far that of the reference model.
        module: The module's name in the recipe; None for the whole model.
        origins: The layer that each of the output's layers comes from.
        reference: The reference model.

    Attributes:
        is_changed: True if the layers are not those of the reference model's configuration in their order.

    Raises:
        MergeError: The configuration states no number of layers.
    """

    def __init__(
        self, config: dict[str, Any], module: str | None, origins: Sequence[LayerOrigin], reference: Model
    ) -> None:
        self._config, self._module, self._origins, self._reference = config, module, origins, reference
        self._counts = _MODULE_COUNTS.get(str(module), _COUNTS)
        self._path = self._section_path()
        self._section: dict[str, Any] = functools.reduce(dict.__getitem__, self._path, config)
        self._layers = next(self._section[key] for key in self._counts if key in self._section)
        own = names_key(reference.config)
        self.is_changed = len(origins) != self._layers or any(
            origin.number != i or names_key(origin.model.config) != own for i, origin in enumerate(origins)
        )

    def _section_path(self) -> tuple[str, ...]:
        """Return the section of the configuration that states the module's number of layers."""
        nested = [(name,) for name in _SECTIONS.get(self._module, (f"{self._module}_config", "text_config"))]
        for path in [*nested, ()] if self._module is not None else [(), *nested]:
            section = self._config.get(path[0]) if path else self._config
            if isinstance(section, dict) and any(isinstance(section.get(key), int) for key in self._counts):
                return path
        of = f" of {self._module}" if self._module else ""
        raise MergeError(
            f"{self._reference.folder / CONFIG_FILE}: states no number of layers{of} ({', '.join(self._counts)}); need "
            f"an entry, which becomes {len(self._origins)}"
        )

    def write(self, known: Mapping[str, Architecture]) -> None:
        """Set the number of layers, and every entry that says of single layers what they are.

        Args:
            known: What transformers knows about the models, by `names_key`; empty if it does not know all of them.
        """
        reference = self._entries(self._reference, known)
        for key in self._counts:
            if key in self._section:
                self._section[key] = len(self._origins)
        for key, value in reference.items():
            if not isinstance(value, (list, tuple, str)) or not (key in self._section or known):
                continue
            if _NUMBERS.fullmatch(key) and not isinstance(value, str):
                numbers = [self._numbers(origin, key, known) for origin in self._origins]
                self._set(key, [i for i, o in enumerate(self._origins) if o.number in numbers[i]], known)
            elif _PER_LAYER.fullmatch(key) and len(value) == self._layers:
                entries = [self._entry(origin, key, known) for origin in self._origins]
                if key in self._section or any(entry != entries[0] for entry in entries):
                    self._set(key, "".join(entries) if isinstance(value, str) else entries, known)
        for key, value in self._derived([self._entries(origin.model, known) for origin in self._origins]).items():
            self._set(key, value, known)

    def _set(self, key: str, value: Any, known: Mapping[str, Architecture]) -> None:
        """Set an entry, under each of the names that it has in the file."""
        names = [key]
        if known:
            parsed = functools.reduce(getattr, self._path, known[names_key(self._reference.config)].config)
            names += [alias for alias, name in parsed.attribute_map.items() if name == key]
        for name in [name for name in names if name in self._section] or [key]:
            self._section[name] = value

    def _entries(self, model: Model, known: Mapping[str, Architecture]) -> Mapping[str, Any]:
        """Return the entries of the module's section of a model's configuration, with those that its class derives."""
        section: Any = model.config
        for name in self._path:
            section = section.get(name)
        stored: Mapping[str, Any] = section if isinstance(section, Mapping) else {}
        if not known:
            return stored
        parsed = functools.reduce(getattr, self._path, known[names_key(model.config)].config)
        # A text of the file's, such as a pattern of letters, may be no entry of the class.
        return {**{key: value for key, value in stored.items() if isinstance(value, str)}, **vars(parsed)}

    def _numbers(self, origin: LayerOrigin, key: str, known: Mapping[str, Architecture]) -> Sequence[int]:
        entry = self._entries(origin.model, known).get(key)
        return entry if isinstance(entry, (list, tuple)) else ()

    def _entry(self, origin: LayerOrigin, key: str, known: Mapping[str, Architecture]) -> Any:
        """Return the origin's entry in the list `key` of its model's configuration."""
        entries = self._entries(origin.model, known).get(key)
        if not isinstance(entries, (list, tuple, str)) or origin.number >= len(entries):
            raise MergeError(
                f"{origin.model.folder / CONFIG_FILE}: {key} has no entry for layer {origin.number}; the output's "
                "needs an entry for every layer"
            )
        return entries[origin.number]

    def _derived(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the entries from which classes derive what a layer is, where other values fit the output's layers.

        Args:
            entries: For each layer of the output the configuration of the model that it comes from.
        """
        numbers = [origin.number for origin in self._origins]
        found: dict[str, Any] = {}

        def flags(keys: Sequence[str], rule: Callable[..., bool]) -> list[bool] | None:
            """Return for each layer what the rule says of it; None if an entry is missing."""
            if any(not isinstance(section.get(key), (int, list)) for section in entries for key in keys):
                return None
            return [rule(n, *map(section.get, keys)) for n, section in zip(numbers, entries, strict=True)]

        for key in _FIRST_LAYERS:
            first = flags([key], lambda n, count: n < count)
            if first is not None:
                found[key] = next((i for i, flag in enumerate(first) if not flag), len(first))
        sparse = flags(
            ["decoder_sparse_step", "mlp_only_layers"], lambda n, step, dense: n not in dense and (n + 1) % step == 0
        )
        if sparse is not None:
            found |= {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, flag in enumerate(sparse) if not flag]}
        experts = flags(
            ["moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"],
            lambda n, step, first, last: (n + 1) % step == 0 and first <= n <= last,
        )
        if experts is not None:
            inside = [i for i, flag in enumerate(experts) if flag] or [len(experts)]
            step = inside[1] - inside[0] if len(inside) > 1 else 1
            found |= {
                "moe_layer_interval": step,
                "moe_layer_start_index": inside[0],
                "moe_layer_end_index": inside[-1],
            }
        for kind in ("attn_layer", "expert_layer"):
            period, offset = f"{kind}_period", f"{kind}_offset"
            periodic = flags([period, offset], lambda n, p, o: n % p == o)
            if periodic is not None:
                inside = [i for i, flag in enumerate(periodic) if flag]
                count = len(periodic) + 1
                found[period] = inside[1] - inside[0] if len(inside) > 1 else count
                found[offset] = inside[0] if inside else count - 1
        if all(isinstance(section.get("attention_layers"), list) for section in entries) and entries:
            kinds = [section["attention_layers"][n] for n, section in zip(numbers, entries, strict=True)]
            found["attention_types"] = [[[kind], 1] for kind in kinds]
        if all(isinstance(section.get("block_types"), (list, tuple)) for section in entries) and entries:
            cycles = [section["block_types"] for section in entries]
            found["block_types"] = [c[n % len(c)] for n, c in zip(numbers, cycles, strict=True)]
        return {key: value for key, value in found.items() if self.is_changed}

    def check(self, known: Mapping[str, Architecture], names: Sequence[str]) -> None:
        """Compare each layer of the output, as its class makes it, with the layer that it comes from.

        Args:
            known: What transformers knows about the models, by `names_key`.
            names: The names of the output's tensors.

        Raises:
            MergeError: They differ in what a class sets layer by layer.
        """
        if not self._origins:
            return
        own = known[names_key(self._reference.config)]
        place = self._reference.folder / CONFIG_FILE
        try:
            output = own.with_config(self._config)
        except Exception as error:  # whatever a class does with a configuration that it does not take
            reason = " ".join(str(error).split())[:_REASON]
            raise MergeError(
                f"{place}: its class takes no configuration of these layers ({reason}); choose other layers"
            ) from error
        self._check_moved(functools.reduce(getattr, self._path, output.config))
        stack = self._stack(own, self._origins[0])
        made = _signatures(output.layers(stack))
        sources: dict[str, list[dict[str, Any]]] = {}
        for origin in self._origins:
            key = names_key(origin.model.config)
            if key not in sources:
                sources[key] = _signatures(known[key].layers(self._stack(known[key], origin)))
        varying = set().union(*map(_varying, (made, *sources.values())))
        for i, origin in enumerate(self._origins):
            needed = sources[names_key(origin.model.config)][origin.number]
            for key in sorted(varying):
                if made[i].get(key) != needed.get(key):
                    raise MergeError(
                        f"{place}: cannot say that layer {i} is what layer {origin.number} of {origin.model.folder} "
                        f"is: there {key} is {needed.get(key)}, in the output {made[i].get(key)}; choose other layers"
                    )
        self._check_tied(known, output, stack)
        shapes = own.shapes
        for name, shape in output.shapes.items():
            if layer_position(name) is None and shapes.get(name, shape) != shape:
                raise MergeError(
                    f"{place}: {name!r} has a part for each layer, which would have to be stacked too: its shape is "
                    f"{shapes[name]}, the output needs {shape}; choose as many layers as the model has"
                )
        for name in output.missing(names):
            position = layer_position(name)
            if position is not None and position.stack == stack and not self._was_missing(known, position):
                raise MergeError(
                    f"{place}: the output's layers need {name!r}, which no layer that they come from stores; choose "
                    "other layers"
                )

    def _was_missing(self, known: Mapping[str, Architecture], position: LayerPosition) -> bool:
        """Return True if the model that a layer comes from lacks the tensor itself."""
        origin = self._origins[position.number]
        architecture = known[names_key(origin.model.config)]
        name = f"{self._stack(architecture, origin)}{origin.number}{position.rest}"
        return name in architecture.missing(origin.model.reader.tensors)

    def _stack(self, architecture: Architecture, origin: LayerOrigin) -> str:
        """Return the name of the layers' stack in the loaded model."""
        position = layer_position(architecture.loaded_name(origin.tensor))
        if position is None:
            raise MergeError(f"{origin.model.folder}: tensor {origin.tensor!r} is in no layer of the loaded model")
        return position.stack

    def _check_moved(self, section: Any) -> None:
        """Refuse layers with other numbers if something beside their own weights goes by the number."""
        moved = next((i for i, origin in enumerate(self._origins) if origin.number != i), None)
        for key, why in _BY_NUMBER.items():
            if moved is not None and getattr(section, key, None):
                origin = self._origins[moved]
                raise MergeError(
                    f"{origin.model.folder}: layer {origin.number} cannot become layer {moved}, because {why} by its "
                    f"number ({key}); choose other layers"
                )

    def _check_tied(self, known: Mapping[str, Architecture], output: Architecture, stack: str) -> None:
        """Refuse layers that share weights in the output and do not where they come from."""
        for copy, original in output.tied.items():
            places = [layer_position(name) for name in (copy, original)]
            if any(place is None or place.stack != stack for place in places):
                continue
            sources = set()
            for place in places:
                assert place is not None
                origin = self._origins[place.number]
                architecture = known[names_key(origin.model.config)]
                name = f"{self._stack(architecture, origin)}{origin.number}{place.rest}"
                sources.add((origin.model.places, architecture.tied.get(name, name)))
            if len(sources) > 1:
                raise MergeError(
                    f"{self._reference.folder / CONFIG_FILE}: {copy!r} and {original!r} of the output share their "
                    "weights, but come from layers that do not; choose other layers"
                )


def _signatures(layers: Sequence[Any]) -> list[dict[str, Any]]:
    """Return for each layer what its class has set in it: classes of modules, plain attributes, shapes of weights."""
    return [dict(_signature(layer)) for layer in layers]


def _signature(layer: Any) -> Iterator[tuple[str, Any]]:
    for name, module in layer.named_modules():
        yield name or "the layer's class", type(module).__name__
        for key, value in vars(module).items():
            plain = isinstance(value, _PLAIN) or (
                isinstance(value, (list, tuple)) and all(isinstance(entry, _PLAIN) for entry in value)
            )
            if plain and not key.startswith("_") and not _OWN_NUMBER.fullmatch(key):
                yield f"{name}.{key}".lstrip("."), value
    for name, weight in layer.named_parameters():
        yield f"the shape of {name}", tuple(weight.shape)


def _varying(signatures: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return what is not the same in all layers."""
    keys = {key for signature in signatures for key in signature}
    return {key for key in keys if any(s.get(key) != signatures[0].get(key) for s in signatures)}
