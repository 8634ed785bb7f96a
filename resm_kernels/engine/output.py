"""Makes the small files of the output: config, tokenizer, chat template, model card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Final

import torch

from resm_kernels.checkpoint import Auxiliary, CheckpointError, json_bytes, read_chat_template
from resm_kernels.engine.card import model_card_files
from resm_kernels.engine.layout import LayerOrigin
from resm_kernels.engine.models import MergeError, OpenedModels
from resm_kernels.engine.tokenizer import OutputTokenizer, tokenizer_files
from resm_kernels.files import parse_object
from resm_kernels.recipe import AUTO, CHAT_TEMPLATES, Recipe

if TYPE_CHECKING:
    from resm_kernels.engine.plan import MergePlan

_GENERATION: Final = "generation_config.json"
_COUNTS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
_MODULE_COUNTS: Final = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
_SECTIONS: Final = {"text_decoder": "text_config", "vision_tower": "vision_config", "vision_model": "vision_config"}
# Keys of lists with one entry per layer, and keys of lists of the numbers of the layers of some kind.
_PER_LAYER: Final = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attention_layers")
_LAYER_NUMBERS: Final = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "moe_layers")


def output_files(plan: MergePlan) -> Mapping[str, bytes]:
    """Return the content of `MergePlan.auxiliary_files`; the config states the dtype of most merged weights.

    If no model has a config, as may be for torch DCP folders, it is only the model card.
    """
    recipe, models, tokenizer = plan.recipe, plan.models, plan.tokenizer
    sizes: Counter[torch.dtype] = Counter()
    for job in plan.jobs:
        if not job.copied:
            sizes[job.dtype if job.rounding is None else job.rounding.dtype] += job.output_bytes
    dtype = max(sizes, key=lambda d: sizes[d], default=torch.float32)
    folder = models.reference.base_folder
    card: Mapping[str, bytes] = {}
    if plan.options.model_card and plan.out is not None:
        card = model_card_files(recipe, models, plan.out.name)
    if not models.reference.has_config:
        return card
    config = deepcopy(dict(models.reference.config))
    for module, origins in plan.layout.origins.items():
        _set_layers(config, module, origins, models)
    if plan.format is not None:
        config["quantization_config"] = plan.format.config
    if tokenizer is not None:
        _set_vocabulary(config, tokenizer, models)
    copied = tokenizer_files(folder) if plan.options.copy_tokenizer and tokenizer is None else {}
    form = models.reference.form
    auxiliary = Auxiliary(
        folder,
        copied if tokenizer is None else tokenizer.files,
        _chat_template(recipe, models),
        config,
        form.config_file,
        form.side_files,
    )
    files = dict(auxiliary.files(dtype, everywhere=recipe.output_dtype is not None))
    if tokenizer is not None and _GENERATION in files:
        generation = parse_object(files[_GENERATION], str(folder / _GENERATION), CheckpointError)
        _set_special(generation, tokenizer, tokenizer.known[folder])
        files[_GENERATION] = json_bytes(generation)
    return {**files, **card}


def _chat_template(recipe: Recipe, models: OpenedModels) -> str | None:
    """Return the template that the recipe asks for; `auto` is the one that most models have, the first of equals."""
    if recipe.chat_template != AUTO:
        return CHAT_TEMPLATES.get(str(recipe.chat_template), recipe.chat_template)
    folders = dict.fromkeys(model.base_folder for model in models.all())
    counts = Counter(text.strip() for text in map(read_chat_template, folders) if text)
    return counts.most_common(1)[0][0] if counts else None


def _set_layers(
    config: dict[str, Any], module: str | None, origins: Sequence[LayerOrigin], models: OpenedModels
) -> None:
    """Set the number of layers, and in lists with one entry per layer the entry of each layer's origin."""
    keys = _MODULE_COUNTS.get(str(module), _COUNTS)
    section = _section(config, module, keys)
    if section is None:
        raise MergeError(
            f"{models.reference.folder / 'config.json'}: states no number of layers{f' of {module}' if module else ''} "
            f"({', '.join(keys)}); need an entry, which becomes {len(origins)}"
        )
    for key in keys:
        if key in section:
            section[key] = len(origins)
    for key in _PER_LAYER:
        if isinstance(section.get(key), list):
            section[key] = [_layer_entry(origin, module, keys, key) for origin in origins]
    for key in _LAYER_NUMBERS:
        if isinstance(section.get(key), list):
            sections = [_section(dict(origin.model.config), module, keys) or {} for origin in origins]
            numbers = [_list_entry(part, key) for part in sections]
            section[key] = [i for i, origin in enumerate(origins) if origin.number in numbers[i]]


def _section(config: dict[str, Any], module: str | None, keys: Sequence[str]) -> dict[str, Any] | None:
    """Return the part of a config that states the module's number of layers."""
    nested = config.get(_SECTIONS.get(str(module), "text_config"))
    parts = [nested, config] if module is not None else [config, nested]
    return next((p for p in parts if isinstance(p, dict) and any(key in p for key in keys)), None)


def _list_entry(section: Mapping[str, Any], key: str) -> Sequence[Any]:
    entry = section.get(key)
    return entry if isinstance(entry, list) else ()


def _layer_entry(origin: LayerOrigin, module: str | None, keys: Sequence[str], key: str) -> Any:
    """Return the origin's entry in the list `key` of its model's config."""
    entries = (_section(dict(origin.model.config), module, keys) or {}).get(key)
    if not isinstance(entries, list) or origin.number >= len(entries):
        raise MergeError(
            f"{origin.model.folder / 'config.json'}: {key} has no entry for layer {origin.number}; the output's needs "
            "an entry for every layer"
        )
    return entries[origin.number]


def _set_vocabulary(config: dict[str, Any], tokenizer: OutputTokenizer, models: OpenedModels) -> None:
    """Set the number of the embedding's rows, and the rows of special tokens."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            if "vocab_size" in part:
                part["vocab_size"] = tokenizer.rows
            _set_special(part, tokenizer, tokenizer.known[models.reference.base_folder])


def _set_special(config: dict[str, Any], tokenizer: OutputTokenizer, known: Mapping[str, int]) -> None:
    """Change the rows that a configuration states for special tokens to the output's rows.

    Args:
        known: Token → row of the model that the configuration is from.
    """
    tokens = {row: token for token, row in known.items()}

    def moved(row: int, key: str) -> int | None:
        """Return the token's row in the output, or the row of the output tokenizer's `key` if it has no such token."""
        new = tokenizer.tokens.get(tokens.get(row, ""))
        return tokenizer.special.get(key) if new is None else new

    for key in [key for key in config if key.endswith("_token_id")]:
        if isinstance(config[key], int):
            config[key] = moved(config[key], key)
        elif isinstance(config[key], list):
            rows = [moved(row, key) for row in config[key] if isinstance(row, int)]
            config[key] = list(dict.fromkeys(row for row in rows if row is not None))
