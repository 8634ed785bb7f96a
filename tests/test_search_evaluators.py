"""Ready judges, against transformers' own answers and predictions."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")

from experts import ENDS, save_expert  # noqa: E402

from resm_kernels.calibrate.errors import CalibrationError  # noqa: E402
from resm_kernels.search import SearchError, evaluators  # noqa: E402
from resm_kernels.search.identity import evaluate_job  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ("w9 w10 w11", "w20", "w30 w31 w8 w9", "w12 w40")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("judged")
    return [save_expert(root / f"model{seed}", "Llama", seed) for seed in range(2)]


def load(folder: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def answers(folder: Path, prompts: Sequence[str], tokens: int = 6) -> list[str]:
    """Greedy answers by transformers, one prompt at a time."""
    model, tokenizer = load(folder)
    texts = []
    for prompt in prompts:
        ids = tokenizer([prompt], return_tensors="pt")["input_ids"]
        for _ in range(tokens):
            best = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
            if int(best) in ENDS:
                break
        start = len(tokenizer(prompt)["input_ids"])
        texts.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())
    return texts


def write(file: Path, prompts: Sequence[str], responses: Sequence[str] | None = None) -> Path:
    entries = [{"prompt": prompt} for prompt in prompts]
    for entry, response in zip(entries, responses or (), strict=False):
        entry["response"] = response
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def test_accuracy_counts_the_answers_that_are_right(folders: list[Path], tmp_path: Path) -> None:
    right = answers(folders[0], PROMPTS)
    assert all(right)
    half = [*right[:1], "w50 w50", *right[2:3], "w51"]
    files = {
        "all": {"valid": write(tmp_path / "all.jsonl", PROMPTS, right)},
        "half": {"valid": write(tmp_path / "half.jsonl", PROMPTS, half)},
    }
    model, tokenizer = load(folders[0])
    evaluate = evaluators.accuracy(files, max_new_tokens=6)
    assert evaluate(model, tokenizer, split="valid") == {"all": 100.0, "half": 50.0}
    # Each file has its share of the questions, the first lines.
    assert evaluate(model, tokenizer, split="valid", questions=2) == {"all": 100.0, "half": 100.0}
    assert evaluate(model, tokenizer, split="valid", questions=3) == {"all": 100.0, "half": 50.0}
    assert evaluate(*load(folders[1]), split="valid")["all"] < 100
    first_words = {"all": {"valid": write(tmp_path / "words.jsonl", PROMPTS, [text.split()[0] for text in right])}}
    assert evaluators.accuracy(first_words, max_new_tokens=6, match="start")(model, tokenizer, split="valid") == {
        "all": 100.0
    }
    last_words = {"all": {"valid": write(tmp_path / "last.jsonl", PROMPTS, [text.split()[-1] for text in right])}}
    evaluate = evaluators.accuracy(last_words, max_new_tokens=6, match="contains")
    assert evaluate(model, tokenizer, split="valid") == {"all": 100.0}


def test_log_likelihood_is_that_of_transformers(folders: list[Path], tmp_path: Path) -> None:
    responses = ["w9 w10", "w50", "w8", "w11 w12 w13"]
    files = {"a": {"test": write(tmp_path / "a.jsonl", PROMPTS, responses)}}
    model, tokenizer = load(folders[0])
    total, count = 0.0, 0
    for prompt, response in zip(PROMPTS, responses, strict=True):
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([[*tokenizer(f"{prompt} {response}")["input_ids"], tokenizer.eos_token_id]])
        log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        total += sum(float(log_probs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
        count += ids.shape[1] - start
    for batch_tokens in (1, 12, 1000):
        evaluate = evaluators.log_likelihood(files, batch_tokens=batch_tokens)
        assert evaluate(model, tokenizer, split="test")["a"] == pytest.approx(total / count, rel=1e-5)


def test_closeness_is_zero_for_the_expert_and_the_kl_for_others(folders: list[Path], tmp_path: Path) -> None:
    files = {"a": {"valid": write(tmp_path / "a.jsonl", PROMPTS)}}
    evaluate = evaluators.closeness_to_experts({"a": folders[1]}, files, max_new_tokens=5)
    assert evaluate(*load(folders[1]), split="valid")["a"] == pytest.approx(0, abs=1e-3)  # targets are fp16
    model, tokenizer = load(folders[0])
    expert, _ = load(folders[1])
    total, count = 0.0, 0
    for prompt, text in zip(PROMPTS, answers(folders[1], PROMPTS, 5), strict=True):
        start = len(tokenizer(prompt)["input_ids"])
        generated = expert.generate(
            torch.tensor([tokenizer(prompt)["input_ids"]]), do_sample=False, max_new_tokens=5, repetition_penalty=1.0
        )
        assert tokenizer.decode(generated[0, start:], skip_special_tokens=True).strip() == text
        own, target = (m(input_ids=generated).logits[0].double().log_softmax(-1) for m in (model, expert))
        part = slice(start - 1, generated.shape[1] - 1)
        total += float((target[part].exp() * (target[part] - own[part])).sum())
        count += generated.shape[1] - start
    got = evaluate(model, tokenizer, split="valid")["a"]
    assert got == pytest.approx(-total / count, rel=1e-3) and got < -0.1
    assert math.isfinite(evaluate(model, tokenizer, split="valid", questions=1)["a"])


def test_excluded_tokens_and_other_vocabularies(folders: list[Path], tmp_path: Path) -> None:
    """A head with a bias of −∞ for padding rows, whose log-probabilities fp16 cannot hold."""

    def without_last(model: Any) -> Any:
        model.get_output_embeddings().register_forward_hook(lambda _, __, out: out.index_fill(-1, last, -1e30))
        return model

    model, tokenizer = load(folders[0])
    last = torch.tensor([model.config.vocab_size - 1])
    files = {"a": {"valid": write(tmp_path / "a.jsonl", PROMPTS, ["w9 w10"] * len(PROMPTS))}}
    plain = evaluators.closeness_to_experts({"a": folders[1]}, files)(model, tokenizer, split="valid")["a"]
    load_expert = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: without_last(load_expert(*a, **k))
        )
        evaluate = evaluators.closeness_to_experts({"a": folders[1]}, files)
        got = evaluate(without_last(load(folders[0])[0]), tokenizer, split="valid")["a"]
    assert math.isfinite(got) and got == pytest.approx(plain, rel=0.2)
    assert evaluate(model, tokenizer, split="valid")["a"] == pytest.approx(got, rel=0.2)
    assert evaluate(without_last(load(folders[1])[0]), tokenizer, split="valid")["a"] == pytest.approx(0, abs=1e-3)
    model.resize_token_embeddings(model.config.vocab_size + 1)
    with pytest.raises(
        SearchError, match=r"experts: a predicts (\d+) tokens, but the merge \d+; need experts with the"
    ):
        evaluate(model, tokenizer, split="valid")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ("\n  \n", "holds no prompt"),
        ('{"prompt": "w9", "response": "w8"}\n{"response": "w8"}\n', "line 2: got none of prompt, text and messages"),
        ('{"prompt": "w9"}\n', "line 1: has no response, which the score compares with"),
        ('{"prompt": "w9", "response": null}\n', "line 1: .*response.*need"),
        ('{"prompt": "w9", "response": 3}\n', "line 1: .*response.*need"),
        ('{"prompt": "w9", "answer": "w8"}\n', "line 1: key: got 'answer'"),
        ('{"prompt": "w9", "response": "w8"}{}\n', "line 1: "),
        ('["w9"]\n', "line 1: "),
        ("w9 w10\n", "line 1: "),
        ('{"prompt": "", "response": "w8"}\n', "line 1: prompt: is empty"),
        ('{"prompt": "w9", "response": " "}\n', "line 1: response: is empty"),
        ('{"prompt": "\\ud800", "response": "w8"}\n', "line 1: "),
        (f'{{"prompt": "{"w9 " * 2000}", "response": "w8"}}\n', "line 1: .*max_prompt_tokens"),
        (f'{{"prompt": "w9", "response": "{"w9 " * 2000}"}}\n', "line 1: .*max_new_tokens|line 1: .*max_answer_tokens"),
    ],
)
def test_lines_that_are_no_question_are_named(folders: list[Path], tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    evaluate = evaluators.log_likelihood({"a": {"valid": file}})
    with pytest.raises((SearchError, CalibrationError), match=f"a.jsonl(, |: ){message}"):
        evaluate(*load(folders[0]), split="valid")


def test_questions_of_all_kinds_are_counted(folders: list[Path], tmp_path: Path) -> None:
    """Duplicates count each time; blank lines, a mark of the byte order and line ends of Windows do not."""
    (right,) = answers(folders[0], PROMPTS[:1])
    lines = [
        json.dumps({"prompt": PROMPTS[0], "response": r}) for r in (right, right, f"  {right}\n", "w50", "ä 日本 🎈")
    ]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    model, tokenizer = load(folders[0])
    evaluate = evaluators.accuracy({"a": {"valid": file}}, max_new_tokens=6)
    assert evaluate(model, tokenizer, split="valid") == {"a": 60.0}
    assert evaluate(model, tokenizer, split="valid", questions=99) == {"a": 60.0}


def test_a_search_notices_other_questions(folders: list[Path], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", PROMPTS, ["w9"] * len(PROMPTS))
    evaluate = evaluators.closeness_to_experts({"a": folders[0]}, {"a": {"valid": file}})
    then = evaluate_job(evaluate, None)
    assert len(then) == 4 and evaluate_job(evaluate, None) == then
    write(file, PROMPTS[::-1])
    now = evaluate_job(evaluate, None)
    assert [name.rpartition("/")[2] for name in then if then[name] != now[name]] == ["a.jsonl"]
    # One class serves these functions, whose options are not in its source.
    jobs = [evaluators.accuracy({"a": {"valid": file}}, match=match) for match in ("exact", "start")]
    jobs += [evaluators.log_likelihood({"a": {"valid": file}}), evaluators.accuracy({"b": {"valid": file}})]
    jobs += [evaluators.lm_eval({"valid": ["a"], "test": [task]}) for task in "ab"]
    known = [json.dumps(evaluate_job(job, None), sort_keys=True) for job in jobs]
    assert len(set(known)) == len(jobs)


def test_mistakes_are_named(folders: list[Path], tmp_path: Path) -> None:
    model, tokenizer = load(folders[0])
    unanswered = {"a": {"valid": write(tmp_path / "a.jsonl", PROMPTS, ["w9"])}}
    with pytest.raises(SearchError, match=r"a.jsonl, line 2: has no response"):
        evaluators.accuracy(unanswered)(model, tokenizer, split="valid")
    with pytest.raises(SearchError, match="a has no file for the split 'test', but valid"):
        evaluators.log_likelihood(unanswered)(model, tokenizer, split="test")
    with pytest.raises(SearchError, match="match: got 'like', need one of exact, start, contains"):
        evaluators.accuracy(unanswered, match="like")
    with pytest.raises(SearchError, match="files: got none"):
        evaluators.accuracy({})
    with pytest.raises(SearchError, match="experts: got b, need one for each of a"):
        evaluators.closeness_to_experts({"b": folders[0]}, unanswered)


def test_the_harness_is_called_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = evaluators.lm_eval({"valid": ["arc", "boolq"], "test": ["arc_2", "boolq_2"]}, num_fewshot=3)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SearchError, match=r"lm_eval: cannot be imported .* pip install lm-eval"):
        evaluate("model", "tokenizer", split="valid")
    calls: list[dict[str, Any]] = []

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return {"results": {task: {"acc,none": 0.5 + i / 4} for i, task in enumerate(arguments["tasks"])}}

    harness, wrapper = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    harness.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    wrapper.HFLM = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", wrapper)
    # Both splits have the objectives of the first.
    assert evaluate("model", "tokenizer", split="test", questions=5) == {"arc": 0.5, "boolq": 0.75}
    (call,) = calls
    assert (call["tasks"], call["limit"], call["num_fewshot"]) == (["arc_2", "boolq_2"], 3, 3)
    assert (call["model"].pretrained, call["model"].tokenizer) == ("model", "tokenizer")
    with pytest.raises(SearchError, match="metric: arc has no 'f1', but acc,none"):
        evaluators.lm_eval({"valid": ["arc"], "test": ["b"]}, metric="f1")("model", "tokenizer", split="valid")
    with pytest.raises(SearchError, match="need equally many tasks"):
        evaluators.lm_eval({"valid": ["arc"], "test": []})
