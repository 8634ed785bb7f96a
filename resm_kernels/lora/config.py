"""The files of a PEFT adapter folder, and the entries of its `adapter_config.json`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.checkpoint.auxiliary import config_entry, read_json
from resm_kernels.tensor_names import OUTPUT_HEAD, is_tied_embedding

CONFIG_FILE: Final = "adapter_config.json"
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
# These initialisations do not change the base model. The others move a part of its weights into the adapter.
_INITIALISATIONS: Final = (True, False, None, "gaussian", "eva", "orthogonal")


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
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    base_name: str | None

    def rank(self, module: str) -> int:
        """Return the rank r of a module."""
        return int(_lookup(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """Return the scale s of a module: α/r, or α/√r with rank-stabilised LoRA (arXiv 2312.03732)."""
        r, alpha = self.rank(module), float(_lookup(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def _lookup(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    # PEFT's rule: the first key counts that matches the whole name, or the part of it after one of its dots.
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Return an adapter folder's configuration.

    Raises:
        CheckpointError: The file cannot be read, the adapter is not LoRA, or an entry is set that could change the
            merged weights and that this library does not support.
    """
    file = folder / CONFIG_FILE
    data = read_json(file)
    if data.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type: got {data.get('peft_type')!r}, need 'LORA'")
    for key, value in data.items():
        if key not in _NEUTRAL and value not in (None, False, [], {}):
            raise CheckpointError(f"{file}: {key} is set ({value!r}), which is not supported; need plain LoRA or DoRA")
    if data.get("init_lora_weights") not in _INITIALISATIONS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {data['init_lora_weights']!r}, which also changes the base model; convert "
            "it to plain LoRA first (peft: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    rank_pattern, alpha_pattern = data.get("rank_pattern") or {}, data.get("alpha_pattern") or {}
    for key, value in [
        ("r", data.get("r")),
        ("lora_alpha", data.get("lora_alpha")),
        *(("rank_pattern", v) for v in rank_pattern.values()),
        *(("alpha_pattern", v) for v in alpha_pattern.values()),
    ]:
        positive = "alpha" in key or (isinstance(value, int) and value > 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not positive:
            need = "a number" if "alpha" in key else "a positive whole number"
            raise CheckpointError(f"{file}: {key}: got {value!r}, need {need}")
    for key in (*rank_pattern, *alpha_pattern):
        try:
            re.compile(key)
        except re.error as error:
            raise CheckpointError(f"{file}: pattern {key!r} is no regular expression: {error}") from error
    return AdapterConfig(
        r=data["r"],
        alpha=data["lora_alpha"],
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        **{flag: bool(data.get(flag)) for flag in ("use_rslora", "use_dora", "fan_in_fan_out")},
        base_name=data.get("base_model_name_or_path") or None,
    )


def is_adapter_folder(folder: Path) -> bool:
    """Return True for a folder that holds an adapter's configuration and not the weights of a whole model."""
    has_model = (folder / "model.safetensors").is_file() or any(folder.glob("*.safetensors.index.json"))
    return (folder / CONFIG_FILE).is_file() and not has_model


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
    local = Path(recorded).expanduser()
    names = {n.lower() for n in (real_base.name, base.name, *(p for p in real_base.parts if p.startswith("models--")))}
    hub_names = {recorded.rstrip("/").rsplit("/", 1)[-1].lower(), "models--" + recorded.replace("/", "--").lower()}
    same = os.path.realpath(local) == str(real_base) if local.is_dir() else bool(names & hub_names)
    if not same:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: base_model_name_or_path is {recorded!r}, but the recipe's base_model is {base}; "
            f"if they are the same model, say so by naming both: {base}+{folder}"
        )
