"""Experts that answer prompts: the answers, and the file that keeps them."""

from __future__ import annotations

import json
import logging
import os
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from experts import (
    BEGIN,
    ENDS,
    KINDS,
    UNKNOWN,
    WORDS,
    greedy,
    open_model,
    save_expert,
    transformers,
    word_tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from resm_kernels.calibrate import (
    CalibrationError,
    Sample,
    answer,
    answer_prompts,
    answers,
    load_model,
    load_samples,
    load_tokenizer,
    save_samples,
)
from resm_kernels.engine.models import Model

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def prompts_of(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of different lengths, not sorted by them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    return [(BEGIN, *torch.randint(6, 64, (n,), generator=generator).tolist()) for n in lengths]


def prompts_file(folder: Path, prompts: list[tuple[int, ...]]) -> Path:
    """The same prompts as text."""
    file = folder / "prompts.txt"
    file.write_text("".join(" ".join(f"w{i}" for i in ids[1:]) + "\n" for ids in prompts))
    return file


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6], ids=["alone", "small batches", "one batch"])
def test_answers_are_greedy(experts: Callable[[str], Path], kind: str, batch_tokens: int) -> None:
    model = open_model(experts(kind))
    loaded, tokenizer = load_model(model, **FLOAT32), load_tokenizer(model)
    own, prompts = loaded.generation_config, prompts_of(14)
    calls: list[tuple[int, int]] = []
    samples = answer(
        loaded,
        tokenizer,
        prompts,
        max_new_tokens=4,
        batch_tokens=batch_tokens,
        progress=lambda done, total: calls.append((done, total)),
    )
    expected = [greedy(loaded, ids, 4, ENDS) for ids in prompts]
    assert [s.tokens for s in samples] == [ids + tokens for ids, tokens in zip(prompts, expected, strict=True)]
    assert [s.answer_start for s in samples] == [len(ids) for ids in prompts]
    assert {tokens[-1] in ENDS for tokens in expected} == {True, False}, (
        "the test needs answers that end and answers that are cut off"
    )
    assert calls[-1] == (14, 14) and sorted(set(calls)) == calls and (len(calls) == 1) == (batch_tokens == 10**6)
    assert loaded.generation_config is own


def test_batches_keep_to_their_size(experts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(open_model(experts("Llama")), **FLOAT32)
    shapes: list[torch.Size] = []
    generate: Any = loaded.generate

    def spy(ids: torch.Tensor, **keys: Any) -> Any:
        shapes.append(ids.shape)
        return generate(ids, **keys)

    monkeypatch.setattr(loaded, "generate", spy)
    answer(loaded, word_tokenizer(), prompts_of(30), max_new_tokens=5, batch_tokens=60)
    assert all(rows == 1 or rows * (width + 5) <= 60 for rows, width in shapes)
    assert sum(rows for rows, _ in shapes) == 30 and len(shapes) < 15
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)


def test_the_end_token_is_the_tokenizers_if_the_settings_name_none(experts: Callable[[str], Path]) -> None:
    loaded, tokenizer = load_model(open_model(experts("Llama")), **FLOAT32), word_tokenizer()
    ids = prompts_of(3)[1]
    free = greedy(loaded, ids, 10, ())
    loaded.generation_config.eos_token_id = None
    tokenizer.eos_token = WORDS[free[3]]
    cut = free[: free.index(free[3]) + 1]
    assert answer(loaded, tokenizer, [ids], max_new_tokens=10) == [Sample(ids + cut, len(ids))]
    tokenizer.eos_token = None
    assert answer(loaded, tokenizer, [ids], max_new_tokens=10) == [Sample(ids + free, len(ids))]
    loaded.generation_config.eos_token_id = free[0]
    assert answer(loaded, tokenizer, [ids], max_new_tokens=10) == [Sample((*ids, free[0]), len(ids))]


