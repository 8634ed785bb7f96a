"""Polishing: targets, the held-out share, one step against float64, determinism, tied parameters, errors."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.polish import PolishOptions, PolishReport, polish, write_targets
from resm_kernels.calibrate.prompts import Sample

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY = 29


def llama(seed: int, **config: Any) -> LlamaForCausalLM:
    settings = {"tie_word_embeddings": True, "vocab_size": VOCABULARY, "initializer_range": 0.2} | config
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1, max_position_embeddings=32, **settings))


def draw_samples(seed: int, count: int, longest: int = 12) -> list[Sample]:
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        length = rng.randint(2, longest)
        samples.append(Sample(tuple(rng.choices(range(VOCABULARY), k=length)), rng.randint(1, length - 1)))
    return samples


def oracle_log_probs(model: PreTrainedModel, sample: Sample) -> Tensor:
    """One sample alone, without padding, in float64."""
    wide = copy.deepcopy(model).double()
    logits = wide(input_ids=torch.tensor([sample.tokens])).logits[0]
    return logits[sample.answer_start - 1 : -1].log_softmax(-1)


def oracle_kl(student: PreTrainedModel, expert: PreTrainedModel, samples: list[Sample]) -> Tensor:
    """KL(expert ‖ student), the mean over the answer positions of all samples."""
    q = torch.cat([oracle_log_probs(expert, s) for s in samples]).detach()
    p = torch.cat([oracle_log_probs(student, s) for s in samples])
    return (q.exp() * (q - p)).sum(-1).mean()


class Case:
    """Two experts, their samples and files."""

    def __init__(self, folder: Path, counts: tuple[int, ...] = (12, 9), **config: Any) -> None:
        self.student = llama(0, **config)
        self.experts = [llama(1 + t, **config) for t in range(len(counts))]
        self.samples = [draw_samples(t, count) for t, count in enumerate(counts)]
        self.files = [folder / f"{t}.npy" for t in range(len(counts))]
        for expert, samples, file in zip(self.experts, self.samples, self.files, strict=True):
            write_targets(expert, samples, file)

    def polish(self, student: PreTrainedModel | None = None, **options: Any) -> PolishReport:
        chosen = PolishOptions(**({"steps": 6, "batch": 4, "evaluate_every": 2, "learning_rate": 0.01} | options))
        return polish(student or self.student, self.samples, self.files, chosen)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def weights(model: PreTrainedModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------------- targets


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_targets_are_the_experts_log_probabilities_at_answer_positions(tmp_path: Path, batch_tokens: int) -> None:
    model, samples = llama(1), draw_samples(3, 15)
    expected = torch.cat([oracle_log_probs(model, s) for s in samples]).detach().numpy()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2.0**-11)):
        write_targets(model, samples, tmp_path / "t.npy", dtype=dtype, batch_tokens=batch_tokens)
        rows = np.load(tmp_path / "t.npy", mmap_mode="r")
        assert torch.from_numpy(np.array(rows)).dtype == dtype
        assert rows.shape == (sum(len(s.tokens) - s.answer_start for s in samples), VOCABULARY)
        np.testing.assert_allclose(rows, expected, rtol=tolerance * 1.01, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npy"]


def test_batches_of_targets_stay_within_the_bound(tmp_path: Path) -> None:
    model, samples, sizes = llama(1), draw_samples(3, 40), []
    model.register_forward_pre_hook(lambda _, __, words: sizes.append(words["input_ids"].shape), with_kwargs=True)
    write_targets(model, samples, tmp_path / "t.npy", batch_tokens=50)
    assert sum(rows for rows, _ in sizes) == 40
    assert all(rows * width <= 50 for rows, width in sizes) and max(rows for rows, _ in sizes) > 1


def test_impossible_tokens_have_finite_targets(tmp_path: Path) -> None:
    model, samples = llama(1, tie_word_embeddings=False), draw_samples(3, 5)
    with torch.no_grad():
        model.lm_head.weight *= 1e6
    write_targets(model, samples, tmp_path / "t.npy")
    rows = np.load(tmp_path / "t.npy")
    assert rows.min() == -65504 and np.isfinite(rows).all()
    options = PolishOptions(steps=0)
    report = polish(llama(2, tie_word_embeddings=False), [samples], [tmp_path / "t.npy"], options)
    assert 0 < report.kept.mean < 100


@pytest.mark.parametrize(
    ("samples", "dtype", "message"),
    [
        ([], torch.float16, "samples: got none, need at least one"),
        ([Sample((1, 2), 1)], torch.bfloat16, r"dtype: got torch.bfloat16, need torch.float16 or torch.float32"),
    ],
)
def test_bad_samples_and_dtypes_are_named(
    tmp_path: Path, samples: list[Sample], dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_targets(llama(1), samples, tmp_path / "t.npy", dtype=dtype)


def test_a_model_that_predicts_nan_leaves_no_file(tmp_path: Path) -> None:
    model, good = llama(1), draw_samples(3, 3)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(CalibrationError, match=r"model: predicts NaN for samples among .*, need finite predictions"):
        write_targets(model, [*good, Sample((7, 7), 1)], tmp_path / "t.npy", batch_tokens=1)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- held-out share


def test_the_kept_weights_have_the_least_held_out_kl(case: Case) -> None:
    start = copy.deepcopy(case.student)
    report = case.polish(steps=20)
    assert report.steps == 20 and [e.step for e in report.evaluations] == list(range(0, 21, 2))
    assert report.kept == min(report.evaluations, key=lambda e: e.mean)
    assert report.kept.mean < 0.8 * report.evaluations[0].mean
    # The figures are those of the student at the start and as it is now, by another way to compute them.
    for model, measured in ((start, report.evaluations[0]), (case.student, report.kept)):
        for t, held_out in enumerate(report.held_out):
            expected = oracle_kl(model, case.experts[t], [case.samples[t][i] for i in held_out])
            assert measured.experts[t] == pytest.approx(expected.item(), rel=1e-3)
        assert measured.mean == pytest.approx(np.mean(measured.experts))


def test_polishing_that_does_harm_keeps_the_start(case: Case) -> None:
    before = weights(case.student)
    report = case.polish(learning_rate=1.0, warmup=0, steps=2)
    assert report.kept.step == 0 and all(e.mean > report.kept.mean for e in report.evaluations[1:])
    assert same(weights(case.student), before)


def test_the_last_step_is_measured(case: Case) -> None:
    assert [e.step for e in case.polish(steps=5, evaluate_every=3).evaluations] == [0, 3, 5]


def test_held_out_samples_are_never_trained_on_and_batches_are_balanced(case: Case) -> None:
    trained: list[list[tuple[int, ...]]] = []

    def spy(_: Any, __: Any, words: dict[str, Tensor]) -> None:
        if torch.is_grad_enabled():
            trained.append([tuple(row) for row in words["input_ids"].tolist()])

    case.student.register_forward_pre_hook(spy, with_kwargs=True)
    report = case.polish(steps=9, batch=4, held_out=0.25)
    assert [len(held_out) for held_out in report.held_out] == [3, 2]
    assert [len(batch) for batch in trained] == [4] * 18
    for t, samples in enumerate(case.samples):
        seen = [row for batch in trained[t::2] for row in batch]
        for i, sample in enumerate(samples):
            read = sample.tokens[:-1]
            times = sum(row[: len(read)] == read and not any(row[len(read) :]) for row in seen)
            # 36 draws from 9 or from 7 samples, in turns.
            assert times == 0 if i in report.held_out[t] else times in ((4,) if t == 0 else (5, 6))


@given(count=st.integers(2, 40), share=st.floats(0.001, 0.999), seed=st.integers(0, 5))
def test_held_out_share(tmp_path_factory: pytest.TempPathFactory, count: int, share: float, seed: int) -> None:
    samples = [Sample((1, i % VOCABULARY), 1) for i in range(count)]
    file = tmp_path_factory.mktemp("share") / "t.npy"
    np.save(file, np.full((count, VOCABULARY), -np.log(VOCABULARY), np.float32))
    report = polish(llama(0), [samples], [file], PolishOptions(steps=0, held_out=share, seed=seed))
    (held_out,) = report.held_out
    assert len(held_out) == min(max(1, round(share * count)), count - 1)
    assert list(held_out) == sorted(set(held_out)) and set(held_out) <= set(range(count))
    assert len(report.evaluations) == 1 and report.kept.step == 0


# ---------------------------------------------------------------------- steps


def test_one_step_against_float64(case: Case) -> None:
    """The first step of AdamW is lr·g/(|g| + ε): the signs of the gradient of the mean of the experts' mean KL."""
    oracle = copy.deepcopy(case.student).double()
    report = case.polish(copy.deepcopy(case.student), steps=0)
    losses = []
    for t, samples in enumerate(case.samples):
        trained = [s for i, s in enumerate(samples) if i not in report.held_out[t]]
        q = torch.cat([oracle_log_probs(case.experts[t], s) for s in trained]).detach()
        logits = [oracle(input_ids=torch.tensor([s.tokens])).logits[0, s.answer_start - 1 : -1] for s in trained]
        losses.append((q.exp() * (q - torch.cat(logits).log_softmax(-1))).sum(-1).mean())
    (sum(losses) / len(losses)).backward()
    before = weights(case.student)
    # With 11 and 8 samples to train on, batches of 88 have each of them equally often.
    rate, warmup = 1e-4, 3
    case.polish(steps=1, batch=88, learning_rate=rate, warmup=warmup)
    compared = 0
    for start, now, reference in zip(before, weights(case.student), oracle.parameters(), strict=True):
        assert reference.grad is not None
        clear = reference.grad.abs() > 1e-3
        expected = -rate / (warmup + 1) * reference.grad.sign()
        torch.testing.assert_close((now - start)[clear].double(), expected[clear], rtol=0.02, atol=1e-8)
        compared += int(clear.sum())
    assert compared > 1000


