"""Lets an expert answer its prompts, and keeps prompts with answers in a file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from resm_kernels._version import __version__
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.fingerprint import model_fingerprint
from resm_kernels.calibrate.models import (
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from resm_kernels.calibrate.prompts import Prompt, Sample, encode_prompts, read_prompts
from resm_kernels.checkpoint.durable import write_whole
from resm_kernels.dtypes import dtype_name
from resm_kernels.engine.models import Model
from resm_kernels.files import check_regular

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_FORMAT: Final = "resm_kernels prompts with answers, version 1"


def end_tokens(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end an answer: those of the generation settings, or the tokenizer's if these name none."""
    ends: Any = settings.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return ()
    return (ends,) if isinstance(ends, int) else tuple(ends)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """Let a model answer prompts greedily, with transformers' own `generate`.

    Every token of an answer is the one with the largest logit. The model's sampling settings and penalties are not
    used, because least squares and KL compare logits, which these settings do not change. An answer ends with the
    first of its end tokens (`end_tokens`), or after `max_new_tokens`.

    Prompts of similar lengths are answered together, padded on the left and masked. The longest come first, so that
    memory that does not suffice is reported at once.

    Args:
        model: A decoder with an output head, in evaluation mode.
        tokenizer: Its tokenizer, which names the end token if the model's generation settings name none.
        prompts: The token ids of each prompt, at least one for each.
        max_new_tokens: The largest number of tokens of an answer, its end token included.
        batch_tokens: How many tokens a batch may have, padding and longest answers included; a prompt that has more is
            alone in its batch. This bounds the memory for keys, values and activations.
        progress: `progress(answered, all)`, called after every batch.

    Returns:
        One sample for each prompt, in their order.

    Raises:
        CalibrationError: A logit is NaN or infinite; the message names the model. Or a prompt with its answer does not
            fit in the model's context.
        ValueError: `max_new_tokens` or `batch_tokens` is less than 1.

    Deterministic on one kind of device. Another `batch_tokens` changes the order of sums within the model, and so may
    change an answer where two logits are equal but for rounding.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, need at least 1")
    with quiet_transformers(), torch.inference_mode():
        from transformers import GenerationConfig, LogitsProcessorList

        ends = end_tokens(model.generation_config, tokenizer)
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(ends) or None,
            pad_token_id=0,  # masked, and behind answers cut off: any token that every model has
            use_cache=True,
        )
        check = LogitsProcessorList([_FiniteLogits(model)])
        context = context_length(model.config)
        generate: Any = model.generate
        samples: dict[int, Sample] = {}
        for batch in _batches([len(ids) for ids in prompts], max_new_tokens, batch_tokens):
            longest = len(prompts[batch[0]])
            if context is not None and longest + max_new_tokens > context:
                raise CalibrationError(
                    f"calibrate: {model.name_or_path}: a prompt of {longest} tokens and an answer of {max_new_tokens} "
                    f"need more than its {context} positions; need shorter prompts or a smaller max_new_tokens"
                )
            ids, mask = _padded([prompts[i] for i in batch], settings.pad_token_id, model.device)
            with _generation_settings(model, settings):
                output = generate(ids, attention_mask=mask, logits_processor=check)
            for i, row in zip(batch, output[:, longest:].tolist(), strict=True):
                end = next((k for k, token in enumerate(row) if token in ends), len(row))
                samples[i] = Sample((*prompts[i], *row[: end + 1]), len(prompts[i]))
            if progress is not None:
                progress(len(samples), len(prompts))
    return [samples[i] for i in range(len(prompts))]


def context_length(config: Any) -> int | None:
    """Return the number of positions that a transformers configuration allows; None if it states none."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Yield the positions of the prompts of each batch, the longest prompts first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens // (lengths[order[0]] + max_new_tokens))
        yield order[:size]
        order = order[size:]


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids that are padded on the left to one length, and the mask of those that are not padding."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids.to(device), mask.to(device)


@contextlib.contextmanager
def _generation_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Give the model these settings for a while; `generate` would add the model's own to settings that it is given."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


