"""The files of a PEFT adapter folder, and the entries of its `adapter_config.json`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.checkpoint.auxiliary import config_entry
from resm_kernels.checkpoint.forms import ADAPTER_FILE
from resm_kernels.files import NamePatterns, expanded, read_object, shortened
from resm_kernels.tensor_names import OUTPUT_HEAD, is_tied_embedding

CONFIG_FILE: Final = ADAPTER_FILE
WEIGHTS_FILE: Final = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE: Final = "adapter_model.bin"
"""The file of the weights of adapters that older versions of PEFT saved."""
PREFIX: Final = "base_model.model."
"""PEFT puts this prefix before the names that tensors have in the base model."""

CONV1D_MODELS: Final = ("gpt2", "openai-gpt", "imagegpt")
"""Model types whose linear layers store their weight as (in, out)."""

# These entries do not change the meaning of the stored tensors, or are read. Any other entry that is set could change
# it, so it is refused.
_NEUTRAL: Final = frozenset(
    (
        *("alpha", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
        *("decompose_both", "decompose_factor", "ensure_weight_tying", "eva_config", "exclude_modules"),
        *("fan_in_fan_out", "inference_mode", "init_lora_weights", "init_weights", "layers_pattern"),
        *("layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config"),
        *("megatron_config", "megatron_core", "module_dropout", "modules_to_save", "peft_type", "peft_version"),
        *("qalora_group_size", "r", "rank_dropout", "rank_dropout_scale", "rank_pattern", "revision"),
        *("runtime_config", "target_modules", "target_parameters", "task_type", "token_indices"),
        *("trainable_token_indices", "use_dora", "use_effective_conv2d", "use_rslora"),
    )
)
_READ: Final = ("LORA", "LOHA", "LOKR", "TRAINABLE_TOKENS")
"""The values of `peft_type` that are read."""
_PROMPTS: Final = frozenset(
    (
        *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"),
        "PROMPT_TUNING",
    )
)
_MIXTURES: Final = frozenset(("XLORA", "POLY"))
_MEANINGS: Final = {
    "use_qalora": "LoRA over groups of a quantised model's inputs, which no weight of the base's shape expresses",
    "layer_replication": "layers that the base model does not have",
    "alora_invocation_tokens": "LoRA that works from some token on, which no weight expresses",
    "arrow_config": "a choice between several adapters by input, which no weight expresses",
}
"""What entries of a configuration stand for that no merge can follow."""
MAX_RANK: Final = 1 << 20
MAX_ALPHA: Final = 1e30
"""Bounds of what an adapter's configuration may state: far more than any has, and products of them are fp32 numbers."""

# These initialisations do not change the base model. The others move a part of its weights into the adapter.
_INITIALISATIONS: Final = (True, False, None, "gaussian", "eva", "orthogonal")


class PatternValues:
    """Numbers by patterns of module names, as `rank_pattern` and `alpha_pattern` have them; see `NamePatterns`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = tuple(values.values())
        self._pattern = NamePatterns(values)

    def of(self, module: str, default: Any) -> Any:
        """Return the value of the first pattern that matches the module's name."""
        number = self._pattern.first(module)
        return default if number is None else self._values[number]


@dataclass(frozen=True)
class AdapterConfig:
    """The entries of an `adapter_config.json` that give the stored tensors their meaning.

    Attributes:
        file: The file.
        peft_type: "LORA", "LOHA", "LOKR" or "TRAINABLE_TOKENS".
        r, alpha: The rank and α of modules that no pattern matches.
        rank_pattern, alpha_pattern: The rank and α of modules whose name ends in a match of the regular expression;
            the first expression that matches counts.
        use_rslora: The scale is s = α/√r instead of α/r.
        use_dora: Weights are decomposed into magnitude and direction.
        fan_in_fan_out: Linear layers store their weight as (in, out).
        target_parameters: Ends of the names of adapted parameters that no linear module owns, such as fused experts.
        token_indices: For each embedding, by the end of its module's name, the rows that were trained; the end "" is
            that of the only embedding that has such rows.
        modules_to_save: Names of modules that the adapter stores whole, which the base model may not have.
        task_type: What the model with the adapter is for, such as "SEQ_CLS"; None if it is not recorded.
        model_class: The class of transformers that the adapter was made for; None if it is not recorded.
        base_name: `base_model_name_or_path`; None if it is not recorded.
    """

    file: Path
    peft_type: str
    r: int
    alpha: float
    rank_pattern: PatternValues
    alpha_pattern: PatternValues
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    target_parameters: tuple[str, ...]
    token_indices: Mapping[str, tuple[int, ...]]
    modules_to_save: tuple[str, ...]
    task_type: str | None
    model_class: str | None
    base_name: str | None

    def rank(self, module: str) -> int:
        """Return the rank r of a module."""
        return int(self.rank_pattern.of(module, self.r))

    def scale(self, module: str) -> float:
        """Return the scale s of a module: α/r, or α/√r with rank-stabilised LoRA (arXiv 2312.03732)."""
        r, alpha = self.rank(module), float(self.alpha_pattern.of(module, self.alpha))
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def token_rows(self, module: str) -> tuple[int, ...] | None:
        """Return the rows of an embedding that were trained; None if the configuration has none for this module."""
        ends = (rows for name, rows in self.token_indices.items() if not name or f".{module}".endswith(f".{name}"))
        return next(ends, None)


