"""Reads from a tensor's name its layer, its module, and whether it is vocabulary.

All rules of this library about what a name means stand here; `engine.spelling_rules` says which names mean the same. A
checkpoint names a tensor by its modules, joined with dots, and the parameter: `model.layers.3.mlp.up_proj.weight` is
the parameter `weight` of the module `model.layers.3.mlp.up_proj`, whose last part is `up_proj`. The rules agree with
all of mergekit's architecture definitions but phi-1's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

OUTPUT_HEAD: Final = "lm_head.weight"
"""The output head in transformers' models; the tensor that a model with tied embeddings does not store."""

EMBEDDING_MODULES: Final = (
    "embed_tokens",
    "embed_positions",
    "wte",
    "wpe",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "shared",
    "embed_in",
    "tok_embeddings",
)
"""Last parts of the names of modules whose rows are looked up (`torch.nn.Embedding`): by token, position or type."""

HEAD_MODULES: Final = ("lm_head", "embed_out", "output_embeddings")
"""Last parts of the names of modules that turn the last hidden state into one value for each token."""

# No number of a layer has more digits than these; a longer one, up to any length, is a name like others.
_NUMBER: Final = re.compile(r"(?:^|\.)(\d{1,9})\.")
_TIED_MODULES: Final = ("embed_tokens", "wte")

_LAYER: Final = re.compile(r"(.*?(?:^|\.)(?:layers|layer|h|blocks|block)\.)(\d{1,9})(\..*)")
# Parts of names are matched one by one: an expression for the whole name would take time in the square of its length.
_BEFORE_LAYERS: Final = re.compile(r"wte|wpe|shared|conv\d|patch_conv|ln_pre|layernorm_pre|rotary_\w+|relative_pe")
_EMBEDDING: Final = re.compile(r"embed(?!_out)")
_WORD: Final = re.compile(r"\w+")
_VOCABULARY: Final = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|(?:word|tok)_embeddings|embed_in|shared|embed_out|output|output_layer|lm_head"
    r"|lm_head\.(?:linear|decoder)|cls\.predictions(?:\.decoder)?|vocab_projector|backbone\.embeddings)"
    r"\.(?:weight|bias)$"
)
_IMAGE_MODULES: Final = {
    "multi_modal_projector": re.compile(
        r"(?:^|\.)(?:multi_modal_projector|visual\.(?:merger|deepstack_merger_list))\."
    ),
    "vision_tower": re.compile(r"(?:^|\.)(?:vision_tower|visual)\."),
    "vision_model": re.compile(r"(?:^|\.)vision_model\."),
}
_ENCODER_DECODER: Final = {
    "encoder": re.compile(r"^(?:model\.)?encoder\."),
    "decoder": re.compile(r"^(?:(?:model\.)?decoder|proj_out)\."),
}


class LayerPosition(NamedTuple):
    """The layer of a tensor: `stack` + `number` + `rest` is its name."""

    stack: str
    number: int
    rest: str

    @property
    def unnumbered(self) -> str:
        """The tensor's name without the number of its layer."""
        return self.stack + self.rest


class ModuleKind(NamedTuple):
    """The kind of a tensor's module, and the number of its layer (None outside the layers)."""

    kind: str
    layer: int | None


def module_kind(name: str) -> ModuleKind:
    """Return the kind and the layer of a tensor: `model.layers.3.mlp.up_proj.weight` is an up_proj in layer 3.

    The kind of a numbered module is the name of its list and the number. Where `layer_position` knows no layer stack,
    the first number in a name counts as the layer, so that models of other stacks have layers too.
    """
    position, first = layer_position(name), _NUMBER.search(name)
    parts = name.split(".")
    kind = parts[-2:-1] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1:]
    if kind[0].isdigit() and len(parts) > 2:
        kind = parts[-3:-1]
    suffix = ".bias" if parts[-1] == "bias" else ""
    layer = position.number if position is not None else int(first[1]) if first is not None else None
    return ModuleKind(".".join(kind) + suffix, layer)


def layer_position(name: str) -> LayerPosition | None:
    """Return the layer that a tensor belongs to, or None if it is outside all layers.

    A layer stack is the first list in a name that is called `layers`, `layer`, `h`, `blocks` or `block`, with the
    modules before it. A vision tower and a text model in one checkpoint therefore have different stacks.
    """
    match = _LAYER.match(name)
    return None if match is None else LayerPosition(match[1], int(match[2]), match[3])