class _FiniteLogits:
    """Raises an error if a logit is not finite; `generate` calls it with the logits of every step."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(torch.isfinite(scores).all()):
            raise CalibrationError(
                f"calibrate: {self._model.name_or_path}: gives logits that are NaN or infinite, so it holds NaN or "
                f"infinite weights, or exceeds {dtype_name(self._model.dtype)}; need a model with finite logits"
            )
        return scores


def save_samples(path: Path, samples: Sequence[Sample], key: str) -> None:
    """Write samples to a safetensors file, which appears under its name when it is complete.

    Its tensors are `tokens` (int32; all samples' tokens, one sample after another), `offsets` (int64; sample i has the
    tokens from offsets[i] to offsets[i + 1]) and `answer_start` (int32). Its metadata holds the format, the key, and a
    digest of the tensors.

    Args:
        path: The file; it is replaced if it exists. Its folder is made if it is missing.
        samples: The samples.
        key: States what the samples were made from; `load_samples` compares it.

    Raises:
        CalibrationError: The file cannot be written.
    """
    from safetensors.torch import save

    offsets = [0]
    for sample in samples:
        offsets.append(offsets[-1] + len(sample.tokens))
    tensors = {
        "tokens": torch.tensor([token for sample in samples for token in sample.tokens], dtype=torch.int32),
        "offsets": torch.tensor(offsets, dtype=torch.int64),
        "answer_start": torch.tensor([sample.answer_start for sample in samples], dtype=torch.int32),
    }
    content = save(tensors, metadata={"format": _FORMAT, "key": key, "digest": _digest(tensors)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise CalibrationError(f"{path}: the answers cannot be written: {error.strerror or error}") from error


def load_samples(path: Path, key: str) -> list[Sample] | None:
    """Return the samples of a file that `save_samples` wrote with this key; None if it has another key or is missing.

    Raises:
        CalibrationError: The file cannot be read, is damaged, or is none that `save_samples` wrote. It is not replaced
            then, because it may be somebody's work.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if not os.path.lexists(path):
            return None
        check_regular(path, CalibrationError)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CalibrationError(f"{path}: holds something else than answers; delete it or name another file")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except SafetensorError as error:
        raise CalibrationError(
            f"{path}: is no file of answers, or is damaged ({error}); delete it or name another file"
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from error
    if metadata.get("digest") != _digest(tensors):
        raise CalibrationError(f"{path}: the answers are damaged: they have another digest than was written; delete it")
    if metadata.get("key") != key:
        return None
    try:
        tokens, starts = tensors["tokens"].tolist(), tensors["answer_start"].tolist()
        spans = pairwise(tensors["offsets"].tolist())
        return [Sample(tuple(tokens[i:j]), start) for (i, j), start in zip(spans, starts, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path}: the answers are damaged ({error}); delete it or name another file") from None


def _digest(tensors: dict[str, Tensor]) -> str:
    """Return a digest of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def answer_prompts(
    model: Model,
    prompts_file: Path,
    cache_file: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_new_tokens: int = 64,
    max_prompt_tokens: int = 1024,
    batch_tokens: int = 8192,
    max_prompts: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """Return the prompts of a file with their answers: the file's own, else what the expert answers greedily.

    If `cache_file` holds the answers to these prompts, it is read and the expert is not loaded. Otherwise the answers
    are written to it: what was made from other prompts, models or options is replaced. Its key covers the prompts, the
    options that change answers (not `batch_tokens`), the versions of this library, of torch and of transformers, and of
    the model's files the content (config, tokenizer) or a part of each tensor (`CheckpointReader.fingerprint`).

    The expert's weights are loaded if a prompt has no answer, and are freed before the function returns.

    Args:
        model: The expert, as the engine opened it.
        prompts_file: What `read_prompts` reads.
        cache_file: Where the answers are kept.
        dtype: The dtype that the expert computes in.
        device: Where the expert computes.
        max_new_tokens: The largest number of tokens of an answer, its end token included. 64 are enough for a few
            sentences; longer answers cost in proportion.
        max_prompt_tokens: The number of tokens that a prompt may have; longer ones are errors.
        batch_tokens: How many tokens a batch may have; see `answer`.
        max_prompts: Use the file's first prompts only, so many; None uses all.
        progress: `progress(answered, all)` of the prompts that the expert answers, called after every batch.

    Returns:
        One sample for each prompt, in the file's order.

    Raises:
        CalibrationError: As for `read_prompts`, `encode_prompts`, `load_model`, `answer` and `load_samples`.
        ValueError: A number is less than 1.

    Deterministic on one kind of device.
    """
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("max_prompt_tokens", max_prompt_tokens),
        ("batch_tokens", batch_tokens),
    ):
        if value < 1:
            raise ValueError(f"{name}: got {value}, need at least 1")
    prompts = read_prompts(prompts_file, max_prompts)
    options = [dtype_name(dtype), torch.device(device).type, max_new_tokens, max_prompt_tokens]
    key = _key(model, prompts, options)
    samples = load_samples(cache_file, key)
    if samples is None:
        tokenizer = load_tokenizer(model)
        encoded = _encoded(model, tokenizer, prompts, prompts_file, max_new_tokens, max_prompt_tokens)
        asked = [entry for entry in encoded if not isinstance(entry, Sample)]
        answers = iter(_ask(model, tokenizer, asked, dtype, device, max_new_tokens, batch_tokens, progress))
        samples = [entry if isinstance(entry, Sample) else next(answers) for entry in encoded]
        save_samples(cache_file, samples, key)
    return samples


def check_prompts(
    model: Model,
    prompts_file: Path,
    *,
    max_new_tokens: int,
    max_prompt_tokens: int,
    max_prompts: int | None = None,
) -> None:
    """Raise the errors that `answer_prompts` would, as far as the expert's weights are not needed to find them."""
    prompts = read_prompts(prompts_file, max_prompts)
    _encoded(model, load_tokenizer(model), prompts, prompts_file, max_new_tokens, max_prompt_tokens)


def _encoded(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    prompts_file: Path,
    max_new_tokens: int,
    max_prompt_tokens: int,
) -> list[Sample | tuple[int, ...]]:
    """Prompts as token ids, which with their answers fit in the model's context."""
    config = load_config(model)
    encoded = encode_prompts(
        prompts,
        tokenizer,
        prompts_file,
        max_prompt_tokens,
        max_answer_tokens=max_new_tokens,
        vocabulary=config.get_text_config().vocab_size,
        end_tokens=end_tokens(load_generation_config(model), tokenizer),
    )
    _check_context(prompts, encoded, config, prompts_file, max_new_tokens)
    return encoded


def _ask(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device | str,
    max_new_tokens: int,
    batch_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> list[Sample]:
    """Load the expert, let it answer, and free it."""
    if not prompts:
        return []
    expert = load_model(model, dtype=dtype, device=device)
    try:
        return answer(
            expert, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens, progress=progress
        )
    finally:
        del expert
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()


def _check_context(
    prompts: Sequence[Prompt],
    encoded: Sequence[Sample | tuple[int, ...]],
    config: Any,
    prompts_file: Path,
    max_new_tokens: int,
) -> None:
    """Raise a CalibrationError if a prompt with its answer has more tokens than the model has positions."""
    context = context_length(config)
    for prompt, entry in zip(prompts, encoded, strict=True):
        need = len(entry.tokens) if isinstance(entry, Sample) else len(entry) + max_new_tokens
        if context is not None and need > context:
            raise CalibrationError(
                f"{prompts_file}, line {prompt.line}: prompt and answer may have {need} tokens, but the model has only "
                f"{context} positions; need a shorter prompt or a smaller max_new_tokens"
            )


def _key(model: Model, prompts: Sequence[Prompt], options: Sequence[object]) -> str:
    """Return a digest of all that the answers depend on."""
    versions = [__version__, *(importlib.metadata.version(name) for name in ("torch", "transformers"))]
    entries = [[prompt.text, prompt.messages, prompt.response] for prompt in prompts]
    digest = hashlib.sha256(json.dumps([_FORMAT, versions, options, entries]).encode())
    digest.update(model_fingerprint(model).encode())
    return digest.hexdigest()
