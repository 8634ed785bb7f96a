"""Tiny models to calibrate: a base, experts that were changed a little, and their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from checkpoints import VOCABULARY, load_model
from experts import WORDS, open_model, save_expert, transformers
from safetensors.torch import save_file

from resm_kernels.calibrate import CalibrationReport, Sample, answer_prompts, calibrate_checkpoint
from resm_kernels.calibrate.models import quiet_transformers

OPTIONS: Final[dict[str, Any]] = {"max_new_tokens": 6, "batch_tokens": 24, "threads": 1}
"""Small answers and batches, so that there are several of them."""


def write_prompts(file: Path, count: int, seed: int, response: bool = False) -> Path:
    """Prompts of 2 to 9 words."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return " ".join(f"w{i}" for i in torch.randint(6, VOCABULARY, (length,), generator=generator).tolist())

    if response:
        lines = [f'{{"prompt": "{words(2, 9)}", "response": "{words(1, 4)}"}}' for _ in range(count)]
        file = file.with_suffix(".jsonl")
    else:
        lines = [words(2, 9) for _ in range(count)]
    file.write_text("\n".join(lines) + "\n")
    return file


def character_tokenizer() -> Any:
    """Qwen2's tokenizer with one token for each of the prompts' characters: transformers loads no other for Qwen2."""
    characters = {c: i for i, c in enumerate("Ġw0123456789", start=6)}
    others = {word: i for i, word in enumerate(WORDS) if i not in characters.values()}
    return transformers.Qwen2Tokenizer(vocab=others | characters, merges=[], unk_token="<unk>", eos_token="</s>")


class Models:
    """A base, experts, a file of prompts for each, and where the output goes."""

    def __init__(
        self,
        root: Path,
        kind: str = "Llama",
        experts: int = 2,
        *,
        prompts: int = 8,
        response: bool = False,
        **keys: Any,
    ) -> None:
        self.root, self.out = root, root / "out"
        self.work = root / ".out.calibration"
        with quiet_transformers():
            self.base = save_expert(root / "base", kind, **keys)
        if kind == "Qwen2":
            character_tokenizer().save_pretrained(self.base)
        self.folders = [self.expert(f"expert{t}", t + 1) for t in range(experts)]
        self.files = [write_prompts(root / f"prompts{t}.txt", prompts, t, response) for t in range(experts)]

    def expert(self, name: str, seed: int, change: float = 0.5) -> Path:
        """A copy of the base whose weights are changed by so much, relative to their size."""
        folder = self.root / name
        folder.mkdir()
        for file in self.base.iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: tensor + change * tensor.std() * torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 2
            else tensor
            for name, tensor in load_model(self.base).items()
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def recipe(self, **keys: Any) -> dict[str, Any]:
        """Their mean in fp32."""
        models = [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in self.folders]
        return {"merge_method": "linear", "models": models} | keys

    def recipe_file(self, **keys: Any) -> Path:
        """The same as a YAML file."""
        file = self.root / "recipe.yml"
        file.write_text(yaml.safe_dump(self.recipe(**keys), sort_keys=False))
        return file

    def calibrate(
        self, recipe: Mapping[str, Any] | None = None, files: Sequence[Path] | None = None, **options: Any
    ) -> CalibrationReport:
        """Calibrate the recipe on the prompts."""
        chosen = OPTIONS | options
        return calibrate_checkpoint(recipe or self.recipe(), self.out, self.files if files is None else files, **chosen)

    def leftovers(self) -> list[str]:
        """Hidden files and folders next to the output."""
        return sorted(path.name for path in self.root.iterdir() if path.name.startswith("."))


def samples_of(models: Models, t: int) -> list[Sample]:
    """An expert's prompts with its answers."""
    file = models.root / f"samples{t}.safetensors"
    return answer_prompts(open_model(models.folders[t]), models.files[t], file, max_new_tokens=6)


def logits(folder: Path, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """What transformers' model in a folder gives for each of the sequences; the folder has just its tensors."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.inference_mode():
        return [model(torch.tensor([list(tokens)])).logits[0] for tokens in sequences]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
