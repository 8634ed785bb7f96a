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
from hypothesis import given
from hypothesis import strategies as st
from oracles import mergekit_folder

from resm_kernels.checkpoint import CheckpointReader
from resm_kernels.engine import MergeError, merge_checkpoints, plan_merge, vocabulary
from resm_kernels.engine.token_tables import TokenTable
from resm_kernels.recipe import RecipeError, load_recipe

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (test extra)")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = ["<unk>", "<s>", "</s>", *(f"word{i}" for i in range(3, 12))]


def save_tokenizer(
    folder: Path, words: Sequence[str], added: Sequence[str] = (), merges: Sequence[Any] = (), pad: str | None = None
) -> None:
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(merges), unk_token="<unk>"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.add_tokens(list(added))
    if pad is not None:
        fast.pad_token = pad
    fast.save_pretrained(folder)


class Vocabularies:
    """A base and two experts, whose vocabularies differ."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.float32) -> None:
        self.root, self.out = root, root / "out"
        reordered = [*WORDS[:3], *reversed(WORDS[3:]), "first"]
        self.words = [(WORDS, ()), (reordered, ("<|im_start|>", "<|im_end|>")), (WORDS[:9], ("<|im_end|>", "other"))]
        self.folders = [root / name for name in ("base", "first", "second")]
        self.weights: list[dict[str, torch.Tensor]] = []
        for i, (folder, (words, added)) in enumerate(zip(self.folders, self.words, strict=True)):
            rows = len(words) + len(added) + (3 if i == 0 else 0)  # the base's embedding has rows that no token uses
            shape = {"layers": 1, "vocabulary": rows}
            with_vocabulary = random_weights(i + 7, dtype, **shape)
            tuned = fine_tuned(random_weights(0, dtype, **shape), i)
            self.weights.append(tuned | {name: with_vocabulary[name] for name in (EMBEDDING, HEAD)})
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
    expected = mergekit_folder(recipe, theirs)
    their_tokens = tokens_of(theirs)
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


def test_tokens_that_a_model_lacks_are_given_it_before_the_merge(family: Vocabularies) -> None:
    recipe = family.recipe("task_arithmetic", tokenizer_source="union")
    with plan_merge(recipe) as plan:
        (job,) = (job for job in plan.jobs if job.name == HEAD)
        inputs = [reader.read(info.name) for reader, info in job.inputs]
        assert plan.tokenizer is not None
        tokens = plan.tokenizer.tokens
    only_base, only_first, of_both = tokens["word11"], tokens["<|im_start|>"], tokens["<|im_end|>"]
    assert torch.equal(inputs[2][only_base], family.row(0, "word11", HEAD))
    for model in inputs:
        assert torch.equal(model[only_first], family.row(1, "<|im_start|>", HEAD))
    mean = (family.row(1, "<|im_end|>", HEAD) + family.row(2, "<|im_end|>", HEAD)) / 2
    assert torch.equal(inputs[0][of_both], mean)
    assert torch.equal(inputs[1][of_both], family.row(1, "<|im_end|>", HEAD))


def test_rows_that_are_only_moved_keep_their_bits_and_dtype(tmp_path: Path) -> None:
    family = Vocabularies(tmp_path, torch.bfloat16)
    recipe = {"merge_method": "linear", "models": [{"model": str(f)} for f in family.folders[1:]]}
    recipe["tokenizer_source"] = str(family.folders[2])
    with plan_merge(recipe) as plan:
        (job,) = (job for job in plan.jobs if job.name == EMBEDDING)
        assert [info.dtype for _, info in job.inputs] == [torch.float32, torch.bfloat16]
        assert [info.shape[0] for _, info in job.inputs] == [11, 11]
        assert type(job.inputs[1][0]).__name__ == "CheckpointReader", "the output has this model's vocabulary"
    tokens, ours = merged(family, recipe)
    assert ours[EMBEDDING].dtype == torch.bfloat16
    half = (family.row(1, "word5").float() + family.row(2, "word5").float()) / 2
    assert torch.equal(ours[EMBEDDING][tokens["word5"]], half.bfloat16())
    # Only the second model has "other". The first gets that row, so that the mean is the row itself.
    assert torch.equal(ours[EMBEDDING][tokens["other"]], family.row(2, "other"))


@given(st.data())
def test_rows_are_those_of_a_naive_copy(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any mixture of the model's rows, other models' rows, means, zeros and padding, read in pieces of any size."""
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
    heights = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    shapes = data.draw(st.sampled_from([(), (3,)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    tensors = [torch.randn((n, *shapes), generator=generator).to(data.draw(dtypes)) for n in heights]
    folder = tmp_path_factory.mktemp("rows")
    readers = []
    for i, tensor in enumerate(tensors):
        readers.append(CheckpointReader(save_model(folder / str(i), {EMBEDDING: tensor})))
    source = st.integers(0, len(tensors) - 1).flatmap(lambda i: st.tuples(st.just(i), st.integers(0, heights[i] - 1)))
    sources = st.lists(source, max_size=3, unique_by=lambda p: p[0]).map(tuple)
    kinds = st.integers(0, heights[0] - 1) | sources | st.just(None)
    rows = data.draw(st.lists(kinds, min_size=1, max_size=20).filter(lambda r: any(row is not None for row in r)))
    if data.draw(st.booleans()):
        rows = [*range(heights[0]), *rows]
    with pytest.MonkeyPatch.context() as patch:
        for name, least in (("CHUNK", 1), ("_GAP", 0), ("_MEANS", 1)):
            patch.setattr(vocabulary, name, data.draw(st.integers(least, 40)))
        model_rows = [row if isinstance(row, int) else -1 for row in rows]
        foreign = {i: row for i, row in enumerate(rows) if isinstance(row, tuple)}
        stored = [(reader, reader.tensors[EMBEDDING]) for reader in readers]
        model_tensors = vocabulary.ModelTensors(stored, TokenTable())
        aligned = vocabulary.AlignedReader(model_tensors, 0, model_rows, foreign).read(EMBEDDING)
    double = [tensor.double() for tensor in tensors]
    expected = torch.zeros((len(rows), *shapes), dtype=torch.float64)
    for i, row in enumerate(rows):
        if isinstance(row, int):
            expected[i] = double[0][row]
        elif row:
            expected[i] = sum(double[j][k] for j, k in row) / len(row)
    padding = [i for i, row in enumerate(rows) if row is None]
    if padding:
        expected[padding] = expected.sum(0) / (len(rows) - len(padding))
    has_means = any(len(sources) > 1 for sources in foreign.values())
    exact = aligned.dtype == tensors[0].dtype and not padding and not has_means
    torch.testing.assert_close(aligned.double(), expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    for reader in readers:
        reader.close()


def test_forced_means_have_the_same_bits_in_all_models(family: Vocabularies) -> None:
    """So that differences from the base are exactly zero there."""
    with plan_merge(family.recipe(tokenizer={"tokens": {"word4": {"force": True}}})) as plan:
        (job,) = (job for job in plan.jobs if job.name == EMBEDDING)
        assert plan.tokenizer is not None
        row = plan.tokenizer.tokens["word4"]
        rows = [reader.read(info.name)[row] for reader, info in job.inputs]
    # The base has the token, so that its row is what models without it would take.
    assert all(torch.equal(values, family.row(0, "word4")) for values in rows)
    models = [{"model": str(folder)} for folder in family.folders]
    recipe = {"merge_method": "linear", "models": models, "tokenizer": {"tokens": {"word4": {"force": True}}}}
    with plan_merge(recipe) as plan:
        (job,) = (job for job in plan.jobs if job.name == EMBEDDING)
        rows = [reader.read(info.name)[row] for reader, info in job.inputs]
    assert all(torch.equal(values, rows[0]) for values in rows)
    mean = sum(family.row(i, "word4").double() for i in range(3)) / 3
    torch.testing.assert_close(rows[0].double(), mean, rtol=1e-6, atol=1e-8)


def test_result_depends_on_neither_window_nor_threads(family: Vocabularies) -> None:
    recipe = family.recipe("ties", tokenizer={"pad_to_multiple_of": 16}, parameters={"density": 0.5})
    _, expected = merged(family, recipe)
    for choices in ({"memory_limit": "120MB"}, {"threads": 1}, {"max_shard_size": "1kB"}):
        _, ours = merged(family, recipe, **choices)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_special_tokens_keep_their_meaning(family: Vocabularies) -> None:
    """Ids in the configs follow their tokens; one that the output lacks becomes its tokenizer's token of that role."""
    words = ["</s>", "<unk>", "<s>", "<pad>", *WORDS[3:]]
    folder = family.root / "tokenizer"
    save_tokenizer(folder, words, pad="<pad>")
    config = llama_config(num_hidden_layers=1, vocab_size=15, pad_token_id=14, eos_token_id=[2, 5])
    (family.folders[0] / "config.json").write_text(json.dumps(config))
    (family.folders[0] / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.5}))
    merged(family, family.recipe(tokenizer_source=str(folder)))
    written = json.loads((family.out / "config.json").read_text())
    ids = [written[f"{role}_token_id"] for role in ("bos", "eos", "pad")]
    assert ids == [2, [0, words.index("word5")], 3]
    generation = json.loads((family.out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 0, "temperature": 0.5}


def test_output_loads_with_its_tokenizer(family: Vocabularies) -> None:
    merged(family, family.recipe(tokenizer={"source": "union", "pad_to_multiple_of": 8}, chat_template="chatml"))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(family.out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.out)
    assert model.config.vocab_size % 8 == 0 and model.config.vocab_size >= len(tokenizer)
    chat = [{"role": "user", "content": "word5"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nword5<|im_end|>\n"
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [tokens_of(family.out)["<|im_end|>"]]


def test_tied_models_have_one_embedding(family: Vocabularies) -> None:
    for folder, weights in zip(family.folders, family.weights, strict=True):
        del weights[HEAD]
        rows = len(weights[EMBEDDING])
        save_model(folder, weights, llama_config(num_hidden_layers=1, vocab_size=rows, tie_word_embeddings=True))
    tokens, ours = merged(family, family.recipe(tokenizer_source="union"))
    assert HEAD not in ours and len(ours[EMBEDDING]) == len(tokens)


def test_adapters_bring_their_base_models_vocabulary(family: Vocabularies) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (test extra)")
    model = transformers.AutoModelForCausalLM.from_pretrained(family.folders[1], dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(family.root / "adapter", save_embedding_layers=False)
    whole = adapted.merge_and_unload().model.embed_tokens.weight.detach()
    models = [{"model": f"{family.folders[1]}+{family.root / 'adapter'}"}, {"model": str(family.folders[2])}]
    recipe = {"merge_method": "linear", "models": models, "tokenizer_source": "union", "dtype": "float32"}
    tokens, ours = merged(family, recipe)
    words, added = family.words[1]
    row = [*words, *added].index("first")
    torch.testing.assert_close(ours[EMBEDDING][tokens["first"]], whole[row], rtol=1e-6, atol=1e-7)
    mean = (whole[words.index("word5")] + family.row(2, "word5")) / 2
    torch.testing.assert_close(ours[EMBEDDING][tokens["word5"]], mean, rtol=1e-6, atol=1e-7)


def test_slices_of_models_with_different_vocabularies(family: Vocabularies) -> None:
    _, first, second = family.folders
    slices = [{"sources": [{"model": str(folder), "layer_range": [0, 1]}]} for folder in (first, second)]
    recipe = {"merge_method": "linear", "slices": slices, "tokenizer": {"source": "union"}}
    tokens, ours = merged(family, recipe)
    assert torch.equal(ours[EMBEDDING][tokens["first"]], family.row(1, "first"))
    # The head is the last slice's, which has no row for words of the first model alone.
    assert torch.equal(ours[HEAD][tokens["other"]], family.row(2, "other", HEAD))
    assert not ours[HEAD][tokens["first"]].any()


@pytest.mark.parametrize("source", ["base", "union"])
@pytest.mark.parametrize("merges", [[], [("a", "b"), ("ab", "c")]], ids=["words", "merges"])
def test_tokens_beyond_the_embedding_are_left_out(family: Vocabularies, source: str, merges: list[Any]) -> None:
    """As in mergekit, where tokenizers with tokens that the model has no rows for are cut to those it has."""
    words = [*WORDS[:9], "a", "b", "c", *(["ab", "abc"] if merges else []), "late"]
    added = [f"more{i}" for i in range(5)]
    save_tokenizer(family.folders[0], words, added, merges=merges, pad="more4")
    recipe = family.recipe("task_arithmetic", tokenizer_source=source)
    size = 13 if merges else 15
    config = llama_config(num_hidden_layers=1, vocab_size=size)
    family.weights[0] |= {name: family.weights[0][name][:size].contiguous() for name in (EMBEDDING, HEAD)}
    save_model(family.folders[0], family.weights[0], config)
    tokens, _ = merged(family, recipe)
    assert not {"more4", "abc"} & set(tokens) and ("ab" in tokens) == bool(merges)
    if not merges:  # mergekit 0.1.5 leaves merges in that make a token it takes out, and special tokens
        mergekit_folder(recipe, family.root / "mergekit")
        assert set(tokens) == set(tokens_of(family.root / "mergekit")) - {"more4"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.out)
    assert tokenizer.pad_token is None
    assert tokenizer.tokenize("abc") == (["ab", "c"] if merges else ["a", "b", "c"])


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"sauce": "base"}, r"tokenizer.sauce: unknown key, did you mean 'source'\?; known: source, tokens, pad"),
        ({"pad_to_multiple_of": 0}, r"tokenizer.pad_to_multiple_of: .*greater than or equal to 1"),
        ({"tokens": {"a": {"forse": True}}}, r"tokenizer.tokens.a.forse: unknown key, did you mean 'force'"),
        (
            {"tokens": {"a": {"source": {"kind": "zeros"}}}},
            r"tokens.a.source: kind: got 'zeros', .*did you mean 'zero'",
        ),
        ({"tokens": {"a": {"source": {"kind": "zero", "b": 1}}}}, r"tokens.a.source: unknown key 'b'"),
        ({"tokens": {"a": {"source": {"kind": "model_token", "model": "m"}}}}, "exactly one of token and token_id"),
        (
            {"tokens": {"a": {"source": {"kind": "model_token", "model": "m", "token_id": -1}}}},
            r"token_id: got -1, need a whole number",
        ),
        ({"tokens": {"a": {"source": {"kind": "model_token", "token": "b"}}}}, r"model: got None, need one of"),
        ({"tokens": {"a": {"source": 3}}}, r"tokens.a.source: got 3, need a model, or a mapping"),
    ],
)
def test_tokenizers_that_are_none(family: Vocabularies, tokenizer: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(family.recipe(tokenizer=tokenizer))


def test_problems_with_vocabularies_are_named(family: Vocabularies) -> None:
    def refused(message: str, error: type[ValueError] = RecipeError, **keys: Any) -> None:
        with pytest.raises(error, match=message):
            merge_checkpoints(family.recipe(**keys), family.out)

    first = str(family.folders[1])
    refused("vocabularies differ in size: merge them with tokenizer_source: base or union", MergeError)
    refused(r"tokenizer.source: got './nowhere', which is no folder here", tokenizer={"source": "./nowhere"})
    for source, message in [
        ("./nowhere", r"tokenizer.tokens.x.source: got './nowhere', need one of the recipe's models"),
        (first, r"tokenizer.tokens.x.source: .*first has no token 'x'"),
        ({"kind": "model_token", "model": first, "token": "y"}, r"tokens.x.source: .*first has no token 'y'"),
        ({"kind": "model_token", "model": first, "token_id": 99}, r"got token_id 99, but .*first has 15 rows"),
    ]:
        refused(message, tokenizer={"tokens": {"x": {"source": source}}})
    for file in family.folders[2].glob("tokenizer*"):
        file.unlink()
    refused(r"tokenizer: .*second has none that transformers can load", tokenizer_source="union")


def test_missing_transformers_is_said(family: Vocabularies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(RecipeError, match=r"needs transformers, .*pip install 'resm-kernels\[tokenizers\]'"):
        merge_checkpoints(family.recipe(tokenizer_source="union"), family.out)


@given(st.data())
def test_parts_of_an_aligned_tensor_are_parts_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    family = Vocabularies(tmp_path_factory.mktemp("family"))
    recipe = family.recipe(tokenizer={"pad_to_multiple_of": 8})
    with plan_merge(recipe) as plan:
        (job,) = (job for job in plan.jobs if job.name == EMBEDDING)
        for reader, info in job.inputs:
            whole = reader.read(info.name).reshape(-1)
            start = data.draw(st.integers(0, info.numel - 1))
            count = data.draw(st.integers(1, info.numel - start))
            part = reader.read_info(info.elements(start, (count,)))
            assert torch.equal(part, whole[start : start + count])
