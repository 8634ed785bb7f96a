"""Recipes of several documents: the same bits as a merge for each document, one after the other."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_blocks
import torch
import yaml
from checkpoints import Family, llama_config, load_model, save_adapter, save_model
from conftest import RunCommand
from kills import contents
from test_quantised_merge import store_fp8
from test_resume import Cut, stop_after, touch
from test_vocabulary import Vocabularies

from resm_kernels import _extension
from resm_kernels.checkpoint import CheckpointError
from resm_kernels.engine import MergeError, MergeOptions, checkpoint_stats, merge_checkpoints, plan_merge
from resm_kernels.recipe import RecipeError, load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

Documents = list[dict[str, Any]]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path)


def document(method: str, base: Any, *models: Any, name: str | None = None, **keys: Any) -> dict[str, Any]:
    """A document of a recipe; a model may be (model, weight)."""
    entries: Documents = []
    for model in models:
        path, weight = model if isinstance(model, tuple) else (model, None)
        entries.append({"model": str(path)} | ({} if weight is None else {"parameters": {"weight": weight}}))
    own = {"merge_method": method, "models": entries} | keys
    return ({} if name is None else {"name": name}) | own | ({} if base is None else {"base_model": str(base)})


def in_stages(documents: Documents, root: Path, **options: Any) -> Path:
    """Merge each document to a folder of its own, and return the output's."""
    text = yaml.safe_dump_all(documents)
    for own in documents:
        if name := own.get("name"):
            text = re.sub(rf"(model|source): {name}(?=\n|\+)", rf"\1: {root / name}", text)
    for own in yaml.safe_load_all(text):
        folder = root / own.pop("name", "output")
        merge_checkpoints(own, folder, **options)
    return root / "output"


def assert_like_stages(documents: Documents, family: Any, **options: Any) -> None:
    merge_checkpoints(documents, family.out, **options)
    expected = in_stages(documents, family.root / "stages", **options)
    ours, theirs = load_model(family.out), load_model(expected)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert json.loads((family.out / "config.json").read_text()) == json.loads((expected / "config.json").read_text())


def chain(family: Family, method: str = "ties", **keys: Any) -> Documents:
    """Two documents of experts, one of which reads the other, and an output of both."""
    base, (a, b, c) = family.base_folder, family.folders
    return [
        document("dare_ties", base, (a, 0.5), (b, 1.0), name="mixed", parameters={"density": 0.5}, **keys),
        document("linear", None, ("mixed", 0.25), (c, 0.75), name="averaged", **keys),
        document(method, base, "mixed", "averaged", c, dtype="bfloat16"),
    ]


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "resm", "model_stock"])
@pytest.mark.parametrize("dtype", [{}, {"dtype": "float32"}, {"dtype": "float32", "out_dtype": "float16"}])
def test_documents_are_merged_in_turn(family: Family, method: str, dtype: dict[str, str]) -> None:
    assert_like_stages(chain(family, method, **dtype), family)


def test_the_order_of_documents_does_not_matter(family: Family) -> None:
    documents = chain(family)
    merge_checkpoints(documents, family.out, model_card=False)
    expected = load_model(family.out)
    merge_checkpoints(documents[::-1], family.root / "reversed", model_card=False)
    merged = load_model(family.root / "reversed")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_equals_mergekit_multi(tmp_path: Path) -> None:
    pytest.importorskip("mergekit", reason="mergekit is the oracle")
    from mergekit.scripts.multimerge import main

    family = Family(tmp_path, dtype=torch.float32)
    base, (a, b, c) = family.base_folder, family.folders
    documents = [
        document("slerp", a, a, b, name="first", parameters={"t": [0.2, 0.8]}, dtype="float32"),
        document("task_arithmetic", base, ("first", 0.7), (c, 0.4), name="second", dtype="float32"),
        document("linear", None, ("first", 1.0), ("second", 2.0), (b, 0.5), dtype="float32"),
    ]
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump_all(documents))
    theirs = tmp_path / "theirs"
    arguments = [str(file), "--out-path", str(theirs), "-I", str(tmp_path / "kept"), "--no-copy-tokenizer"]
    main.main(args=[*arguments, "--quiet"], standalone_mode=False)
    merge_checkpoints(file, family.out)
    torch.testing.assert_close(load_model(family.out), load_model(theirs), rtol=1e-6, atol=1e-8)