def test_an_expert_counts_the_same_however_long_its_answers_are(tmp_path: Path) -> None:
    short = [Sample((1, 2, 3), 2)] * 4
    long = [Sample((1, *range(2, 20)), 2)] * 4
    files = [tmp_path / "short.npy", tmp_path / "long.npy"]
    for expert, samples, file in zip((llama(1), llama(2)), (short, long), files, strict=True):
        write_targets(expert, samples, file)
    report = polish(llama(0), [short, long], files, PolishOptions(steps=0))
    expected = [oracle_kl(llama(0), llama(1), short).item(), oracle_kl(llama(0), llama(2), long).item()]
    assert report.kept.experts == pytest.approx(expected, rel=1e-3)
    assert report.kept.mean == pytest.approx(sum(expected) / 2, rel=1e-3)


def test_float16_targets_polish_like_float32(case: Case) -> None:
    other = copy.deepcopy(case.student)
    half = case.polish()
    for expert, samples, file in zip(case.experts, case.samples, case.files, strict=True):
        write_targets(expert, samples, file, dtype=torch.float32)
    full = case.polish(other)
    assert half.kept.mean == pytest.approx(full.kept.mean, rel=1e-3)


def test_the_same_arguments_give_the_same_bits_and_leave_torchs_generator_alone(case: Case) -> None:
    runs = []
    state = torch.get_rng_state()
    for seed in (0, 0, 1):
        student = copy.deepcopy(case.student)
        runs.append((case.polish(student, seed=seed), weights(student)))
        torch.rand(3)
    torch.set_rng_state(state)
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    assert runs[0][0].held_out != runs[2][0].held_out and not same(runs[0][1], runs[2][1])


