"""Tokenizers and vocabularies that adapters bring: chat fine-tunes save them into the adapter's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_model

from resm_kernels.engine import MergeError, merge_checkpoints

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
peft = pytest.importorskip("peft", reason="peft is not installed (test extra)")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (test extra)")

TOKENS, ROWS = 20, 24
TEMPLATE = "{% for m in messages %}<|begin|>{{ m['content'] }}<|end|>{% endfor %}"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_words(folder: Path, added: tuple[str, ...] = (), template: str | None = None) -> None:
    words = {"<unk>": 0} | {f"word{i}": i for i in range(1, TOKENS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="word2")
    if added:
        fast.add_special_tokens({"additional_special_tokens": list(added)})
        fast.eos_token = added[-1]
    fast.chat_template = template
    fast.save_pretrained(folder)


def save_pair(root: Path, *, rows: int = ROWS, tie: bool = False) -> tuple[Path, Path, Any]:
    """A base model, and a chat adapter with two tokens more, whose embedding has `rows` rows; and peft's merge."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=ROWS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tie,
        eos_token_id=2,
    )
    base, chat = root / "base", root / "chat"
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    save_words(base)
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows != ROWS:
        model.resize_token_embeddings(rows, mean_resizing=False)
    saved = ["embed_tokens", "lm_head"] if rows != ROWS and not tie else None
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=saved)
    adapted = peft.get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(chat, save_embedding_layers=rows != ROWS)
    save_words(chat, ("<|begin|>", "<|end|>"), TEMPLATE)
    return base, chat, adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize("source", ["{chat}", "{base}+{chat}", "union"])
@pytest.mark.parametrize("entry", ["{chat}", "{base}+{chat}"])
def test_a_recipe_that_asks_for_the_adapters_tokenizer_gets_it(tmp_path: Path, source: str, entry: str) -> None:
    base, chat, _ = save_pair(tmp_path)
    (chat / "adapter_config.json").write_text(
        json.dumps(json.loads((chat / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)})
    )
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": entry.format(base=base, chat=chat)}],
        "tokenizer_source": source.format(base=base, chat=chat),
        "dtype": "float32",
    }
    merge_checkpoints(recipe, tmp_path / "out")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {"<|begin|>", "<|end|>"} <= found.get_vocab().keys()
    if source != "union":
        assert found.chat_template == TEMPLATE and found.eos_token == "<|end|>"
    tensors, stored = load_model(tmp_path / "out"), load_model(base)
    assert tensors[EMBEDDING].shape[0] == len(found) == TOKENS + 2
    torch.testing.assert_close(tensors[EMBEDDING], stored[EMBEDDING][: TOKENS + 2])


def test_the_automatic_chat_template_may_be_an_adapters(tmp_path: Path) -> None:
    base, chat, _ = save_pair(tmp_path)
    models = [{"model": f"{base}+{chat}"}]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, "chat_template": "auto"}
    merge_checkpoints(recipe, tmp_path / "out")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.chat_template == TEMPLATE and "<|end|>" not in found.get_vocab()


@pytest.mark.parametrize("tie", [False, True])
def test_a_vocabulary_that_the_adapter_has_resized(tmp_path: Path, tie: bool) -> None:
    base, chat, expected = save_pair(tmp_path, rows=ROWS + 3, tie=tie)
    recipe: dict[str, Any] = {
        "merge_method": "passthrough",
        "models": [{"model": f"{base}+{chat}"}],
        "dtype": "float32",
    }
    merge_checkpoints(recipe, tmp_path / "out")
    model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.vocab_size == ROWS + 3
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    assert "<|end|>" in transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_a_resized_vocabulary_is_aligned_with_the_bases(tmp_path: Path) -> None:
    base, chat, expected = save_pair(tmp_path, rows=ROWS + 3)
    recipe: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": f"{base}+{chat}"}],
        "dtype": "float32",
    }
    with pytest.raises(MergeError, match="the vocabularies differ in size: merge them with tokenizer_source"):
        merge_checkpoints(recipe, tmp_path / "out")
    merge_checkpoints(recipe | {"tokenizer_source": "union"}, tmp_path / "out")
    tensors = load_model(tmp_path / "out")
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(tensors[name], expected[name][: TOKENS + 2])


def test_rows_that_an_adapter_trains_alone_belong_to_its_tokens(tmp_path: Path) -> None:
    """`trainable_token_indices` changes rows of the base's embedding that only the adapter's tokenizer names."""
    base, chat, _ = save_pair(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = {"embed_tokens": [TOKENS, TOKENS + 1]}
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, trainable_token_indices=rows)
    adapted = peft.get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(chat)
    expected = adapted.merge_and_unload().state_dict()[EMBEDDING]
    for source in (str(chat), "union"):
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": [{"model": f"{base}+{chat}"}],
            "tokenizer_source": source,
            "dtype": "float32",
        }
        merge_checkpoints(recipe, tmp_path / "out", overwrite=True)
        torch.testing.assert_close(load_model(tmp_path / "out")[EMBEDDING], expected[: TOKENS + 2])
