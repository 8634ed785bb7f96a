"""Ready functions that judge merges. Each call here makes one, for `evaluate` of a search.

    # judge.py, for: resm-kernels search space.yaml --evaluate judge:evaluate
    from resm_kernels.search import evaluators

    evaluate = evaluators.accuracy({
        "helpful": {"valid": "helpful.valid.jsonl", "test": "helpful.test.jsonl"},
        "honest": {"valid": "honest.valid.jsonl", "test": "honest.test.jsonl"},
    })

Files are those of `resm-kernels calibrate`: `{"prompt": "…", "response": "…"}` a line, or a conversation under
`messages` (`resm_kernels.calibrate.prompts`). Each file is one objective. If a search limits the questions, every file
has an equal share of them, its first lines.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from resm_kernels.calibrate import Prompt, Sample, answer, encode_prompts, read_prompts
from resm_kernels.calibrate.answers import end_tokens
from resm_kernels.calibrate.polish import answer_length, answer_log_probs, batches_by_length
from resm_kernels.search.errors import SearchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Files = Mapping[str, Mapping[str, str | Path]]
Judge = Callable[..., dict[str, float]]
"""A function that judges a model; it takes model and tokenizer, split and questions."""
_BATCH_TOKENS: Final = 8192
_MATCHES: Final[dict[str, Callable[[str, str], bool]]] = {
    "exact": lambda got, needed: got == needed,
    "start": lambda got, needed: got.startswith(needed),
    "contains": lambda got, needed: needed in got,
}


class _Questions:
    """The prompts of each objective and split, read once.

    Args:
        files: For each objective the file of each split.
        answered: Whether every prompt needs its answer.
    """

    def __init__(self, files: Files, *, answered: bool, max_prompt_tokens: int, max_answer_tokens: int) -> None:
        if not files:
            raise SearchError("files: got none, need a file of each split for one or more objectives")
        self._files = files
        self._answered, self._limits = answered, (max_prompt_tokens, max_answer_tokens)
        self._prompts: dict[tuple[str, str], list[Prompt]] = {}

    def of(self, split: str, questions: int | None) -> Iterator[tuple[str, Path, list[Prompt]]]:
        """Yield each objective's name, file and prompts."""
        share = None if questions is None else math.ceil(questions / len(self._files))
        for name, by_split in self._files.items():
            if split not in by_split:
                raise SearchError(f"files: {name} has no file for the split {split!r}, but {', '.join(by_split)}")
            path = Path(by_split[split])
            if (name, split) not in self._prompts:
                prompts = read_prompts(path)
                lacking = next((p for p in prompts if p.response is None), None)
                if self._answered and lacking is not None:
                    raise SearchError(f"{path}, line {lacking.line}: has no response, which the score compares with")
                self._prompts[name, split] = prompts
            yield name, path, self._prompts[name, split][:share]

    def encoded(self, model: Any, tokenizer: Any, path: Path, prompts: Sequence[Prompt]) -> list[Any]:
        """Return prompts as token ids, those with an answer as samples."""
        return encode_prompts(
            prompts,
            tokenizer,
            path,
            max_tokens=self._limits[0],
            max_answer_tokens=self._limits[1],
            vocabulary=model.get_input_embeddings().weight.shape[0],
            end_tokens=end_tokens(model.generation_config, tokenizer),
        )