def test_nothing_random_is_drawn(case: Case) -> None:
    state = torch.get_rng_state()
    case.polish()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tmp_path: Path, tied: bool) -> None:
    case = Case(tmp_path, tie_word_embeddings=tied)
    before = case.student.lm_head.weight.detach().clone()
    assert case.polish().kept.step > 0
    embeddings, head = case.student.model.embed_tokens.weight, case.student.lm_head.weight
    assert (embeddings is head) == tied and not torch.equal(head, before)
    assert all(parameter.grad is None and parameter.dtype == torch.float32 for parameter in case.student.parameters())


def test_checkpointing_computes_layers_twice_with_the_same_result_and_no_dropout(tmp_path: Path) -> None:
    case = Case(tmp_path, attention_dropout=0.5)
    calls: dict[bool, int] = {}
    reports = {}
    for checkpointing in (False, True):
        student = copy.deepcopy(case.student)
        count = [0]
        student.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + 1)
        )
        reports[checkpointing] = case.polish(student, gradient_checkpointing=checkpointing)
        calls[checkpointing] = count[0]
        assert not any(
            module.training or getattr(module, "gradient_checkpointing", False) for module in student.modules()
        )
    assert calls[True] == calls[False] + 6 * 2  # once more for each expert in each step
    for plain, checked in zip(reports[False].evaluations, reports[True].evaluations, strict=True):
        assert plain.experts == pytest.approx(checked.experts, rel=1e-4)