@pytest.mark.parametrize(
    ("value", "name"), [(float("nan"), "model.layers.1.mlp.up_proj.weight"), (float("inf"), "lm_head.weight")]
)
def test_a_model_that_is_not_finite_is_named(tmp_path: Path, value: float, name: str) -> None:
    folder = save_expert(tmp_path / "sick")
    weights = load_file(folder / "model.safetensors")
    weights[name][3, 3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    file = prompts_file(tmp_path, prompts_of(3))
    with pytest.raises(CalibrationError, match=f"{folder}: gives logits that are NaN or infinite.*; need"):
        answer_prompts(open_model(folder), file, tmp_path / "cache", max_new_tokens=4)
    assert not (tmp_path / "cache").exists()


def test_prompts_that_exceed_the_context_are_refused(experts: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("w6\n" + "w6 " * 60)
    model = open_model(experts("GPT2"))
    options: dict[str, Any] = {"max_prompt_tokens": 100}
    assert len(answer_prompts(model, file, tmp_path / "a", max_new_tokens=3, **options)) == 2
    with pytest.raises(
        CalibrationError, match=r"p.txt, line 2: .* 65 tokens, but the model has only 64 positions; need"
    ):
        answer_prompts(model, file, tmp_path / "b", max_new_tokens=4, **options)
    with pytest.raises(
        CalibrationError, match="a prompt of 61 tokens and an answer of 4 need more than its 64 positions"
    ):
        answer(load_model(model, **FLOAT32), word_tokenizer(), [(6,) * 61], max_new_tokens=4)


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_tokens", "max_prompt_tokens", "max_prompts"])
def test_numbers_are_checked(experts: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    file = prompts_file(tmp_path, prompts_of(1))
    with pytest.raises(ValueError, match=f"{name}: got 0, need at least 1"):
        answer_prompts(open_model(experts("Llama")), file, tmp_path / "cache", **{name: 0})


def test_transformers_is_quiet_and_as_before(
    experts: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8}
    state = transformers.utils.logging
    model = open_model(experts("Mixtral"))
    level, bars = state.get_verbosity(), state.is_progress_bar_enabled()
    state.set_verbosity_info()
    state.enable_progress_bar()
    try:
        capfd.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            filters = list(warnings.filters)
            answer_prompts(model, prompts_file(tmp_path, prompts_of(5)), tmp_path / "c", **options)
            assert warnings.filters == filters
        assert capfd.readouterr() == ("", "")
        assert state.get_verbosity() == logging.INFO and state.is_progress_bar_enabled()
    finally:
        state.set_verbosity(level)
        if not bars:
            state.disable_progress_bar()


# The file of answers.


@st.composite
def sample(draw: st.DrawFn) -> Sample:
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=20))
    return Sample(tuple(tokens), draw(st.integers(1, len(tokens) - 1)))


@given(st.lists(sample(), max_size=6), st.text(max_size=20))
def test_samples_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, samples: list[Sample], key: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "round trip" / "cache.safetensors"
    save_samples(file, samples, key)
    assert load_samples(file, key) == samples
    assert load_samples(file, key + "x") is None
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_files_that_hold_no_answers_are_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    assert load_samples(file, "key") is None
    save_samples(file, [Sample((1, 2, 3), 2), Sample((4, 5), 1)], "key")
    whole = file.read_bytes()
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            assert load_samples(file, "key") is None  # a bit of the key
        except CalibrationError as error:
            assert str(error).startswith(f"{file}: ")
    for content in (whole[:-1], b"", b"notes"):
        file.write_bytes(content)
        with pytest.raises(CalibrationError, match="is no file of answers, or is damaged"):
            load_samples(file, "key")
    save_file({"tokens": torch.ones(3)}, file)
    with pytest.raises(CalibrationError, match="holds something else than answers; delete it or name another file"):
        load_samples(file, "key")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CalibrationError, match="need a regular file"):
            load_samples(path, "key")
    with pytest.raises(CalibrationError, match="cannot be written"):
        save_samples(file / "below", [], "key")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CalibrationError, match="folder: the answers cannot be written: Is a directory"):
        save_samples(tmp_path / "folder", [], "key")
    assert sorted(tmp_path.iterdir()) == before


def test_answers_are_kept_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = save_expert(tmp_path / "expert"), tmp_path / "new" / "cache"
    prompts = prompts_of(6)
    file = prompts_file(tmp_path, prompts)
    loads: list[weakref.ref[Any]] = []

    def counted(model: Model, **keys: Any) -> Any:
        loaded = load_model(model, **keys)
        loads.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(answers, "load_model", counted)
    options: dict[str, Any] = {"max_new_tokens": 8}

    def run(expected_loads: int, **changes: Any) -> list[Sample]:
        loads.clear()
        samples = answer_prompts(open_model(folder), file, cache, **options | changes)
        assert len(loads) == expected_loads and all(reference() is None for reference in loads)
        return samples

    samples = run(1)
    assert [s.tokens[: s.answer_start] for s in samples] == prompts
    assert run(0) == samples and run(0, batch_tokens=50) == samples
    assert run(1, max_new_tokens=2) != samples
    assert run(1) == samples
    assert run(1, max_prompts=2) == samples[:2] and run(1, dtype=torch.float64) == samples
    assert run(1) == samples
    with open(file, "a") as stream:
        stream.write("\n\n")
    assert run(0) == samples, "the prompts are the same"
    with open(file, "a") as stream:
        stream.write("w6 w7\n")
    assert run(1)[:6] == samples and run(0)[6].tokens[:3] == (BEGIN, 6, 7)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert run(0)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    run(1)
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert run(1)[0].tokens[:4] == samples[0].tokens[:4] and run(0)
    cache.write_bytes(b"notes")
    with pytest.raises(CalibrationError, match="is no file of answers"):
        run(0)


def test_an_expert_is_not_loaded_for_answers_that_are_there(
    experts: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p.jsonl"
    chat = [{"role": "user", "content": "w6"}, {"role": "assistant", "content": "w8"}]
    given = [{"prompt": "w6", "response": "w8 w9"}, {"messages": chat}]
    file.write_text("\n".join(map(json.dumps, given)))
    model = open_model(experts("Llama"))
    with monkeypatch.context() as patch:
        patch.setattr(answers, "load_model", None)
        first = answer_prompts(model, file, tmp_path / "a", max_new_tokens=4)
    assert first == [Sample((BEGIN, 6, 8, 9, 2), 2), Sample((4, 6, 3, 5, 8, 3), 4)]
    file.write_text("\n".join(map(json.dumps, [given[0], {"text": "w6 new"}, {"messages": chat[:1]}, given[1]])))
    mixed = answer_prompts(model, file, tmp_path / "b", max_new_tokens=4)
    asked = [(BEGIN, 6, UNKNOWN), (4, 6, 3, 5)]
    loaded = load_model(model, **FLOAT32)
    expected = [Sample(ids + greedy(loaded, ids, 4, ENDS), len(ids)) for ids in asked]
    assert mixed == [first[0], *expected, first[1]]
