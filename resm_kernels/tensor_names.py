"""What a tensor's name says about it: its layer and layer stack, its module of the model, whether it is vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

OUTPUT_HEAD: Final = "lm_head.weight"

_LAYER: Final = re.compile(r"(.*?(?:^|\.)(?:layers|layer|h|blocks|block)\.)(\d+)(\..*)")
_BEFORE: Final = re.compile(
    r"(?:^|\.)(?:\w*embed(?!_out)\w*|wte|wpe|shared|conv\d|patch_conv|ln_pre|layernorm_pre|rotary_\w+|relative_pe)(?:\.|$)"
)
_MODULES: Final = {
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


_VOCABULARY: Final = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|(?:word|tok)_embeddings|embed_in|shared|embed_out|output|output_layer|lm_head"
    r"|lm_head\.(?:linear|decoder)|cls\.predictions(?:\.decoder)?|vocab_projector|backbone\.embeddings)"
    r"\.(?:weight|bias)$"
)


class LayerPlace(NamedTuple):
    """Where in a stack of layers a tensor is: `stack` + `number` + `rest` is its name."""

    stack: str
    number: int
    rest: str


def layer_place(name: str) -> LayerPlace | None:
    """Return the layer a tensor belongs to, None outside any.

    A layer stack is what a name's first numbered `layers`, `layer`, `h`, `blocks` or `block` counts, so that a vision
    tower and a text model in one checkpoint have stacks of their own.
    """
    match = _LAYER.match(name)
    return None if match is None else LayerPlace(match[1], int(match[2]), match[3])


def is_vocabulary(name: str) -> bool:
    """True if the tensor has a row for each token of the vocabulary: input embedding, output head, its bias."""
    return _VOCABULARY.search(name) is not None and layer_place(name) is None


def is_before_layers(name: str) -> bool:
    """True if a tensor outside the layers is used before them (embeddings), False if after (last norm, head)."""
    return _BEFORE.search(name) is not None


def tensor_depths(names: Iterable[str]) -> dict[str, float]:
    """Return each tensor's depth: layer / (layers − 1) of its layer stack, 1 if that has one layer, 0 outside any."""
    places = {name: layer_place(name) for name in names}
    last: dict[str, int] = {}
    for place in filter(None, places.values()):
        last[place.stack] = max(place.number, last.get(place.stack, 0))
    return {
        name: 0.0 if place is None else layer_depth(place.number, last[place.stack] + 1)
        for name, place in places.items()
    }


def layer_depth(number: int, layers: int) -> float:
    """Depth of a layer among `layers`: 0 for the first, 1 for the last and for the only one."""
    return number / (layers - 1) if layers > 1 else 1.0


def module_names(names: Iterable[str]) -> dict[str, str]:
    """Return each tensor's module, as recipes name them under `modules`.

    Models with images have text_decoder, multi_modal_projector and vision_tower or vision_model; models that encode
    and decode have encoder, decoder and (what is in neither) shared; all others have one module, default.
    """
    names = list(names)
    patterns = _MODULES
    rest = "text_decoder"
    if not any(pattern.search(name) for pattern in _MODULES.values() for name in names):
        both = all(any(pattern.search(name) for name in names) for pattern in _ENCODER_DECODER.values())
        patterns, rest = (_ENCODER_DECODER, "shared") if both else ({}, "default")
    return {name: next((m for m, pattern in patterns.items() if pattern.search(name)), rest) for name in names}
