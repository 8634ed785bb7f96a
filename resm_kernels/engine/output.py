"""The small files of the output: config for its layers and vocabulary, tokenizer, chat template, model card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

import torch

from resm_kernels.checkpoint import Auxiliary, json_bytes, read_chat_template
from resm_kernels.engine.card import card
from resm_kernels.engine.layout import LayerOrigin, Layout
from resm_kernels.engine.models import MergeError, OpenedModels
from resm_kernels.engine.tokenizer import OutputTokenizer
from resm_kernels.recipe import AUTO, CHAT_TEMPLATES, Recipe

_GENERATION: Final = "generation_config.json"
_COUNTS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
_MODULE_COUNTS: Final = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
_SECTIONS: Final = {"text_decoder": "text_config", "vision_tower": "vision_config", "vision_model": "vision_config"}
# Lists with an entry for each layer, and lists of the layers that are of some kind.
_PER_LAYER: Final = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attention_layers")
_LAYER_NUMBERS: Final = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "moe_layers")


def output_files(
    recipe: Recipe,
    models: OpenedModels,
    layout: Layout,
    tokenizer: OutputTokenizer | None,
    dtype: torch.dtype,
    *,
    copy_tokenizer: bool,
    model_card: str | None,
) -> Mapping[str, bytes]:
    """Return file name → content of everything but the weights.

    Args:
        dtype: Of most weights.
        copy_tokenizer: False leaves the tokenizer's files out if the recipe asks for none.
        model_card: Title of the model card; None writes none.
    """
    folder = models.reference.base_folder
    config = deepcopy(dict(models.reference.config))
    for module, origins in layout.origins.items():
        _set_layers(config, module, origins, models)
    if tokenizer is not None:
        _set_vocabulary(config, tokenizer, models)
    files = dict(
        Auxiliary(
            folder,
            folder if tokenizer is None and copy_tokenizer else {} if tokenizer is None else tokenizer.files,
            _chat_template(recipe, models),
            config,
        ).files(dtype, everywhere=recipe.output_dtype is not None)
    )
    if tokenizer is not None and _GENERATION in files:
        generation = json.loads(files[_GENERATION])
        _set_special(generation, tokenizer, tokenizer.known[folder])
        files[_GENERATION] = json_bytes(generation)
    if model_card is not None:
        files |= card(recipe, models, model_card)
    return files


def _chat_template(recipe: Recipe, models: OpenedModels) -> str | None:
    """The template that the recipe asks for; `auto`: the one that most models have, the first of equals."""
    if recipe.chat_template != AUTO:
        return CHAT_TEMPLATES.get(str(recipe.chat_template), recipe.chat_template)
    folders = dict.fromkeys(model.base_folder for model in models.all())
    found = Counter(text.strip() for text in map(read_chat_template, folders) if text)
    return found.most_common(1)[0][0] if found else None


def _set_layers(
    config: dict[str, Any], module: str | None, origins: Sequence[LayerOrigin], models: OpenedModels
) -> None:
    """State the number of layers, and the entries of lists that have one for each layer, as the layers' models do."""
    keys = _MODULE_COUNTS.get(str(module), _COUNTS)
    section = _section(config, module, keys)
    if section is None:
        raise MergeError(
            f"{models.reference.folder / 'config.json'}: states no number of layers{f' of {module}' if module else ''} "
            f"({', '.join(keys)}); it has to be changed to {len(origins)}"
        )
    for key in keys:
        if key in section:
            section[key] = len(origins)
    for key in _PER_LAYER:
        if isinstance(section.get(key), list):
            section[key] = [_of_layer(origin, module, keys, key) for origin in origins]
    for key in _LAYER_NUMBERS:
        if isinstance(section.get(key), list):
            section[key] = [
                i
                for i, origin in enumerate(origins)
                if origin.number in (_section(dict(origin.model.config), module, keys) or {}).get(key, ())
            ]


def _section(config: dict[str, Any], module: str | None, keys: Sequence[str]) -> dict[str, Any] | None:
    """The part of a config that states the module's number of layers."""
    nested = config.get(_SECTIONS.get(str(module), "text_config"))
    parts = [nested, config] if module is not None else [config, nested]
    return next((p for p in parts if isinstance(p, dict) and any(key in p for key in keys)), None)


def _of_layer(origin: LayerOrigin, module: str | None, keys: Sequence[str], key: str) -> Any:
    own = (_section(dict(origin.model.config), module, keys) or {}).get(key)
    if not isinstance(own, list) or origin.number >= len(own):
        raise MergeError(
            f"{origin.model.folder / 'config.json'}: {key} says nothing of layer {origin.number}; the output's needs "
            "an entry for every layer"
        )
    return own[origin.number]


def _set_vocabulary(config: dict[str, Any], tokenizer: OutputTokenizer, models: OpenedModels) -> None:
    """State the rows of the embedding, and the rows of special tokens where they have moved."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            if "vocab_size" in part:
                part["vocab_size"] = tokenizer.rows
            _set_special(part, tokenizer, tokenizer.known[models.reference.base_folder])


def _set_special(config: dict[str, Any], tokenizer: OutputTokenizer, known: Mapping[str, int]) -> None:
    tokens = {row: token for token, row in known.items()}

    def moved(row: int, key: str) -> int | None:
        """The token's row in the output; that of the output tokenizer's own such token if it has not this one."""
        new = tokenizer.tokens.get(tokens.get(row, ""))
        return tokenizer.special.get(key) if new is None else new

    for key in [key for key in config if key.endswith("_token_id")]:
        if isinstance(config[key], int):
            config[key] = moved(config[key], key)
        elif isinstance(config[key], list):
            rows = [moved(row, key) for row in config[key]]
            config[key] = list(dict.fromkeys(row for row in rows if row is not None))