def accuracy(
    files: Files,
    *,
    match: str = "exact",
    max_new_tokens: int = 64,
    max_prompt_tokens: int = 1024,
    batch_tokens: int = _BATCH_TOKENS,
) -> Judge:
    """The share of prompts, in percent, whose greedy answer is the response of the file.

    Args:
        files: For each objective a file for the splits "valid" and "test".
        match: When an answer counts, without white space around it: "exact", if it is the response; "start", if it
            begins with it; "contains", if it has the response in it.
        max_new_tokens, max_prompt_tokens, batch_tokens: As for `resm_kernels.calibrate.answer`.

    Raises:
        SearchError, CalibrationError: The files cannot be read, or lack responses.
    """
    if match not in _MATCHES:
        raise SearchError(f"match: got {match!r}, need one of {', '.join(_MATCHES)}")
    asked = _Questions(files, answered=True, max_prompt_tokens=max_prompt_tokens, max_answer_tokens=max_new_tokens)

    def evaluate(
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, split: str, questions: int | None = None
    ) -> dict[str, float]:
        scores = {}
        for name, path, prompts in asked.of(split, questions):
            open_ones = [replace(prompt, response=None) for prompt in prompts]
            ids = asked.encoded(model, tokenizer, path, open_ones)
            given = answer(model, tokenizer, ids, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
            texts = [_text(tokenizer, sample) for sample in given]
            right = sum(_MATCHES[match](text, str(p.response).strip()) for text, p in zip(texts, prompts, strict=True))
            scores[name] = 100 * right / len(prompts)
        return scores

    return evaluate


def log_likelihood(
    files: Files,
    *,
    max_answer_tokens: int = 1024,
    max_prompt_tokens: int = 1024,
    batch_tokens: int = _BATCH_TOKENS,
) -> Judge:
    """The mean log-likelihood that a model gives the tokens of the responses, end token included, in nats.

    Args:
        files: For each objective a file for the splits "valid" and "test".
        max_answer_tokens, max_prompt_tokens: The most tokens of a response and a prompt; longer ones are errors.
        batch_tokens: Tokens that run through the model at once.

    Raises:
        SearchError, CalibrationError: The files cannot be read, or lack responses.
    """
    asked = _Questions(files, answered=True, max_prompt_tokens=max_prompt_tokens, max_answer_tokens=max_answer_tokens)

    def evaluate(
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, split: str, questions: int | None = None
    ) -> dict[str, float]:
        scores = {}
        for name, path, prompts in asked.of(split, questions):
            samples = asked.encoded(model, tokenizer, path, prompts)
            total, count = 0.0, 0
            for log_probs, tokens in _predictions(model, samples, batch_tokens):
                total += float(log_probs.gather(1, tokens[:, None]).double().sum())
                count += len(tokens)
            scores[name] = total / count
        return scores

    return evaluate


def closeness_to_experts(
    experts: Mapping[str, str | Path],
    files: Files,
    *,
    max_new_tokens: int = 64,
    max_prompt_tokens: int = 1024,
    batch_tokens: int = _BATCH_TOKENS,
) -> Judge:
    """−KL(expert ‖ merge), in nats a token, on prompts that each expert answers itself: no labels are needed.

    The experts are loaded with transformers, one after another, when they are first needed, and answer their prompts
    greedily. Their predictions stay in memory in fp16: answer tokens × vocabulary × 2 bytes.

    Args:
        experts: For each objective the folder of the expert.
        files: For each objective a file of prompts for the splits "valid" and "test"; responses, where there are some,
            take the place of the expert's answers.
        max_new_tokens, max_prompt_tokens, batch_tokens: As for `resm_kernels.calibrate.answer`.

    Raises:
        SearchError, CalibrationError: The files or experts cannot be read.
    """
    if experts.keys() != files.keys():
        raise SearchError(f"experts: got {', '.join(experts)}, need one for each of {', '.join(files)}")
    asked = _Questions(files, answered=False, max_prompt_tokens=max_prompt_tokens, max_answer_tokens=max_new_tokens)
    known: dict[tuple[str, str], tuple[list[Sample], list[Tensor]]] = {}

    def of_expert(name: str, split: str, path: Path, model: Any, tokenizer: Any) -> tuple[list[Sample], list[Tensor]]:
        if (name, split) not in known:
            from transformers import AutoModelForCausalLM

            _, _, prompts = next(entry for entry in asked.of(split, None) if entry[0] == name)
            expert = AutoModelForCausalLM.from_pretrained(
                experts[name], dtype=model.dtype, local_files_only=True, trust_remote_code=False
            )
            expert = expert.to(model.device).eval()
            encoded = asked.encoded(model, tokenizer, path, prompts)
            open_ones = [i for i, entry in enumerate(encoded) if not isinstance(entry, Sample)]
            answers = answer(
                expert,
                tokenizer,
                [encoded[i] for i in open_ones],
                max_new_tokens=max_new_tokens,
                batch_tokens=batch_tokens,
            )
            for i, sample in zip(open_ones, answers, strict=True):
                encoded[i] = sample
            targets = [p.half() for p in _each_prediction(expert, encoded, batch_tokens)]
            known[name, split] = encoded, targets
        return known[name, split]

    def evaluate(
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, split: str, questions: int | None = None
    ) -> dict[str, float]:
        scores = {}
        for name, path, prompts in asked.of(split, questions):
            samples, targets = of_expert(name, split, path, model, tokenizer)
            predictions = _each_prediction(model, samples[: len(prompts)], batch_tokens)
            total, count = 0.0, 0
            for own, target in zip(predictions, targets[: len(prompts)], strict=True):
                expected = target.float()
                total += float((expected.exp() * (expected - own)).double().sum())
                count += len(own)
            scores[name] = -total / count
        return scores

    return evaluate


def lm_eval(tasks: Mapping[str, Sequence[str]], *, metric: str = "acc,none", **options: Any) -> Judge:
    """A metric of lm-evaluation-harness for each task, where the package `lm_eval` is installed.

    Args:
        tasks: The tasks of the splits "valid" and "test". The harness has no splits of its own, so that these should be
            different tasks; their results are named by their position, so that both splits have the same objectives.
        metric: The metric's name in the harness' results, "acc,none" by default.
        options: Further keywords of `lm_eval.simple_evaluate`, such as num_fewshot.

    Raises:
        SearchError: The package is not installed, the splits have different numbers of tasks, or a task has no such
            metric.
    """
    if len({len(names) for names in tasks.values()}) != 1:
        raise SearchError(f"tasks: got {dict(tasks)}, need equally many tasks for the splits valid and test")
    valid = list(tasks.get("valid", ()))

    def evaluate(
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, split: str, questions: int | None = None
    ) -> dict[str, float]:
        harness = _harness("lm_eval")
        wrapped = _harness("lm_eval.models.huggingface").HFLM(pretrained=model, tokenizer=tokenizer)
        names = list(tasks[split])
        limit = None if questions is None else math.ceil(questions / len(names))
        results = harness.simple_evaluate(model=wrapped, tasks=names, limit=limit, **options)["results"]
        scores = {}
        for objective, name in zip(valid, names, strict=True):
            if metric not in results[name]:
                raise SearchError(f"metric: {name} has no {metric!r}, but {', '.join(results[name])}")
            scores[objective] = float(results[name][metric])
        return scores

    return evaluate


def _harness(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SearchError(f"lm_eval: cannot be imported ({error}); pip install lm-eval") from error


def _text(tokenizer: Any, sample: Sample) -> str:
    return str(tokenizer.decode(sample.tokens[sample.answer_start :], skip_special_tokens=True)).strip()


def _predictions(model: Any, samples: Sequence[Sample], batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield log p of each answer position of a sample, (positions, vocabulary), and the tokens that are there."""
    for sample, log_probs in zip(samples, _each_prediction(model, samples, batch_tokens), strict=True):
        yield log_probs, torch.tensor(sample.tokens[sample.answer_start :], device=log_probs.device)


def _each_prediction(model: Any, samples: Sequence[Sample], batch_tokens: int) -> list[Tensor]:
    """Return log p(· | tokens before) at each answer position of each sample, (positions, vocabulary) in fp32."""
    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        for chosen in batches_by_length(samples, batch_tokens):
            batch = [samples[i] for i in chosen]
            found |= zip(chosen, answer_log_probs(model, batch).split(list(map(answer_length, batch))), strict=True)
    return [found[i] for i in range(len(samples))]