def unnumbered(name: str) -> str:
    """Return a tensor's name without the number of its layer, the same in all layers."""
    position = layer_position(name)
    return name if position is None else position.unnumbered


def layer_depth(number: int, layers: int) -> float:
    """Return the depth of a layer among `layers`: 0 for the first, 1 for the last, and 1 for the only one."""
    return number / (layers - 1) if layers > 1 else 1.0


def tensor_depths(names: Iterable[str]) -> dict[str, float]:
    """Return the depth of each tensor in its layer stack (see `layer_depth`); tensors outside all layers have 0."""
    positions = {name: layer_position(name) for name in names}
    last: dict[str, int] = {}
    for position in filter(None, positions.values()):
        last[position.stack] = max(position.number, last.get(position.stack, 0))
    return {
        name: 0.0 if position is None else layer_depth(position.number, last[position.stack] + 1)
        for name, position in positions.items()
    }


def is_before_layers(name: str) -> bool:
    """Return True if a tensor outside the layers is used before them (embeddings), False if after (last norm, head)."""
    return any(
        _BEFORE_LAYERS.fullmatch(part) or (_EMBEDDING.search(part) and _WORD.fullmatch(part))
        for part in name.split(".")
    )


def is_vocabulary(name: str) -> bool:
    """Return True if the tensor has a row for each token: input embedding, output head, or the head's bias."""
    return _VOCABULARY.search(name) is not None and layer_position(name) is None


def is_tied_embedding(name: str) -> bool:
    """Return True for a tensor of the modules `embed_tokens` and `wte`, which models tie their `lm_head` to.

    This rule knows fewer names than `is_vocabulary`, because it is used to conclude that a model without
    `OUTPUT_HEAD` has tied embeddings. T5's `shared` and GPT-NeoX' `embed_in` do not allow this conclusion: their heads
    have other names.
    """
    return last_part(module_of(name)) in _TIED_MODULES


def is_tied_vocabulary(name: str) -> bool:
    """Return True for tensors that are one tensor in a model with tied embeddings: `is_tied_embedding` or `lm_head`.

    Adapters on these are refused if the base model ties them. Nothing is known about ties of the
    other names of `is_vocabulary`, so adapters on them are accepted.
    """
    return is_tied_embedding(name) or last_part(module_of(name)) == "lm_head"


def is_weight(name: str) -> bool:
    """Return True if the tensor is a weight or belongs to a quantised one; such a tensor must not hold integers."""
    parameter = last_part(name)
    return "weight" in parameter or parameter in ("qzeros", "g_idx")


def is_embedding_module(module: str) -> bool:
    """Return True if the module's name (without `.weight`) ends in one of `EMBEDDING_MODULES`."""
    return last_part(module) in EMBEDDING_MODULES


def is_embedding_or_head(module: str) -> bool:
    """Return True if the module's name (without `.weight`) ends in one of `EMBEDDING_MODULES` or `HEAD_MODULES`."""
    return last_part(module) in EMBEDDING_MODULES + HEAD_MODULES


def module_of(name: str) -> str:
    """Return the name of a tensor's module: everything before the last dot."""
    return name.rpartition(".")[0]


def last_part(name: str) -> str:
    """Return the part of a name after its last dot."""
    return name.rsplit(".", 1)[-1]


def module_names(names: Iterable[str]) -> dict[str, str]:
    """Return for each tensor the part of the model that it belongs to, as recipes name these parts under `modules`.

    Models with images have text_decoder, multi_modal_projector, and vision_tower or vision_model. Models that encode
    and decode have encoder, decoder, and shared for the tensors that belong to neither. All other models have one
    part, default.
    """
    names = list(names)
    patterns = _IMAGE_MODULES
    remaining = "text_decoder"
    if not any(pattern.search(name) for pattern in _IMAGE_MODULES.values() for name in names):
        has_both = all(any(pattern.search(name) for name in names) for pattern in _ENCODER_DECODER.values())
        patterns, remaining = (_ENCODER_DECODER, "shared") if has_both else ({}, "default")
    return {
        name: next((part for part, pattern in patterns.items() if pattern.search(name)), remaining) for name in names
    }
