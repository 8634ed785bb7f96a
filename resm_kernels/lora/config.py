"""PEFT adapter folders: their files, their `adapter_config.json`, and how both name tensors."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from resm_kernels.checkpoint import CheckpointError

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
"""What PEFT writes before the base model's own names."""

CONV1D_MODELS: Final = ("gpt2", "openai-gpt", "imagegpt")
"""Model types whose linear layers store their weight as (in, out)."""

EMBEDDING_NAMES: Final = (
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
HEAD_NAMES: Final = ("lm_head", "embed_out", "output_embeddings")

# Entries that do not change what the stored tensors mean. Any other that is set would: it is refused by name.
_NEUTRAL: Final = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
        *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config"),
        *("megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r"),
        *("rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
    )
)
# These initialisations leave the base model as it is; the others move part of its weights into the adapter.
_INITIALISATIONS: Final = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """What an `adapter_config.json` says about the tensors beside it.

    Attributes:
        r, alpha: Rank and α where no pattern matches.
        rank_pattern, alpha_pattern: Regular expression → value for modules whose name ends in a match, first first.
        use_rslora: s = α/√r instead of α/r.
        use_dora: Weights are decomposed into magnitude and direction.
        fan_in_fan_out: Linear layers store (in, out).
        base_name: `base_model_name_or_path`, if it is recorded.
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
        """r of that module."""
        return int(_lookup(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """s of that module: α/r, or α/√r with rank-stabilised LoRA (arXiv 2312.03732)."""
        r, alpha = self.rank(module), float(_lookup(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def _lookup(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    # PEFT's rule: the first key that matches the end of the name from some dot on.
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Return an adapter folder's configuration.

    Raises:
        CheckpointError: It cannot be read, is no LoRA adapter, or uses something that would change the merged weights
            in a way this library does not know.
    """
    file = folder / CONFIG_FILE
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: got a JSON {type(data).__name__}, need an object")
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
        use_rslora=bool(data.get("use_rslora")),
        use_dora=bool(data.get("use_dora")),
        fan_in_fan_out=bool(data.get("fan_in_fan_out")),
        base_name=data.get("base_model_name_or_path") or None,
    )


def is_adapter_folder(folder: Path) -> bool:
    """True for a folder with an adapter's configuration and no whole model's weights."""
    whole = (folder / "model.safetensors").is_file() or any(folder.glob("*.safetensors.index.json"))
    return (folder / CONFIG_FILE).is_file() and not whole


def is_tied(config: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    """True if a model's output head is its embedding: it stores no head, or says so in its config.json."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return "lm_head.weight" not in names and any(n.split(".")[-2:-1] in (["embed_tokens"], ["wte"]) for n in names)


def check_recorded_base(folder: Path, recorded: str | None, base: Path) -> None:
    """Refuse to put an adapter on a model that its configuration does not name, unless it names none.

    Adapters fit any model of the same shapes, and give nonsense on all but one. A recorded local folder must be this
    one; of a hub id the last part must be the folder's name, or the folder lie in the hub's cache under that id.
    """
    if recorded is None:
        return
    place = Path(os.path.realpath(base))
    local = Path(recorded).expanduser()
    names = {part.lower() for part in (place.name, base.name, *(p for p in place.parts if p.startswith("models--")))}
    hub = {recorded.rstrip("/").rsplit("/", 1)[-1].lower(), "models--" + recorded.replace("/", "--").lower()}
    same = os.path.realpath(local) == str(place) if local.is_dir() else bool(names & hub)
    if not same:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: base_model_name_or_path is {recorded!r}, but the recipe's base_model is {base}; "
            f"if they are the same model, say so by naming both: {base}+{folder}"
        )