def test_layers_that_a_document_stacks(family: Family) -> None:
    a, b = family.folders[:2]

    def piece(model: Any, first: int, end: int) -> dict[str, Any]:
        return {"sources": [{"model": str(model), "layer_range": [first, end]}]}

    documents = [
        {"name": "tall", "merge_method": "passthrough", "slices": [piece(a, 0, 3), piece(b, 1, 3)]},
        {
            "merge_method": "linear",
            "slices": [piece("tall", 0, 2), piece("tall", 3, 5), piece(b, 0, 1)],
            "dtype": "float32",
        },
    ]
    assert_like_stages(documents, family)
    assert json.loads((family.out / "config.json").read_text())["num_hidden_layers"] == 5


def test_an_adapter_on_a_document(family: Family) -> None:
    a, b = family.folders[:2]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    factors = {name.format("A"): torch.randn(2, 32), name.format("B"): torch.randn(32, 2)}
    adapter = save_adapter(
        family.root / "adapter", factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    )
    documents = [
        document("linear", None, a, b, name="mean"),
        document("ties", "mean", f"mean+{adapter}", a, parameters={"density": 0.5}),
    ]
    assert_like_stages(documents, family)
    recipe = document("task_arithmetic", "mean", adapter, adapter)
    assert_like_stages([documents[0], recipe], family, overwrite=True)


def test_a_vocabulary_that_a_document_merges(tmp_path: Path) -> None:
    family = Vocabularies(tmp_path)
    base, first, second = family.folders
    documents = [
        document("linear", base, base, first, name="joint", tokenizer_source="union", dtype="float32"),
        document("linear", "joint", "joint", (second, 0.5), tokenizer_source="union", dtype="float32"),
    ]
    assert_like_stages(documents, family)
    assert (family.out / "tokenizer.json").read_bytes() == (tmp_path / "stages/output/tokenizer.json").read_bytes()


def test_a_document_of_quantised_weights(family: Family) -> None:
    base, (a, b, c) = family.base_folder, family.folders
    store_fp8(base)
    documents = [
        document("ties", base, a, b, name="small", out_dtype="fp8"),
        document("linear", None, "small", c, dtype="float32"),
    ]
    assert_like_stages(documents, family)
    kept = json.loads((family.root / "stages" / "small" / "config.json").read_text())
    assert kept["quantization_config"]["quant_method"] == "fp8"


@pytest.mark.skipif(_extension.native is None, reason="blocks need the compiled extension")
def test_memory_is_bounded_and_does_not_change_the_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_blocks, "ROWS", 60_000)
    family = test_blocks.LargeFamily(tmp_path)
    base, (a, b, c) = family.base_folder, family.folders
    documents = [
        document("ties", base, a, b, name="mixed", parameters={"density": 0.5}),
        document("ties", base, "mixed", c, parameters={"density": 0.4}),
    ]
    limit, file = 24_000_000, "model.safetensors"
    with plan_merge(documents, options=MergeOptions(memory_limit=limit)) as plan:
        assert all(len(own.pieces) > len(own.jobs) for own in (plan, plan.documents["mixed"]))
    report = merge_checkpoints(documents, family.out, model_card=False, memory_limit=limit)
    assert report.memory_peak <= report.memory_bound <= limit
    expected = in_stages(documents, tmp_path / "stages", model_card=False)
    assert (expected / file).read_bytes() == (family.out / file).read_bytes()
    with pytest.raises(MergeError, match=r"document 'mixed': memory_limit: got .*, need at least"):
        merge_checkpoints(documents, tmp_path / "no", memory_limit=1000)