def test_progress_is_told(case: Case) -> None:
    told: list[tuple[int, int]] = []
    options = PolishOptions(steps=3, batch=2)
    polish(case.student, case.samples, case.files, options, lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


# ---------------------------------------------------------------------- errors


def few_samples(case: Case) -> None:
    case.samples[1] = case.samples[1][:1]


def half_student(case: Case) -> None:
    case.student = case.student.to(torch.bfloat16)


def one_file(case: Case) -> None:
    case.files.pop()


def other_samples(case: Case) -> None:
    case.samples[0] = case.samples[0][:-1]


def other_vocabulary(case: Case) -> None:
    case.student = llama(0, vocab_size=VOCABULARY + 1)


def nan_student(case: Case) -> None:
    with torch.no_grad():
        next(case.student.parameters())[:] = torch.nan


def nan_targets(case: Case) -> None:
    np.save(case.files[1], np.full_like(np.load(case.files[1]), np.nan))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (few_samples, r"samples\[1\]: got 1 samples, need at least 2: one to train on, one to hold out"),
        (half_student, "student: has parameters in torch.bfloat16, need all in torch.float32"),
        (one_file, "targets: got 1 files for 2 experts, need one for each of them"),
        (other_samples, r"0.npy: has shape .*, need \d+ rows, one for each answer position of samples\[0\]"),
        (other_vocabulary, "0.npy: has 29 tokens, but the student predicts 30; need one vocabulary"),
        (nan_student, r"the held-out KL of samples\[0\] after 0 steps is nan, need a finite number"),
        (nan_targets, r"the held-out KL of samples\[1\] after 0 steps is nan, need a finite number"),
    ],
)
def test_bad_arguments_are_named(case: Case, spoil: Callable[[Case], None], message: str) -> None:
    spoil(case)
    with pytest.raises(CalibrationError, match=message):
        case.polish()


def test_no_experts_are_an_error(case: Case) -> None:
    with pytest.raises(CalibrationError, match="targets: got 0 files for 0 experts"):
        polish(case.student, [], [])


def test_a_loss_that_is_not_finite_is_an_error(case: Case) -> None:
    with pytest.raises(
        CalibrationError, match=r"KL of samples\[\d\] .* is (nan|inf), need a finite number; .*learning_rate"
    ):
        case.polish(learning_rate=1e30, warmup=0)


@pytest.mark.parametrize(
    ("option", "value", "need"),
    [
        ("steps", -1, "at least 0"),
        ("batch", 0, "at least 1"),
        ("warmup", -1, "at least 0"),
        ("evaluate_every", 0, "at least 1"),
        ("learning_rate", 0.0, "a finite number above 0"),
        ("learning_rate", float("nan"), "a finite number above 0"),
        ("learning_rate", float("inf"), "a finite number above 0"),
        ("held_out", 0.0, "a share above 0 and below 1"),
        ("held_out", 1.0, "a share above 0 and below 1"),
    ],
)
def test_bad_options_are_named(option: str, value: float, need: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: got {value}, need {need}"):
        PolishOptions(**{option: value})
