"""Tensors that follow the tokenizer, in classes of transformers that hold them in other places than Llama does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_model
from safetensors.torch import save_file

from resm_kernels.engine import MergeError, merge_checkpoints

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (test extra)")

TOKENS, NEW = 40, 4
ROWS = TOKENS + NEW
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
CODER = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def save_words(folder: Path, *, new: bool) -> None:
    """A tokenizer of 40 words, of which the last 4 are other ones if it is `new`."""
    named = [f"new{i}" if new and i >= TOKENS - NEW else f"word{i}" for i in range(3, TOKENS)]
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *named])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **roles).save_pretrained(folder)


def union(root: Path, make: Callable[[], Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Merge two random models with the union of their tokens: base, expert, output, and the output's config."""
    folders = [root / name for name in ("base", "expert", "out")]
    model_class = None
    for i, folder in enumerate(folders[:2]):
        torch.manual_seed(i)
        model = make()
        model_class = type(model)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                torch.nn.init.normal_(tensor)
        model.save_pretrained(folder)
        save_words(folder, new=bool(i))
    models = [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in folders[:2]]
    recipe = {"merge_method": "linear", "models": models, "tokenizer_source": "union", "dtype": "float32"}
    report = merge_checkpoints(recipe, folders[2], model_card=False)
    assert model_class is not None
    _, info = model_class.from_pretrained(folders[2], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    base, expert, out = map(load_model, folders)
    return base, expert, out, {"notes": report.notes, **json.loads((folders[2] / "config.json").read_text())}


def assert_follows(base: torch.Tensor, expert: torch.Tensor, out: torch.Tensor) -> None:
    """Words of both are averaged, and words of one model alone are its own."""
    base, expert, out = (
        tensor.reshape(-1, *tensor.shape[1 if tensor.shape[0] == 1 else 0 :][1:]) for tensor in (base, expert, out)
    )
    shared = TOKENS - NEW
    torch.testing.assert_close(out[:shared], (base[:shared] + expert[:shared]) / 2)
    torch.testing.assert_close(out[shared:TOKENS], base[shared:TOKENS])
    torch.testing.assert_close(out[TOKENS:ROWS], expert[shared:TOKENS])


def bart() -> Any:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=TOKENS, **CODER))


def marian() -> Any:
    return transformers.MarianMTModel(transformers.MarianConfig(vocab_size=TOKENS, **CODER))


def modernbert() -> Any:
    config = transformers.ModernBertConfig(vocab_size=TOKENS, **TEXT, **SPECIAL, cls_token_id=1, sep_token_id=2)
    return transformers.ModernBertForMaskedLM(config)


def xlnet() -> Any:
    config = transformers.XLNetConfig(vocab_size=TOKENS, d_model=32, n_layer=1, n_head=4, d_inner=48)
    return transformers.XLNetLMHeadModel(config)


def rwkv() -> Any:
    config = transformers.RwkvConfig(vocab_size=TOKENS, hidden_size=32, num_hidden_layers=2, context_length=32)
    return transformers.RwkvForCausalLM(config)


def clip() -> Any:
    vision = TEXT | {"image_size": 16, "patch_size": 8}
    text = TEXT | SPECIAL | {"vocab_size": TOKENS, "max_position_embeddings": 32}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


@pytest.mark.parametrize(
    ("make", "names", "size"),
    [
        (bart, ["final_logits_bias", "model.shared.weight"], "vocab_size"),
        (marian, ["final_logits_bias", "model.shared.weight"], "decoder_vocab_size"),
        (modernbert, ["decoder.bias", "model.embeddings.tok_embeddings.weight"], "vocab_size"),
        (xlnet, ["lm_loss.bias", "transformer.word_embedding.weight"], "vocab_size"),
        (rwkv, ["head.weight", "rwkv.embeddings.weight"], "vocab_size"),
        (clip, ["text_model.embeddings.token_embedding.weight"], "text_config"),
    ],
)
def test_every_tensor_with_an_entry_for_each_token_follows(
    tmp_path: Path, make: Callable[[], Any], names: list[str], size: str
) -> None:
    base, expert, out, config = union(tmp_path, make)
    for name in names:
        assert_follows(base[name], expert[name], out[name])
    found = config[size]
    assert (found["vocab_size"] if isinstance(found, dict) else found) == ROWS
    for name in out.keys() - set(names):
        torch.testing.assert_close(out[name], (base[name] + expert[name]) / 2)