REFUSED: list[tuple[Documents, str]] = [
    ([document("linear", None, "x", "y", name="a")], "recipe: name: every document has a name, need one without"),
    (
        [document("linear", None, "x", "y"), document("linear", None, "x", "y")],
        "recipe: document 2: name: missing, as in document 1",
    ),
    (
        [document("linear", None, "x", "y", name="a"), document("ties", "x", "y", name="a")],
        "recipe: document 'a': name: got 'a', which is document 1's name already",
    ),
    (
        [
            document("linear", None, "x", "b", name="a"),
            document("linear", None, "a", "y", name="b"),
            document("linear", None, "a", "y"),
        ],
        r"recipe: document 'b': models\[0\]\.model: documents must not refer to each other in a circle \(a → b → a\)",
    ),
    (
        [document("linear", None, "x", "a+lora", name="a"), document("linear", None, "a", "y")],
        r"document 'a': models\[1\]\.model: .* circle \(a → a\)",
    ),
    ([document("linear", None, "x", name="../a"), document("linear", None, "a", "y")], "name: got '../a', need a text"),
    ([document("linear", None, "x", name="a"), {"merge_method": "linaer"}], "recipe: document 2: merge_method: "),
    ([document("linear", None, "x", name="a"), 5], "recipe: document 2: got int, need a mapping"),  # type: ignore[list-item]
    ([document("linear", None, "x", name=f"d{i}") for i in range(101)], "has 101 documents, need at most 100"),
    ([], "recipe: is empty"),
]


