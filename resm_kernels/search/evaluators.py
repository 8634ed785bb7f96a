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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

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
"""What judges a model; it takes model and tokenizer, split and questions."""
_BATCH_TOKENS: Final = 8192
_MATCHES: Final[dict[str, Callable[[str, str], bool]]] = {
    "exact": lambda got, needed: got == needed,
    "start": lambda got, needed: got.startswith(needed),
    "contains": lambda got, needed: needed in got,
}


class _Questions(NamedTuple):
    """The prompts of one objective in one split."""

    objective: str
    split: str
    path: Path
    prompts: list[Prompt]


class _FileJudge:
    """Judges a model by the prompts of files, which are read once.

    Args:
        files: For each objective the file of each split.
        score: Returns the score of a model on some questions, given the model, its tokenizer and the questions.
        answered: Whether every prompt needs its answer.
        folders: Further models that the score depends on.
        settings: What else it depends on, by name.

    Attributes:
        files: All files that the scores depend on.
        settings: What else they depend on, as JSON has it.
    """

    def __init__(
        self,
        files: Files,
        score: Callable[[Any, Any, _Questions], float],
        *,
        answered: bool,
        max_prompt_tokens: int,
        max_answer_tokens: int,
        folders: Iterable[str | Path] = (),
        **settings: Any,
    ) -> None:
        if not files:
            raise SearchError("files: got none, need a file of each split for one or more objectives")
        self._by_objective = files
        self.files = [*(path for by_split in files.values() for path in by_split.values()), *folders]
        self._score, self._answered = score, answered
        self._limits = max_prompt_tokens, max_answer_tokens
        by_objective = {
            name: {split: str(path) for split, path in by_split.items()} for name, by_split in files.items()
        }
        self.settings = {"files": by_objective, "most tokens": list(self._limits), **settings}
        self._prompts: dict[tuple[str, str], list[Prompt]] = {}

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, split: str, questions: int | None = None
    ) -> dict[str, float]:
        """Return the score of each objective; with a number of questions, by its share of them, the first ones."""
        share = None if questions is None else math.ceil(questions / len(self._by_objective))
        asked = [self.questions(name, split) for name in self._by_objective]
        return {a.objective: self._score(model, tokenizer, a._replace(prompts=a.prompts[:share])) for a in asked}

    def questions(self, objective: str, split: str) -> _Questions:
        """Return all prompts of an objective."""
        by_split = self._by_objective[objective]
        if split not in by_split:
            raise SearchError(f"files: {objective} has no file for the split {split!r}, but {', '.join(by_split)}")
        path = Path(by_split[split])
        if (objective, split) not in self._prompts:
            prompts = read_prompts(path)
            lacking = next((p for p in prompts if p.response is None), None)
            if self._answered and lacking is not None:
                raise SearchError(f"{path}, line {lacking.line}: has no response, which the score compares with")
            self._prompts[objective, split] = prompts
        return _Questions(objective, split, path, self._prompts[objective, split])

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

    def score(model: Any, tokenizer: Any, asked: _Questions) -> float:
        open_ones = [replace(prompt, response=None) for prompt in asked.prompts]
        ids = judge.encoded(model, tokenizer, asked.path, open_ones)
        given = answer(model, tokenizer, ids, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
        texts = [_text(tokenizer, sample) for sample in given]
        needed = [str(prompt.response).strip() for prompt in asked.prompts]
        return 100 * sum(map(_MATCHES[match], texts, needed)) / len(needed)

    judge = _FileJudge(
        files,
        score,
        answered=True,
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_new_tokens,
        score_of="accuracy",
        match=match,
    )
    return judge


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

    def score(model: Any, tokenizer: Any, asked: _Questions) -> float:
        samples: list[Sample] = judge.encoded(model, tokenizer, asked.path, asked.prompts)
        total, count = 0.0, 0
        for sample, log_probs in zip(samples, _each_prediction(model, samples, batch_tokens), strict=True):
            tokens = torch.tensor(sample.tokens[sample.answer_start :], device=log_probs.device)
            total += float(log_probs.gather(1, tokens[:, None]).double().sum())
            count += len(tokens)
        return total / count

    judge = _FileJudge(
        files,
        score,
        answered=True,
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_answer_tokens,
        score_of="log_likelihood",
    )
    return judge


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
    known: dict[tuple[str, str], tuple[list[Sample], list[Tensor]]] = {}

    def of_expert(asked: _Questions, model: Any, tokenizer: Any) -> tuple[list[Sample], list[Tensor]]:
        name, split, path, _ = asked
        if (name, split) not in known:
            from transformers import AutoModelForCausalLM

            expert = AutoModelForCausalLM.from_pretrained(
                experts[name], dtype=model.dtype, local_files_only=True, trust_remote_code=False
            )
            expert = expert.to(model.device).eval()
            encoded = judge.encoded(model, tokenizer, path, judge.questions(name, split).prompts)
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

    def score(model: Any, tokenizer: Any, asked: _Questions) -> float:
        samples, targets = of_expert(asked, model, tokenizer)
        number = len(asked.prompts)
        predictions = _each_prediction(model, samples[:number], batch_tokens)
        total, count = 0.0, 0
        for own, target in zip(predictions, targets[:number], strict=True):
            if own.shape != target.shape:
                raise SearchError(
                    f"experts: {asked.objective} predicts {target.shape[1]} tokens, but the merge {own.shape[1]}; need "
                    "experts with the merge's vocabulary"
                )
            expected = target.float()
            p = expected.exp()
            # A token that the expert excludes adds nothing, also if its log-probability is −∞ in fp16.
            total += float(torch.where(p > 0, p * (expected - own), 0.0).double().sum())
            count += len(own)
        return -total / count

    judge = _FileJudge(
        files,
        score,
        answered=False,
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_new_tokens,
        folders=[folder for folder in experts.values() if Path(folder).is_dir()],
        score_of="closeness_to_experts",
        experts={name: str(folder) for name, folder in experts.items()},
    )
    return judge


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

    evaluate.settings = {"tasks": tasks, "metric": metric, **options}  # type: ignore[attr-defined]
    return evaluate


def _harness(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SearchError(f"lm_eval: cannot be imported ({error}); pip install lm-eval") from error


def _text(tokenizer: Any, sample: Sample) -> str:
    return str(tokenizer.decode(sample.tokens[sample.answer_start :], skip_special_tokens=True)).strip()


def _each_prediction(model: Any, samples: Sequence[Sample], batch_tokens: int) -> list[Tensor]:
    """Return log p(· | tokens before) at each answer position of each sample, (positions, vocabulary) in fp32."""
    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        for chosen in batches_by_length(samples, batch_tokens):
            batch = [samples[i] for i in chosen]
            found |= zip(chosen, answer_log_probs(model, batch).split(list(map(answer_length, batch))), strict=True)
    return [found[i] for i in range(len(samples))]