def test_codebooks_do_not_follow_the_tokenizer_of_texts(tmp_path: Path) -> None:
    """MusicGen has a vocabulary of texts and one for each codebook, here of the same size."""
    text = transformers.T5Config(vocab_size=TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    audio = transformers.EncodecConfig(
        num_filters=2, hidden_size=8, codebook_size=64, codebook_dim=8, upsampling_ratios=[2]
    )
    decoder = transformers.MusicgenDecoderConfig(
        vocab_size=TOKENS,
        num_hidden_layers=1,
        ffn_dim=48,
        num_attention_heads=4,
        hidden_size=32,
        num_codebooks=2,
        pad_token_id=TOKENS,
        bos_token_id=TOKENS,
    )
    config = transformers.MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)
    base, expert, out, written = union(tmp_path, lambda: transformers.MusicgenForConditionalGeneration(config))
    assert_follows(*(tensors["text_encoder.shared.weight"] for tensors in (base, expert, out)))
    for name in ("decoder.model.decoder.embed_tokens.1.weight", "decoder.lm_heads.1.weight"):
        torch.testing.assert_close(out[name], (base[name] + expert[name]) / 2)
    assert written["text_encoder"]["vocab_size"] == ROWS and written["decoder"]["vocab_size"] == TOKENS
    assert written["decoder"]["pad_token_id"] == TOKENS
    assert any("rows of another vocabulary" in note for note in written["notes"])


def test_tokens_beyond_the_rows_of_each_layer_have_the_first_row(tmp_path: Path) -> None:
    """Gemma 3n has fewer rows for each layer than tokens, and takes the first row for the others."""
    few = TOKENS - 2
    config = transformers.Gemma3nTextConfig(
        vocab_size=TOKENS,
        **TEXT | {"intermediate_size": [48], "num_key_value_heads": 2},
        head_dim=8,
        laurel_rank=4,
        vocab_size_per_layer_input=few,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0],
        layer_types=["full_attention"],
    )
    base, expert, out, written = union(tmp_path, lambda: transformers.Gemma3nForCausalLM(config))
    name = "model.embed_tokens_per_layer.weight"
    assert written["vocab_size_per_layer_input"] == written["vocab_size"] == ROWS
    shared = TOKENS - NEW
    torch.testing.assert_close(out[name][:shared], (base[name][:shared] + expert[name][:shared]) / 2)
    torch.testing.assert_close(out[name][shared:few], base[name][shared:few])
    torch.testing.assert_close(out[name][few:TOKENS], base[name][:1].expand(TOKENS - few, -1))
    torch.testing.assert_close(out[name][TOKENS : ROWS - 2], expert[name][shared:few])
    torch.testing.assert_close(out[name][ROWS - 2 :], expert[name][:1].expand(2, -1))


def test_rows_after_those_of_the_tokens_stay_the_last(tmp_path: Path) -> None:
    """Moshi's embedding has a row more than its head, which stands for the start of a text."""
    config = transformers.MoshiConfig(
        vocab_size=TOKENS, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48, head_dim=8
    )
    base, expert, out, _ = union(tmp_path, lambda: transformers.MoshiForCausalLM(config))
    name = "model.embed_tokens.weight"
    assert_follows(*(tensors["lm_head.weight"] for tensors in (base, expert, out)))
    assert out[name].shape[0] == ROWS + 1
    torch.testing.assert_close(out[name][ROWS], (base[name][TOKENS] + expert[name][TOKENS]) / 2)


def test_layers_that_transformers_leaves_out_follow(tmp_path: Path) -> None:
    """The layers of DeepSeek-V3 that predict further tokens hold copies of embedding and head."""
    make = lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=TOKENS, **TEXT))  # noqa: E731
    root = tmp_path / "plain"
    base, expert, _, _ = union(root, make)
    further = {f"model.layers.1.{name}.weight": "lm_head.weight" for name in ("embed_tokens", "shared_head.head")}
    for folder, tensors in ((root / "base", base), (root / "expert", expert)):
        more = {name: tensors[source].clone() for name, source in further.items()}
        save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    models = [{"model": str(root / name), "parameters": {"weight": 1.0}} for name in ("base", "expert")]
    merge_checkpoints(
        {"merge_method": "linear", "models": models, "tokenizer_source": "union", "dtype": "float32"}, root / "again"
    )
    out = load_model(root / "again")
    for name in further:
        assert_follows(base["lm_head.weight"], expert["lm_head.weight"], out[name])


def test_rows_that_a_configuration_names_follow_their_tokens(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=TOKENS, **TEXT, **SPECIAL)
    union(tmp_path, lambda: transformers.LlamaForCausalLM(config))
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_token_index": 39, "audio_token_id": 777}))
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1.0}} for name in ("base", "expert")]
    recipe = {"merge_method": "linear", "models": models, "tokenizer_source": "union"}
    merge_checkpoints(recipe, tmp_path / "out", overwrite=True)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["image_token_index"], written["audio_token_id"]) == (39, 777)
    with pytest.raises(
        MergeError, match="image_token_index is the row of 'word39', which the output's tokenizer lacks"
    ):
        merge_checkpoints(recipe | {"tokenizer_source": str(tmp_path / "expert")}, tmp_path / "out", overwrite=True)