def find_weights(folder: Path) -> str:
    """Return the name of the file that holds an adapter's tensors.

    Raises:
        CheckpointError: The folder has no configuration of an adapter, or no such file.
    """
    if not os.path.lexists(folder / CONFIG_FILE):
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}; need a PEFT adapter folder")
    name = next((name for name in (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE) if os.path.lexists(folder / name)), None)
    if name is None:
        raise CheckpointError(f"{folder}: no {WEIGHTS_FILE}; save the adapter with safe_serialization")
    return name


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Return an adapter folder's configuration.

    Raises:
        CheckpointError: The file cannot be read, the adapter is of a kind that is not read, or an entry is set that
            could change the merged weights and that this library does not support.
    """
    file = folder / CONFIG_FILE
    data = read_object(file, CheckpointError)
    kind = data.get("peft_type")
    if kind not in _READ:
        raise CheckpointError(f"{file}: peft_type: got {shortened(kind)}, need {', '.join(_READ)}{_advice(kind)}")
    for key, value in data.items():
        if key not in _NEUTRAL and value not in (None, False, [], {}):
            meaning = f" ({_MEANINGS[key]})" if key in _MEANINGS else ""
            raise CheckpointError(
                f"{file}: {shortened(key)[1:-1]} is set ({shortened(value)}), which is not supported{meaning}; need "
                "plain LoRA, DoRA, LoHa or LoKr"
            )
    if kind == "TRAINABLE_TOKENS":
        data = {"r": 1, "lora_alpha": 1, "trainable_token_indices": data.get("token_indices")} | data
    alpha = "lora_alpha" if kind not in ("LOHA", "LOKR") else "alpha"
    if data.get("init_lora_weights") not in _INITIALISATIONS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {shortened(data['init_lora_weights'])}, which also changes the base model; "
            "convert it to plain LoRA first (peft: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    _check_rank(file, "r", data.get("r"))
    _check_alpha(file, alpha, data.get(alpha))
    base_name = data.get("base_model_name_or_path")
    if not isinstance(base_name, str | None):
        raise CheckpointError(f"{file}: base_model_name_or_path: got {shortened(base_name)}, need a text or null")
    return AdapterConfig(
        file=file,
        peft_type=str(kind),
        r=data["r"],
        alpha=data[alpha],
        rank_pattern=_patterns(file, data, "rank_pattern", _check_rank),
        alpha_pattern=_patterns(file, data, "alpha_pattern", _check_alpha),
        **{flag: _flag(file, data, flag) for flag in ("use_rslora", "use_dora", "fan_in_fan_out")},
        target_parameters=_texts(file, "target_parameters", data.get("target_parameters")),
        token_indices=_token_indices(file, data),
        modules_to_save=_texts(file, "modules_to_save", data.get("modules_to_save")),
        task_type=_text(file, "task_type", data.get("task_type")),
        model_class=_model_class(data.get("auto_mapping")),
        base_name=base_name or None,
    )


def _advice(kind: Any) -> str:
    """Return what a user can do with an adapter of a kind that is not read."""
    if not isinstance(kind, str):
        return ": not the configuration of a PEFT adapter"
    if kind in _PROMPTS:
        return "; this one adds to a model's inputs and changes no weights, so there is nothing to merge"
    if kind in _MIXTURES:
        return "; this one chooses between adapters by input, which no weights express: name those adapters themselves"
    return (
        "; merge this one into its base model with peft (PeftModel.from_pretrained(base, adapter)"
        ".merge_and_unload().save_pretrained(folder)) and name that folder as a model"
    )


def _text(file: Path, key: str, value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise CheckpointError(f"{file}: {key}: got {shortened(value)}, need a text or null")
    return value


def _texts(file: Path, key: str, value: Any) -> tuple[str, ...]:
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise CheckpointError(f"{file}: {key}: got {shortened(value)}, need a list of texts")
    return tuple(value)


def _token_indices(file: Path, data: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return `trainable_token_indices`: a list of rows of the input embedding, or an object of such lists by module."""
    entry = data.get("trainable_token_indices")
    lists = entry if isinstance(entry, dict) else {} if entry is None else {"": entry}
    for name, rows in lists.items():
        if not isinstance(rows, list) or any(isinstance(row, bool) or not isinstance(row, int) for row in rows):
            where = f"trainable_token_indices{f': {shortened(name)}' if name else ''}"
            raise CheckpointError(f"{file}: {where}: got {shortened(rows)}, need a list of whole numbers")
    return {name: tuple(rows) for name, rows in lists.items()}


