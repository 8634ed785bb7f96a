"""Makes the small files of the output: config, tokenizer, chat template, model card."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Final

import torch

from resm_kernels.checkpoint import Auxiliary, CheckpointError, json_bytes, read_chat_template
from resm_kernels.checkpoint.auxiliary import CONFIG_FILE
from resm_kernels.engine.card import model_card_files
from resm_kernels.engine.models import MergeError, OpenedModels
from resm_kernels.engine.token_tables import TokenTables
from resm_kernels.engine.tokenizer import SPECIAL_IDS, OutputTokenizer, tokenizer_files
from resm_kernels.files import parse_object
from resm_kernels.recipe import AUTO, CHAT_TEMPLATES, Recipe

if TYPE_CHECKING:
    from resm_kernels.engine.plan import MergePlan

_GENERATION: Final = "generation_config.json"
_ONE: Final = ("_token_id", "_token_index")
_SPECIAL: Final = re.compile(r"_token_ids?$|_token_index$|^(begin_)?suppress_tokens$")


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
    config = deepcopy(dict(plan.config))
    if plan.format is not None:
        config["quantization_config"] = plan.format.config
    if plan.tables is not None:
        rows = plan.tables.rows(models.reference) if tokenizer is None else tokenizer.rows
        assert rows is not None
        plan.tables.set_sizes(config, rows)
        if tokenizer is not None:
            _move_special(config, tokenizer, plan.tables, models)
    source = models.reference.tokenizer_folder
    copied = tokenizer_files(source) if plan.options.copy_tokenizer and tokenizer is None else {}
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
    if tokenizer is not None and plan.tables is not None and () in plan.tables.sections and _GENERATION in files:
        generation = parse_object(files[_GENERATION], str(folder / _GENERATION), CheckpointError)
        _set_special(generation, tokenizer, tokenizer.known[models.reference.places])
        files[_GENERATION] = json_bytes(generation)
    return {**files, **card}


def _chat_template(recipe: Recipe, models: OpenedModels) -> str | None:
    """Return the template that the recipe asks for; `auto` is the one that most models have, the first of equals."""
    if recipe.chat_template != AUTO:
        return CHAT_TEMPLATES.get(str(recipe.chat_template), recipe.chat_template)
    found = [read_chat_template(model.folder) or read_chat_template(model.base_folder) for model in models.all()]
    counts = Counter(text.strip() for text in found if text)
    return counts.most_common(1)[0][0] if counts else None


def _move_special(
    config: dict[str, Any], tokenizer: OutputTokenizer, tables: TokenTables, models: OpenedModels
) -> None:
    """Set the rows of special tokens, in the sections of a config.json that have some."""
    for path in tables.sections:
        section: Any = config
        for name in path:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            _set_special(section, tokenizer, tokenizer.known[models.reference.places])


def _set_special(config: dict[str, Any], tokenizer: OutputTokenizer, known: Mapping[str, int]) -> None:
    """Change the rows that a configuration states for special tokens to the output's rows.

    Args:
        known: Token → row of the model that the configuration is from.
    """
    tokens = {row: token for token, row in known.items()}

    def moved(row: int, key: str) -> int | None:
        """Return the token's row in the output, or the row of the output tokenizer's `key` if it has no such token.

        A row that is no token's stays if there is none of this name: it may stand for no token, or for an image.
        """
        token = tokens.get(row)
        new = tokenizer.tokens.get(token) if token is not None else None
        new = tokenizer.special.get(key) if new is None and row >= 0 else new
        if new is None and token is not None and key not in SPECIAL_IDS and key.endswith(_ONE):
            raise MergeError(
                f"{CONFIG_FILE}: {key} is the row of {token!r}, which the output's tokenizer lacks; need a tokenizer "
                "that has it (tokenizer_source: union, or an entry under tokenizer.tokens)"
            )
        return row if new is None and token is None else new

    for key in [key for key in config if _SPECIAL.search(key) and not key.startswith("codebook")]:
        if isinstance(config[key], int):
            config[key] = moved(config[key], key)
        elif isinstance(config[key], list):
            rows = [moved(row, key) for row in config[key] if isinstance(row, int)]
            config[key] = list(dict.fromkeys(row for row in rows if row is not None))
