"""Merged vocabularies: which tokens the output has, and where each of its embedding's rows is from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import fine_tuned, llama_config, load_model, random_weights, save_model

from resm_kernels.checkpoint import CheckpointError
from resm_kernels.engine import MergeError, merge_checkpoints, plan_merge
from resm_kernels.recipe import RecipeError, load_recipe

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (test extra)")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = ["<unk>", "<s>", "</s>", *(f"word{i}" for i in range(3, 12))]


def save_tokenizer(folder: Path, words: Sequence[str], added: Sequence[str] = (), **keys: Any) -> None:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>")
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **keys
    )
    fast.add_tokens(list(added))
    fast.save_pretrained(folder)


class Vocabularies:
    """A base and two experts, each with words of its own."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.float32) -> None:
        self.root, self.out = root, root / "out"
        reordered = [*WORDS[:3], *reversed(WORDS[3:]), "first"]
        self.words = [(WORDS, ()), (reordered, ("<|im_start|>", "<|im_end|>")), (WORDS[:9], ("<|im_end|>", "other"))]
        self.folders = [root / name for name in ("base", "first", "second")]
        self.weights: list[dict[str, torch.Tensor]] = []
        for i, (folder, (words, added)) in enumerate(zip(self.folders, self.words, strict=True)):
            rows = len(words) + len(added) + (3 if i == 0 else 0)  # the base's embedding has rows that no token uses
            base = random_weights(0, dtype, layers=1, vocabulary=rows)
            self.weights.append(fine_tuned(base, i) | {n: t for n, t in random_weights(i + 7, dtype, layers=1, vocabulary=rows).items() if n in (EMBEDDING, HEAD)})
            save_model(folder, self.weights[-1], llama_config(num_hidden_layers=1, vocab_size=rows))
            save_tokenizer(folder, words, added)

    def recipe(self, method: str = "linear", **keys: Any) -> dict[str, Any]:
        models = [{"model": str(f), "parameters": {"weight": 1.0 + i}} for i, f in enumerate(self.folders)]
        if method != "linear":
            models = models[1:]
        return {"merge_method": method, "base_model": str(self.folders[0]), "models": models, "dtype": "float32"} | keys

    def row(self, model: int, token: str, name: str = EMBEDDING) -> torch.Tensor:
        words, added = self.words[model]
        return self.weights[model][name][[*words, *added].index(token)]


@pytest.fixture
def family(tmp_path: Path) -> Vocabularies:
    return Vocabularies(tmp_path)


def merged(family: Vocabularies, recipe: Mapping[str, Any], **keys: Any) -> tuple[dict[str, int], dict[str, Any]]:
    """Merge; returns the output's tokens, and its tensors."""
    merge_checkpoints(recipe, family.out, overwrite=True, **keys)
    return tokens_of(family.out), load_model(family.out)


def tokens_of(folder: Path) -> dict[str, int]:
    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


def by_mergekit(recipe: Mapping[str, Any], out: Path) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed (test extra)")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    options = MergeOptions(quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(dict(recipe)))), str(out), options)


TOKENS = {
    "<|im_end|>": {"source": "{second}", "force": True},
    "<|new|>": {"source": {"kind": "model_token", "model": "{first}", "token": "word5"}},
    "<|numbered|>": {"source": {"kind": "model_token", "model": "{second}", "token_id": 4}},
    "<|nothing|>": {"source": {"kind": "zero"}},
    "first": {"source": {"kind": "zero"}, "force": True},
}


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer_source": "base"},
        {"tokenizer_source": "union"},
        {"tokenizer_source": "{second}"},
        {"tokenizer": {"source": "union", "tokens": TOKENS, "pad_to_multiple_of": 16}},
        {"tokenizer": {"source": "{first}", "pad_to_multiple_of": 8}},
    ],
    ids=["base", "union", "model", "tokens", "model, padded"],
)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_equals_mergekit(family: Vocabularies, method: str, keys: dict[str, Any]) -> None:
    text = yaml.safe_dump(family.recipe(method, **keys))
    for name, folder in zip(("first", "second"), family.folders[1:], strict=True):
        text = text.replace(f"'{{{name}}}'", str(folder))
    recipe = yaml.safe_load(text)
    tokens, ours = merged(family, recipe)
    theirs = family.root / "mergekit"
    by_mergekit(recipe, theirs)
    their_tokens, expected = tokens_of(theirs), load_model(theirs)
    # mergekit's order of added tokens is that of a set, so rows are compared token by token.
    assert set(tokens) == set(their_tokens)
    for name in (EMBEDDING, HEAD):
        assert ours[name].shape == expected[name].shape
        for token, row in tokens.items():
            torch.testing.assert_close(ours[name][row], expected[name][their_tokens[token]], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ours[name][len(tokens) :], expected[name][len(tokens) :], rtol=1e-6, atol=1e-7)
    for name in set(expected) - {EMBEDDING, HEAD}:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-6, atol=1e-7)
    sizes = [json.loads((folder / "config.json").read_text())["vocab_size"] for folder in (family.out, theirs)]
    assert sizes[0] == sizes[1] == ours[EMBEDDING].shape[0]