@pytest.mark.parametrize(("documents", "message"), REFUSED)
def test_documents_that_do_not_fit_together_are_refused(documents: Documents, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(documents)


def test_errors_in_a_file_name_line_and_document(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yml"
    first = "name: a\nmerge_method: linear\nmodels:\n- model: x\n"
    file.write_text(f"{first}---\nname: b\nmerge_method: linear\nmodels:\n- modle: a\n")
    with pytest.raises(RecipeError, match=r"recipe.yml:9: document 'b': models\[0\]\.modle: unknown key, did"):
        load_recipe(file)
    file.write_text(f"{first}---\n# nothing\n")
    with pytest.raises(RecipeError, match=r"recipe.yml:\d: document 2: got nothing, need a mapping"):
        load_recipe(file)
    file.write_text(f"{first}---\n{first}---\n{first.partition(chr(10))[2]}")
    with pytest.raises(RecipeError, match=r"recipe.yml:6: document 'a': name: got 'a', which is document 1's name"):
        load_recipe(file)


def test_errors_of_a_document_name_it(family: Family) -> None:
    base, (a, b, c) = family.base_folder, family.folders
    documents = [document("ties", base, a, "nowhere", name="first"), document("linear", None, "first", b)]
    message = r"document 'first': models\[1\]\.model: got 'nowhere', which is no folder here"
    with pytest.raises(RecipeError, match=message):
        merge_checkpoints(documents, family.out)
    documents[1]["models"][1]["model"] = "frist"
    documents[0]["models"][1]["model"] = str(b)
    with pytest.raises(RecipeError, match=r"^models\[1\]\.model: got 'frist'.* or the name of a document: first$"):
        merge_checkpoints(documents, family.out)
    family.change(1, model__norm__weight=torch.full((32,), torch.nan))
    documents[1]["models"][1]["model"] = str(c)
    damaged = r"document 'first': .*expert1: tensor 'model.norm.weight' holds 32 NaN or infinite values"
    with pytest.raises(MergeError, match=damaged):
        merge_checkpoints(documents, family.out)
    assert family.leftovers() == []
    unread = [*documents, document("linear", None, a, b, name="alone")]
    with pytest.raises(RecipeError, match="document 'alone': no other document refers to it, so that it has no effect"):
        merge_checkpoints(unread, family.out)


def test_models_that_a_document_does_not_fit(family: Family) -> None:
    a, b = family.folders[:2]
    other = save_model(family.root / "other", family.base, llama_config(model_type="mistral"))
    documents = [document("linear", None, a, b, name="mean"), document("linear", None, other, "mean")]
    with pytest.raises(MergeError, match="mean: another architecture: model_type is 'llama', need 'mistral'"):
        merge_checkpoints(documents, family.out)


def test_nothing_temporary_stays(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = tempfile.mkdtemp

    def noted(*args: Any, **kwargs: Any) -> str:
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("resm_kernels.engine.documents.tempfile.mkdtemp", noted)
    merge_checkpoints(chain(family), family.out)
    family.change(2, model__norm__weight=None)
    with pytest.raises(MergeError, match=r"expert2: tensor 'model.norm.weight' is missing"):
        merge_checkpoints(chain(family), family.root / "no")
    assert len(made) >= 2 and not any(map(os.path.exists, made))


def test_what_is_left_out_of_a_documents_models_is_said(family: Family) -> None:
    pytest.importorskip("transformers", reason="the names come from transformers or a table")
    base, (a, b, c) = family.base_folder, family.folders
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    save_model(a, family.experts[0] | frequencies)
    documents = [document("linear", None, a, b, name="mean"), document("ties", base, "mean", c)]
    note = f"document 'mean': {a}: leaves out 1 vector of rotary frequencies"
    report = merge_checkpoints(documents, family.out)
    assert any(line.startswith(note) for line in report.notes)
    with pytest.raises(MergeError, match=f"document 'mean': strict: {a}: leaves out"):
        merge_checkpoints(documents, family.root / "no", strict=True)
    said: list[str] = []
    rows = checkpoint_stats(documents, say=said.extend)
    assert any(line.startswith(f"note: {note}") for line in said) and len(rows) == 30
    with pytest.raises(MergeError, match="strict: "):
        checkpoint_stats(documents, strict=True)


def cut_off(documents: Documents, out: Path, tensors: int, **options: Any) -> None:
    """Merge until so many tensors are written, those of kept documents included, and stop there."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, tensors)
        with pytest.raises(Cut):
            merge_checkpoints(documents, out, **options)


def test_a_merge_of_documents_goes_on(family: Family) -> None:
    documents = chain(family)
    merge_checkpoints(documents, family.root / "whole" / "out")
    cut_off(documents, family.out, 12)
    assert merge_checkpoints(documents, family.out).tensors_resumed == 12
    assert contents(family.out) == contents(family.root / "whole" / "out")
    assert family.leftovers() == ["out"]


def test_another_input_of_a_document_is_another_merge(family: Family) -> None:
    documents = chain(family)
    cut_off(documents, family.out, 12)
    touch(family.folders[0] / "model.safetensors")  # which only the first document reads
    with pytest.raises(CheckpointError, match=r"another input file .*expert0/model.safetensors"):
        merge_checkpoints(documents, family.out)
    assert merge_checkpoints(documents, family.out, restart=True).tensors_resumed == 0


def test_merges_of_documents_are_kept(family: Family) -> None:
    documents, kept = chain(family), family.root / "kept"
    merge_checkpoints(documents, family.root / "streamed", model_card=False)
    report = merge_checkpoints(documents, family.out, keep_intermediates=kept, model_card=False)
    assert f"document 'mixed': its merge is kept in {kept / 'mixed'}" in report.notes
    expected = in_stages(documents, family.root / "stages")
    for name, folder in (("mixed", kept / "mixed"), ("averaged", kept / "averaged"), ("output", family.out)):
        ours, theirs = load_model(folder), load_model(expected.parent / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    streamed = load_model(family.root / "streamed")
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in load_model(family.out).items())


def test_kept_merges_are_used_again_if_they_are_the_same(family: Family) -> None:
    documents, kept = chain(family), family.root / "kept"
    cut_off(documents, family.out, 30 + 12, keep_intermediates=kept)
    first = kept / "mixed" / "model.safetensors"
    before = first.stat().st_mtime_ns
    assert not (kept / "averaged").exists()
    merge_checkpoints(documents, family.out, keep_intermediates=kept)
    assert first.stat().st_mtime_ns == before
    documents[2]["models"].pop()  # another output, of the same documents
    merge_checkpoints(documents, family.out, keep_intermediates=kept, overwrite=True)
    assert first.stat().st_mtime_ns == before
    documents[0]["parameters"]["density"] = 0.25
    with pytest.raises(CheckpointError, match=r"document 'mixed': output .*kept/mixed: exists and is not empty"):
        merge_checkpoints(documents, family.root / "other", keep_intermediates=kept)
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    documents[0]["parameters"]["density"] = 0.5
    with pytest.raises(CheckpointError, match=r"document 'mixed': output .*kept/mixed: exists and is not empty"):
        merge_checkpoints(documents, family.root / "other", keep_intermediates=kept)
    merge_checkpoints(documents, family.root / "other", keep_intermediates=kept, overwrite=True)
    assert first.stat().st_mtime_ns != before


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda f: f.root, r"output .*/mixed: exists and is not empty"),
        (lambda f: f.out.parent / "kept", r"output .*: is or contains the input"),
    ],
)
def test_places_that_documents_cannot_have(family: Family, keep: Callable[[Family], Path], message: str) -> None:
    (family.root / "mixed").mkdir()
    (family.root / "mixed" / "notes.txt").write_text("mine")
    out = family.out if "exists" in message else family.root / "kept" / "averaged"
    with pytest.raises(CheckpointError, match=message):
        merge_checkpoints(chain(family), out, keep_intermediates=keep(family))
    assert (family.root / "mixed" / "notes.txt").read_text() == "mine"


def test_a_document_whose_name_a_folder_has(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family.root)
    (family.root / "mixed").mkdir()
    with plan_merge(chain(family), family.out) as plan:
        assert any(note.startswith("'mixed' means the document of that name, not the folder") for note in plan.notes)


def test_one_document_leaves_nothing_to_keep(family: Family) -> None:
    with plan_merge(family.recipe(), options=MergeOptions(keep_intermediates="kept")) as plan:
        assert plan.notes == ("keep_intermediates: the recipe has one document, so that there are none",)


def test_the_command_shows_all_documents(family: Family, run: RunCommand) -> None:
    file, kept = family.root / "recipe.yml", family.root / "kept"
    file.write_text(yaml.safe_dump_all(chain(family)))
    code, out, err = run("merge", file, family.out, "--dry-run")
    assert code == 0, err
    blocks = out.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [
        "document      mixed: its tensors are merged when they are read",
        "document      averaged: its tensors are merged when they are read",
        "document      the output",
    ]
    assert "method        dare_ties" in blocks[0] and "expert        mixed" in blocks[1] and "estimate " in blocks[2]
    assert not family.out.exists()
    code, out, err = run("merge", file, "--out-path", family.out, "-I", kept, "--no-lazy", "--lazy-unpickle")
    assert code == 0, err
    assert f"document 'mixed': its merge is kept in {kept / 'mixed'}" in err
    assert (kept / "mixed" / "config.json").exists() and (family.out / "config.json").exists()
    card = (family.out / "README.md").read_text()
    assert "name: mixed" in card and "merge_method: ties" in card
    assert "merge_method: ties" not in (kept / "averaged" / "mergekit_config.yml").read_text()


def test_mergekit_runs_recipes_of_several_documents(family: Family, run: RunCommand) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed (test extra)")
    base, (a, b, c) = family.base_folder, family.folders
    documents = [
        document("resm", base, a, b, name="first", dtype="float32"),
        document("linear", None, ("first", 1.0), (c, 1.0), dtype="float32"),
    ]
    file = family.root / "recipe.yml"
    file.write_text(yaml.safe_dump_all(documents))
    for more in ([], ["-I", str(family.root / "kept")]):
        out = family.root / f"theirs{len(more)}"
        code, _, err = run("mergekit", file, out, "--no-copy-tokenizer", "--quiet", *more)
        assert code == 0, err
        merged = load_model(out)
    merge_checkpoints(documents, family.out)
    assert (family.root / "kept" / "first" / "config.json").exists()
    assert not [p for p in family.root.iterdir() if p.name.startswith(".theirs")]
    torch.testing.assert_close(load_model(family.out), merged, rtol=1e-5, atol=1e-6)
