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
PREFIX: Final = "base_model.model."
"""PEFT puts this prefix before the names that tensors have in the base model."""

CONV1D_MODELS: Final = ("gpt2", "openai-gpt", "imagegpt")
"""Model types whose linear layers store their weight as (in, out)."""

# These entries do not change the meaning of the stored tensors. Any other entry that is set could, so it is refused.
_NEUTRAL: Final = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
        *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config"),
        *("megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r"),
        *("rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
    )
)
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
        r, alpha: The rank and α of modules that no pattern matches.
        rank_pattern, alpha_pattern: The rank and α of modules whose name ends in a match of the regular expression;
            the first expression that matches counts.
        use_rslora: The scale is s = α/√r instead of α/r.
        use_dora: Weights are decomposed into magnitude and direction.
        fan_in_fan_out: Linear layers store their weight as (in, out).
        base_name: `base_model_name_or_path`; None if it is not recorded.
    """

    r: int
    alpha: float
    rank_pattern: PatternValues
    alpha_pattern: PatternValues
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    base_name: str | None

    def rank(self, module: str) -> int:
        """Return the rank r of a module."""
        return int(self.rank_pattern.of(module, self.r))

    def scale(self, module: str) -> float:
        """Return the scale s of a module: α/r, or α/√r with rank-stabilised LoRA (arXiv 2312.03732)."""
        r, alpha = self.rank(module), float(self.alpha_pattern.of(module, self.alpha))
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Return an adapter folder's configuration.

    Raises:
        CheckpointError: The file cannot be read, the adapter is not LoRA, or an entry is set that could change the
            merged weights and that this library does not support.
    """
    file = folder / CONFIG_FILE
    data = read_object(file, CheckpointError)
    if data.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type: got {shortened(data.get('peft_type'))}, need 'LORA'")
    for key, value in data.items():
        if key not in _NEUTRAL and value not in (None, False, [], {}):
            raise CheckpointError(
                f"{file}: {shortened(key)[1:-1]} is set ({shortened(value)}), which is not supported; need plain LoRA "
                "or DoRA"
            )
    if data.get("init_lora_weights") not in _INITIALISATIONS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {shortened(data['init_lora_weights'])}, which also changes the base model; "
            "convert it to plain LoRA first (peft: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    _check_rank(file, "r", data.get("r"))
    _check_alpha(file, "lora_alpha", data.get("lora_alpha"))
    base_name = data.get("base_model_name_or_path")
    if not isinstance(base_name, str | None):
        raise CheckpointError(f"{file}: base_model_name_or_path: got {shortened(base_name)}, need a text or null")
    return AdapterConfig(
        r=data["r"],
        alpha=data["lora_alpha"],
        rank_pattern=_patterns(file, data, "rank_pattern", _check_rank),
        alpha_pattern=_patterns(file, data, "alpha_pattern", _check_alpha),
        **{flag: _flag(file, data, flag) for flag in ("use_rslora", "use_dora", "fan_in_fan_out")},
        base_name=base_name or None,
    )


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
