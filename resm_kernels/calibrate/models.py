"""Loads models, which the engine has opened, with transformers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import torch

from resm_kernels.calibrate.blocks import is_causal
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.checkpoint import CheckpointReader
from resm_kernels.checkpoint.auxiliary import check_tokenizer_files
from resm_kernels.checkpoint.forms import gguf_file, pretrained
from resm_kernels.engine.models import Model
from resm_kernels.engine.tokenizer import gguf_tokenizer
from resm_kernels.files import first_line
from resm_kernels.lora import AdapterReader

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SHOWN: Final = 3
"""How many tensors an error names."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers print no progress bars and no warnings; what was set before is restored at the end."""
    _check_installed()
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    verbosity, bars, no_hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            logging.set_verbosity_error()
            logging.disable_progress_bar()
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
            if no_hub_bars:
                disable_progress_bars()


def _check_installed() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise CalibrationError(
            "calibrate: needs transformers, which is not installed: pip install 'resm-kernels[calibrate]'"
        ) from error


def load_config(model: Model) -> PreTrainedConfig:
    """Return the configuration of a decoder with an output head, as transformers reads it.

    Raises:
        CalibrationError: transformers is not installed or cannot read the configuration, or the model is no decoder
            with an output head: an encoder, an encoder and a decoder, a classifier, a model without a head.
    """
    with quiet_transformers():
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

        try:
            place = pretrained(model.base_folder, gguf_file(model.base_folder))
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                **place, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers raises whatever its configurations do
            raise CalibrationError(
                f"calibrate: {model.base_folder / 'config.json'}: transformers cannot read it ({first_line(error)})"
            ) from error
        head = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    for section in (config, config.get_text_config()):
        if hasattr(section, "quantization_config"):
            del section.quantization_config  # the reader forms full weights
    names = list(config.architectures or ())
    known = getattr(head, "__name__", None)
    if head is None or getattr(config, "is_encoder_decoder", False) or (names and known not in names):
        got = " and ".join(names) or config.model_type
        need = f", need {known}" if known is not None else ", need a causal language model"
        raise CalibrationError(f"calibrate: {model.folder}: {got} is no decoder with an output head{need}")
    return config


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; that of an adapter's base model.

    Raises:
        CalibrationError: transformers is not installed, or the folder has no tokenizer that it can load. Code from the
            folder is never run.
    """
    check_tokenizer_files(model.base_folder)
    with quiet_transformers():
        from transformers import AutoTokenizer

        try:
            place = pretrained(model.base_folder, gguf_tokenizer(model.base_folder))
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                **place, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers raises whatever its tokenizer classes do
            raise CalibrationError(
                f"calibrate: {model.base_folder}: has no tokenizer that transformers can load ({first_line(error)}); "
                "need its tokenizer files"
            ) from error
    return tokenizer


def load_generation_config(model: Model) -> GenerationConfig:
    """Return a model's `generation_config.json`, or what its config.json says if there is none.

    Raises:
        CalibrationError: The file cannot be read, or its end tokens are no whole numbers.
    """
    file = model.base_folder / "generation_config.json"
    with quiet_transformers():
        from transformers import GenerationConfig

        if file.is_file():
            try:
                settings = GenerationConfig.from_pretrained(model.base_folder, local_files_only=True)
            except Exception as error:  # the file may hold anything
                raise CalibrationError(f"calibrate: {file}: cannot be read ({first_line(error)})") from error
        else:
            file = model.base_folder / "config.json"
            settings = GenerationConfig.from_model_config(load_config(model))
    ends: Any = settings.eos_token_id
    if ends is not None and not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends])):
        raise CalibrationError(f"calibrate: {file}: eos_token_id: got {ends!r}, need the numbers of tokens")
    return settings


def load_model(model: Model, *, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """Load a whole model, or an adapter on its base model, for evaluation.

    A whole model is loaded from its folder. The tensors of an adapted or quantised model are read one after another by
    its reader, which forms θ₀ + s·B·A or the full weights, and are rounded once to `dtype`.

    Args:
        model: A model that the engine has opened.
        dtype: The dtype of the weights, and of the model's arithmetic. (Layers that transformers always keeps in fp32
            stay so.)
        device: Where the weights are put.

    Returns:
        The model in evaluation mode, with its own generation settings. It takes the bytes of its weights in `dtype`;
        while an adapted model is loaded, its base's weights in their stored dtype take memory too.

    Raises:
        CalibrationError: As for `load_config`; or transformers cannot load the weights, or the files lack tensors that
            the model needs, or hold some that it does not know or that have another shape. A head that is tied to the
            embedding may be missing.

    Deterministic: the same files give the same bits.
    """
    config = load_config(model)
    with quiet_transformers():
        try:
            loaded, report = _load(model, config, dtype)
        except Exception as error:  # transformers raises whatever its models do
            raise CalibrationError(
                f"calibrate: {model.folder}: transformers cannot load it ({first_line(error)})"
            ) from error
        _check_report(model, report)
        _check_causal(model, loaded)
        loaded.generation_config = load_generation_config(model)
        loaded.name_or_path = str(model.folder)
    return loaded.to(device).eval()


def _load(model: Model, config: PreTrainedConfig, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Return the model, and transformers' report of tensors that do not fit."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    source: dict[str, Any] = {"pretrained_model_name_or_path": model.folder, "local_files_only": True}
    if isinstance(model.reader, AdapterReader) or not all(map(model.reader.is_stored, model.reader.tensors)):
        # transformers renames and joins tensors when it loads them, so that a loaded model may not have the tensor that
        # the adapter names. It therefore gets the tensors that the reader forms under their names in the files.
        source = {"pretrained_model_name_or_path": None, "state_dict": _formed_tensors(model.reader, dtype)}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    loaded, report = model_class.from_pretrained(
        config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **source
    )
    return loaded, report


def _formed_tensors(reader: CheckpointReader, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in reader.tensors:
        # Rounded here, so that fp32 or float64 copies of all formed tensors are never there together.
        tensor = reader.read(name)
        tensors[name] = tensor if reader.is_stored(name) or not tensor.is_floating_point() else tensor.to(dtype)
    return tensors


def _check_report(model: Model, report: dict[str, Any]) -> None:
    """Raise a CalibrationError if tensors are missing, unknown, or of another shape."""
    mismatched = [
        f"{name} has the shape {tuple(got)}, need {tuple(need)}" for name, got, need in report["mismatched_keys"]
    ]
    for entries, verdict in (
        (mismatched, "tensors do not fit its configuration"),
        (report["missing_keys"], "tensors are missing that its architecture needs"),
        (report["unexpected_keys"], "tensors are stored that its architecture does not know"),
        (report["error_msgs"], "transformers reports"),
    ):
        if entries:
            shown = "; ".join(sorted(map(str, entries))[:_SHOWN])
            more = f"; and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
            raise CalibrationError(f"calibrate: {model.folder}: {verdict}: {shown}{more}")


def _check_causal(model: Model, loaded: Any) -> None:
    """Refuse encoders, such as BERT, that were saved with a decoder's head but without `is_decoder`."""
    if not is_causal(loaded):
        raise CalibrationError(
            f"calibrate: {model.folder}: {type(loaded).__name__} is no decoder with an output head: its config.json "
            "says is_decoder: false, so that every position sees the later ones"
        )
