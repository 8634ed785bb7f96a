"""Merges tiny models with different tokenizers, of every family of transformers, and checks the rows of each token.

Run it with the package, transformers and tokenizers installed:

    python scripts/vocabularies.py [--only TEXT]

A base model and an expert have 96 tokens each, of which 6 are other ones in the expert. With `tokenizer_source: union`
a copy of the base must have 102 tokens, load without missing, unexpected or mismatched keys, and give the tokens of the
base what the base gives: the logits of a text of the base's tokens are compared. A merge may be refused with a reason.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent))

import families
import tokenizers
import torch
import transformers

from resm_kernels.engine import MergeError, merge_checkpoints

TOKENS, NEW = 96, 6
IDS: Final = torch.randint(3, 80, (1, 12), generator=torch.Generator().manual_seed(0))


def save_tokenizer(folder: Path, *, new: bool) -> None:
    """Save a tokenizer of 96 words, of which the last 6 are other ones if it is `new`."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {
        (f"new{i}" if new and i >= TOKENS - NEW else f"word{i}"): i for i in range(3, TOKENS)
    }
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )
    fast.save_pretrained(folder)


def logits(model: Any) -> torch.Tensor | None:
    """Return what a model gives for a text; None if it needs more than a text."""
    texts = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        texts["decoder_input_ids"] = IDS[:, :5]
    try:
        with torch.no_grad():
            return model(**texts).logits
    except Exception:
        return None


def try_family(make: Callable[[], Any]) -> str:
    """Return what becomes of a family's union: "loads", "same logits", why it is refused, or a text from FAIL on."""
    folder = Path(tempfile.mkdtemp(prefix="vocabularies-"))
    try:
        try:
            torch.manual_seed(0)
            model = make().float().eval()
            model.save_pretrained(folder / "base")
            again, info = type(model).from_pretrained(folder / "base", dtype=torch.float32, output_loading_info=True)
        except Exception as error:
            return f"not made: {type(error).__name__}: {str(error)[:80]}"
        if any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            return "not made: transformers does not load what it saved"
        shutil.copytree(folder / "base", folder / "expert")
        save_tokenizer(folder / "base", new=False)
        save_tokenizer(folder / "expert", new=True)
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": str(folder / "base"),
            "models": [{"model": str(folder / "expert")}],
            "parameters": {"lambda": 0.0},
            "tokenizer_source": "union",
        }
        report = merge_checkpoints(recipe, folder / "out", model_card=False)
        merged, info = type(model).from_pretrained(folder / "out", dtype=torch.float32, output_loading_info=True)
        if kinds := [k for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]]:
            return f"FAIL {kinds}"
        stored = families.load_file(folder / "out" / "model.safetensors")
        grown = [name for name, tensor in stored.items() if TOKENS + NEW in tensor.shape]
        before, after = logits(again.eval()), logits(merged.eval())
        if before is None or after is None:
            return f"loads, {len(grown)} tensors follow"
        if not torch.allclose(before[..., :TOKENS], after[..., :TOKENS], atol=1e-5):
            return f"FAIL other logits, {grown}"
        config = json.loads((folder / "out" / "config.json").read_text())
        other = f" {report.notes}" if any(note.startswith("vocabulary") for note in report.notes) else ""
        return f"same logits, {len(grown)} tensors follow, vocab_size {config.get('vocab_size')}{other}"
    except MergeError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"FAIL {type(error).__name__}: {str(error)[:200]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="only families whose name contains this text")
    parser.add_argument("--without", default="image: ", help="no families whose name begins with this text")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    failed = 0
    for name, make, _ in families.families():
        if make is not None and arguments.only in name and not name.startswith(arguments.without):
            result = try_family(make)
            failed += result.startswith("FAIL")
            print(f"{name}: {result}", flush=True)
    print(f"{failed} families whose vocabularies are not merged right")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
