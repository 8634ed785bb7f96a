"""A folder with tiny models, adapters, prompts and checkpoints under the very names that the documentation uses."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from calibrations import write_prompts
from checkpoints import load_model, save_adapter
from dcp_folders import save_dcp
from experts import WORDS, save_expert, transformers, word_tokenizer
from safetensors.torch import save_file

from resm_kernels.calibrate.models import quiet_transformers

ROOT: Final = Path(__file__).resolve().parent.parent
DEPTHS: Final = {"recipes.md": 40}
"""Layers of the models where a page's recipes name layers; 2 elsewhere."""
PROMPTS: Final = 4
"""Prompts in a file."""
EXPERTS: Final = ("helpful", "honest", "harmless")
COPIES: Final = (*EXPERTS, "chat", "code", "math", "tuned", "FINETUNED", "merged")
"""Models with other weights than the base, of the same shapes."""
OWN_TOKEN: Final = "<|im_start|>"
"""A token that the model called chat has in place of another."""
LORA: Final = {"q_proj": (32, 32), "up_proj": (48, 32)}


def make_shelf(root: Path, layers: int) -> Path:
    """Make everything that pages name, with models of so many layers."""
    root.mkdir()
    small = {"num_hidden_layers": layers, "max_position_embeddings": 128, "initializer_range": 0.02}
    with quiet_transformers():
        save_expert(root / "base", "Llama", **small)
    for seed, name in enumerate(COPIES, start=1):
        _expert(root / name, root / "base", seed)
    _own_token(root / "chat")
    shutil.copytree(root / "base", root / "BASE")
    for seed, name in enumerate(EXPERTS, start=1):
        _adapter(root / f"{name}-lora", seed)
        for split in ("valid", "test"):
            write_prompts(root / f"{name}.{split}.jsonl", PROMPTS, seed, response=True)
        prompts = write_prompts(root / f"{name}.txt", PROMPTS, seed).read_text().splitlines()
        lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    for seed in (8000, 9000, 10000):
        torch.manual_seed(seed)
        state = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in load_model(root / "base").items()}
        (root / "run").mkdir(exist_ok=True)
        save_dcp(root / "run" / f"step_{seed}", {"model": state, "ema": state})
    shutil.copytree(root / "base", root / "hf_model", ignore=shutil.ignore_patterns("*.safetensors"))
    adapters = {"merge_method": "linear", "models": [{"model": f"./{name}-lora"} for name in EXPERTS]}
    (root / "adapters.yaml").write_text(yaml.safe_dump(adapters))
    (root / "recipe.yaml").write_text(yaml.safe_dump(merge_recipe(0.3)))
    return root


def set_up(shelf: Path, place: Path) -> None:
    """Copy all models and files into the folder where a page's blocks run."""
    shutil.copytree(shelf, place, dirs_exist_ok=True)
    example, copied = ROOT / "examples" / "3h", place / "examples" / "3h"
    copied.mkdir(parents=True)
    for name in ("models", "recipes", "judge.py"):
        (copied / name).symlink_to(example / name)
    (copied / "prompts").mkdir()
    for file in (example / "prompts").iterdir():
        lines = file.read_text().splitlines(keepends=True)
        (copied / "prompts" / file.name).write_text("".join(lines[:PROMPTS]))


def _expert(folder: Path, base: Path, seed: int) -> None:
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    weights = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in load_model(base).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _own_token(folder: Path) -> None:
    """The last word of the vocabulary is another one."""
    word_tokenizer(words=(*WORDS[:-1], OWN_TOKEN)).save_pretrained(folder)


def _adapter(folder: Path, seed: int, rank: int = 4) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, inner) in LORA.items():
        part = "mlp" if module == "up_proj" else "self_attn"
        key = f"base_model.model.model.layers.0.{part}.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) * 0.1
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.1
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    save_adapter(folder, tensors, config | {"base_model_name_or_path": "./base", "target_modules": list(LORA)})


class Loader:
    """What docs/search.md calls llm_model: it takes pairs of a name and a tensor, as vLLM's models do."""

    def load_weights(self, weights: Any) -> None:
        self.loaded = {name: tensor.clone() for name, tensor in weights}
        assert "model.embed_tokens.weight" in self.loaded


def merge_recipe(weight: float) -> dict[str, Any]:
    """A recipe that a page calls `recipe`."""
    models = [{"model": f"./{name}", "parameters": {"weight": weight}} for name in EXPERTS]
    return {"merge_method": "task_arithmetic", "base_model": "./base", "models": models}


def tensors() -> dict[str, Any]:
    """What README's calls on tensors take."""
    torch.manual_seed(0)
    base = torch.randn(64, 48)
    experts = [base + 0.01 * torch.randn(64, 48) for _ in EXPERTS]
    dictionaries = [{"weight": expert} for expert in experts]
    return {"base": base, "experts": experts, "expert": experts[0], "base_dict": {"weight": base}} | {
        "expert_dicts": dictionaries,
        "prompt_files": [f"{name}.jsonl" for name in EXPERTS],
    }


def module_and_recipes() -> dict[str, Any]:
    """What docs/search.md merges into: a module of transformers, and two recipes."""
    model = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())

    def judge(module: torch.nn.Module) -> float:
        assert any(not torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
        return 1.0

    return {
        "model": model,
        "recipe": merge_recipe(0.3),
        "other_recipe": merge_recipe(0.5),
        "evaluate": judge,
        "llm_model": Loader(),
    }


def model_with_adapters() -> dict[str, Any]:
    """A model of peft with the adapters a and b, and functions that pages call."""
    import peft

    inner = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=list(LORA), init_lora_weights=False)
    model = peft.get_peft_model(inner, config, adapter_name="a")
    model.add_adapter("b", config)
    return {"model": model}


GIVEN: Final[Mapping[str, Sequence[Any]]] = {
    "README.md": (tensors,),
    "search.md": (module_and_recipes,),
    "merge_lora.md": (model_with_adapters,),
    "migrating.md": (model_with_adapters,),
}
"""What makes the names that a page's Python blocks take as given."""


def given(page: str) -> dict[str, Any]:
    """The names that are there before a page's first block of Python."""
    names: dict[str, Any] = {}
    for make in GIVEN.get(page, ()):
        names |= make()
    return names
