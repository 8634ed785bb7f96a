"""Statistics of a model on prompts, which RegMean and Fisher merging need: Gram matrices or Fisher informations."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from resm_kernels.calibrate.activations import groups_by_length, padded_inputs
from resm_kernels.calibrate.answers import answer, context_length, end_tokens
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.fisher import fisher_information
from resm_kernels.calibrate.grams import gather_grams
from resm_kernels.calibrate.models import load_model, load_tokenizer, quiet_transformers
from resm_kernels.calibrate.prompts import Prompt, Sample, encode_prompts, read_prompts
from resm_kernels.calibrate.weights import stored_names
from resm_kernels.checkpoint import format_bytes
from resm_kernels.checkpoint.statistics import KINDS, StatisticsInfo, check_statistics_file, write_statistics
from resm_kernels.checks import check_choice
from resm_kernels.dtypes import HALF_DTYPES, dtype_name
from resm_kernels.engine.models import Model, open_model
from resm_kernels.files import expanded
from resm_kernels.hub import begin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES: Final = {dtype_name(dtype): dtype for dtype in (torch.float32, *HALF_DTYPES)}
"""The dtypes that a model may compute its statistics in, by name."""


@dataclass(frozen=True, kw_only=True)
class StatisticsReport:
    """What `compute_statistics` did.

    Attributes:
        out: The file.
        kind: "gram" or "fisher".
        weights: How many weights have a statistic.
        stored: How many tensors the file has: weights that share their inputs have one Gram matrix.
        unmatched: Weights of the loaded model without a statistic, because the files have no tensor of their name.
        prompts: How many prompts were read.
        tokens: How many tokens counted.
        bytes_written: The size of the file.
        seconds: Wall time.
    """

    out: Path
    kind: str
    weights: int
    stored: int
    unmatched: tuple[str, ...]
    prompts: int
    tokens: int
    bytes_written: int
    seconds: float

    def __str__(self) -> str:
        missing = f"; {len(self.unmatched)} weights without ({self.unmatched[0]}, …)" if self.unmatched else ""
        return (
            f"{self.kind} statistics of {self.weights} weights from {self.prompts} prompts, {self.tokens:,} tokens, in "
            f"{self.seconds:.1f} s ({format_bytes(self.bytes_written)}){missing}: {self.out}"
        )


def compute_statistics(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    prompts: str | os.PathLike[str],
    *,
    kind: str = "gram",
    answers_by: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 64,
    max_prompt_tokens: int = 1024,
    max_prompts: int | None = None,
    batch_tokens: int = 4096,
    dtype: str = "float32",
    device: str = "cpu",
    random_seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> StatisticsReport:
    """Compute the statistics of a model on prompts, and write them to a safetensors file.

    The model answers the prompts greedily first, except those that bring their answers. It then reads prompts with
    their answers (all tokens but the last, behind which nothing is predicted).

    - ``gram``: G = (1/N)·Σ x·xᵀ for every linear layer (`nn.Linear`, and GPT-2's Conv1D), over its inputs x at all N
      tokens that the model reads. Sums are float64. Layers that share their inputs, such as q_proj, k_proj and v_proj,
      have one matrix. A head that is tied to the embedding has none.
    - ``fisher``: F = (1/n)·Σ_i (∂ log p(y_i | x_i)/∂θ)² for every weight, over the n prompts, divided by the root mean
      square s of F over the whole model. At each position of the answer, y_i has a token that is drawn from the
      model's own distribution there, so that F is an unbiased estimate of the Fisher information along the greedy
      answers (squared gradients of the greedy tokens themselves would vanish where the model is sure). fusion-bench
      squares the gradient of a whole batch, of the sum over labels of √p·log p.

    Statistics are stored in fp32: their rounding is far below the sampling error of any number of prompts, and they are
    as large as the model already, or larger.

    Args:
        model: A model folder, or BASE+ADAPTER; for RegMean++ that of a merged model.
        out: The file, `….safetensors`.
        prompts: A file of prompts (`.jsonl` or `.txt`); see `resm_kernels.calibrate.prompts`.
        kind: "gram" or "fisher".
        answers_by: The model that answers the prompts, as `model`; None for `model` itself. For RegMean++ it is the
            expert, whose answers the merged model then reads.
        max_new_tokens: The largest number of tokens of an answer; 1 reads prompts alone.
        max_prompt_tokens: The number of tokens that a prompt may have; longer ones are errors.
        max_prompts: Use the file's first prompts only, so many; None uses all.
        batch_tokens: How many tokens run at a time, padding included; Fisher informations take one prompt at a time.
        dtype: The dtype of the model's arithmetic: "float32", "bfloat16" or "float16".
        device: Where the model runs.
        random_seed: A whole number from which the drawn tokens are derived.
        overwrite: Replace `out` if it exists.
        progress: `progress(prompts done, all)` of those whose statistics have been computed.

    Raises:
        CalibrationError, CheckpointError, RecipeError: The model, the prompts or the file cannot be used.
        ValueError: An option is out of its range.

    Memory: the whole model in `dtype`; one that answers for it is freed before. Gram matrices add 8·in² bytes for every
    one that is stored. Fisher informations add a gradient and a sum of squares for every weight, so that the model
    takes three times its bytes in fp32, and the activations of one prompt.

    Determinism: the same bits on one kind of device with the same number of threads: torch's products, of which the
    model consists, round differently with another number.
    """
    began = time.perf_counter()
    check_choice("kind", kind, KINDS)
    check_choice("dtype", dtype, tuple(DTYPES))
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: got {batch_tokens}, need at least 1")
    file = check_statistics_file(out, overwrite=overwrite)
    prompts_file = expanded(prompts, CalibrationError, "prompts")
    asked = read_prompts(prompts_file, max_prompts)
    begin()
    with contextlib.ExitStack() as stack:
        opened = open_model(os.fspath(model), "model", stack)
        fingerprint = opened.reader.fingerprint()
        answering = opened if answers_by is None else open_model(os.fspath(answers_by), "answers_by", stack)
        if answering is not opened:
            _check_same_tokens(opened, answering)
        limits = (max_prompt_tokens, max_new_tokens, batch_tokens)
        loaded = load_model(answering, dtype=DTYPES[dtype], device=device)
        samples = _answered(answering, loaded, asked, prompts_file, *limits)
        if answering is not opened:
            del loaded
            loaded = load_model(opened, dtype=DTYPES[dtype], device=device)
        _check_context(loaded, samples)
        names = _stored_names(loaded, opened)
        with quiet_transformers():
            if kind == "gram":
                statistics = _grams(loaded, samples, names, batch_tokens, progress)
            else:
                statistics = _fisher(loaded, samples, names, random_seed, progress)
        if not statistics.tensors:
            raise CalibrationError(
                f"statistics: {opened.folder}: transformers loads its weights under other names than its files have, "
                "so that no statistic can be matched to a tensor; need a model whose files have transformers' names"
            )
    about = StatisticsInfo(
        kind=kind,
        model=os.fspath(model),
        answers_by=os.fspath(model if answers_by is None else answers_by),
        fingerprint=fingerprint,
        prompts=len(samples),
        tokens=statistics.tokens,
        scale=statistics.scale,
        shared=statistics.shared,
        transposed=statistics.transposed,
    )
    size = write_statistics(file, statistics.tensors, about)
    return StatisticsReport(
        out=file,
        kind=kind,
        weights=len(statistics.tensors) + len(statistics.shared),
        stored=len(statistics.tensors),
        unmatched=statistics.unmatched,
        prompts=len(samples),
        tokens=statistics.tokens,
        bytes_written=size,
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True)
class _Statistics:
    """What is to be stored; see `StatisticsInfo`."""

    tensors: Mapping[str, Tensor]
    tokens: int
    unmatched: tuple[str, ...]
    shared: Mapping[str, str]
    transposed: tuple[str, ...] = ()
    scale: float = 1.0


def _answered(
    answering: Model,
    loaded: PreTrainedModel,
    asked: Sequence[Prompt],
    file: Path,
    max_prompt_tokens: int,
    max_new_tokens: int,
    batch_tokens: int,
) -> list[Sample]:
    """The prompts of a file with their answers: the file's own, else those of a model that has been loaded."""
    tokenizer = load_tokenizer(answering)
    encoded = encode_prompts(
        asked,
        tokenizer,
        file,
        max_prompt_tokens,
        max_answer_tokens=max_new_tokens,
        vocabulary=loaded.config.get_text_config().vocab_size,
        end_tokens=end_tokens(loaded.generation_config, tokenizer),
    )
    unanswered = [entry for entry in encoded if not isinstance(entry, Sample)]
    answers: Iterator[Sample] = iter(())
    if unanswered:
        answers = iter(answer(loaded, tokenizer, unanswered, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens))
    return [entry if isinstance(entry, Sample) else next(answers) for entry in encoded]


def _check_same_tokens(model: Model, answering: Model) -> None:
    """Refuse answers in tokens that mean something else to the model."""
    if load_tokenizer(model).get_vocab() != load_tokenizer(answering).get_vocab():
        raise CalibrationError(
            f"answers_by: the tokenizer of {answering.folder} has other tokens than that of {model.folder}; need the "
            "same"
        )


def _check_context(model: PreTrainedModel, samples: Sequence[Sample]) -> None:
    context = context_length(model.config)
    longest = max(len(sample.tokens) for sample in samples) - 1
    if context is not None and longest > context:
        raise CalibrationError(
            f"statistics: a prompt with its answer has {longest} tokens, but the model has only {context} positions; "
            "need shorter ones"
        )


def _stored_names(model: PreTrainedModel, opened: Model) -> dict[str, str]:
    """Parameter of the loaded model → its name in the files; those without one are left out.

    Files may leave out or add the prefix of the model without its head, as GPT-2's on the hub do.
    """
    prefix, tensors = f"{model.base_model_prefix}.", opened.reader.tensors
    fitting = {
        name: [s for s in stored_names(name, prefix, tensors) if tensors[s].shape == tuple(parameter.shape)]
        for name, parameter in model.named_parameters()
    }
    return {name: stored[0] for name, stored in fitting.items() if stored}


class _Reached(BaseException):
    """Ends a forward pass at the output head, whose inputs are the last that count; no error."""


def _grams(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    names: Mapping[str, str],
    batch_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> _Statistics:
    layers, transposed = _linear_layers(model)
    weights = {layer: f"{layer}.weight" for layer in layers}
    matched = {layer: names[weight] for layer, weight in weights.items() if weight in names}
    batches = [padded_inputs(group) for group in groups_by_length(samples, batch_tokens)]
    done = 0

    def run(i: int) -> None:
        nonlocal done
        tokens, kept = batches[i]
        with contextlib.suppress(_Reached):
            model(input_ids=tokens.to(model.device), use_cache=False)
        done += len(kept)
        if progress is not None:
            progress(done, len(samples))

    with _ending_at_head(model):
        kept_on_device = (kept.to(model.device) for _, kept in batches)
        grams = gather_grams({layer: layers[layer] for layer in matched}, kept_on_device, run)
    count = sum(int(kept.sum()) for _, kept in batches)
    tensors = {}
    for layer in tuple(grams.sums):  # each sum in float64 is dropped when its mean in fp32 is there
        tensors[matched[layer]] = grams.sums.pop(layer).div_(count).float().cpu()
    return _Statistics(
        tensors=tensors,
        tokens=count,
        unmatched=tuple(weight for layer, weight in weights.items() if layer not in grams.leaders),
        shared={matched[layer]: matched[leader] for layer, leader in grams.leaders.items() if layer != leader},
        transposed=tuple(name for layer, name in matched.items() if layer in transposed),
    )


def _linear_layers(model: PreTrainedModel) -> tuple[dict[str, nn.Module], set[str]]:
    """The linear layers of a model by name, without a tied head, and which of them store weights as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    embedding = model.get_input_embeddings()
    layers, transposed = dict[str, nn.Module](), set[str]()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module.weight is not embedding.weight:
            layers[name] = module
            if isinstance(module, Conv1D):
                transposed.add(name)
    return layers, transposed


@contextlib.contextmanager
def _ending_at_head(model: PreTrainedModel) -> Iterator[None]:
    """Let every forward pass end at the output head, behind its hooks: its logits are not needed, and are large."""

    def reached(*_: Any) -> None:
        raise _Reached

    head: Any = model.get_output_embeddings()
    head.forward = reached  # hides the class's method
    try:
        yield
    finally:
        del head.forward


def _fisher(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    names: Mapping[str, str],
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> _Statistics:
    parameters = dict(model.named_parameters())
    matched = {stored: parameters[name] for name, stored in names.items()}
    information = fisher_information(model, matched, samples, seed, progress)
    squares = sum(float(f.double().square().sum()) for f in information.values())
    scale = (squares / max(sum(f.numel() for f in information.values()), 1)) ** 0.5
    if information and not 0 < scale < math.inf:
        raise CalibrationError(
            f"statistics: the root mean square of the Fisher informations is {scale}, need a finite number above 0; "
            "the model may be damaged, or its dtype too narrow for squared gradients: need float32"
        )
    return _Statistics(
        tensors={name: f.div_(scale).cpu() for name, f in information.items()},
        tokens=sum(len(sample.tokens) - sample.answer_start for sample in samples),
        unmatched=tuple(name for name in parameters if name not in names),
        shared={},
        scale=scale,
    )