def _model_class(entry: Any) -> str | None:
    """Return the class of the model that `auto_mapping` records; peft writes it if it knows no task."""
    name = entry.get("base_model_class") if isinstance(entry, Mapping) else None
    return name if isinstance(name, str) else None


def _check_rank(file: Path, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_RANK:
        raise CheckpointError(f"{file}: {key}: got {shortened(value)}, need a positive whole number up to {MAX_RANK}")


def _check_alpha(file: Path, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_ALPHA:
        raise CheckpointError(
            f"{file}: {key}: got {shortened(value)}, need a number from −{MAX_ALPHA:g} to {MAX_ALPHA:g}"
        )


def _patterns(file: Path, data: Mapping[str, Any], key: str, check: Callable[[Path, str, Any], None]) -> PatternValues:
    """Return the entry `rank_pattern` or `alpha_pattern`; null stands for none."""
    entry = {} if data.get(key) is None else data[key]
    if not isinstance(entry, dict):
        raise CheckpointError(f"{file}: {key}: got {shortened(entry)}, need an object of patterns and numbers")
    for expression, value in entry.items():
        check(file, f"{key}: {shortened(expression)}", value)
    try:
        return PatternValues(entry)
    except ValueError as error:
        raise CheckpointError(f"{file}: {key}: {error}") from error


def _flag(file: Path, data: Mapping[str, Any], key: str) -> bool:
    value = data.get(key)
    if not isinstance(value, bool | None):
        raise CheckpointError(f"{file}: {key}: got {shortened(value)}, need true or false")
    return bool(value)


def is_tied(config: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    """Return True if a model's output head is its input embedding.

    `tie_word_embeddings` in its config.json decides; without that entry, a model that stores an embedding and no head
    is tied.
    """
    flag = config_entry(config, "tie_word_embeddings", bool)
    return flag if flag is not None else OUTPUT_HEAD not in names and any(map(is_tied_embedding, names))


def check_recorded_base(folder: Path, recorded: str | None, base: Path) -> None:
    """Raise a CheckpointError if the base model that an adapter's configuration records is not `base`.

    An adapter can be applied to any model of the same shapes, but the result is useful with one of them only. A
    recorded local folder must be `base`. If a hub id is recorded, its last part must be the name of the folder `base`,
    or `base` must lie in the hub's cache under that id. Nothing is checked if no base model is recorded.
    """
    if recorded is None:
        return
    real_base = Path(os.path.realpath(base))
    local = expanded(recorded, CheckpointError, f"{folder / CONFIG_FILE}: base_model_name_or_path")
    names = {n.lower() for n in (real_base.name, base.name, *(p for p in real_base.parts if p.startswith("models--")))}
    hub_names = {recorded.rstrip("/").rsplit("/", 1)[-1].lower(), "models--" + recorded.replace("/", "--").lower()}
    same = os.path.realpath(local) == str(real_base) if os.path.isdir(local) else bool(names & hub_names)
    if not same:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: base_model_name_or_path is {shortened(recorded)}, but the recipe's base_model is "
            f"{base}; if they are the same model, say so by naming both: {base}+{folder}"
        )
