"""The forms in which models lie on disk: folders, files, diffusers' pipelines, sentence-transformers' modules."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from resm_kernels.checkpoint.auxiliary import CONFIG_FILE, MODEL_PATTERNS, read_config
from resm_kernels.checkpoint.format import CheckpointError, TensorInfo
from resm_kernels.checkpoint.quantised import formed, is_quantised, without_quantization
from resm_kernels.checkpoint.quantised.reader import quantization_of
from resm_kernels.checkpoint.reader import (
    INDEX_SUFFIX,
    SINGLE_FILE,
    WEIGHTS_SUFFIX,
    CheckpointReader,
    chosen_files,
    holds_weights,
)
from resm_kernels.files import parse_json, path_problem, read_bytes, read_object, shortened

PIPELINE_FILE: Final = "model_index.json"
MODULES_FILE: Final = "modules.json"
SMALL_FILES: Final = (
    *("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.spm", "tokenizer.model.v*", "bpe.codes"),
    "additional_chat_templates/*.jinja",
)

ADAPTER_FILE: Final = "adapter_config.json"
GGUF_SUFFIX: Final = ".gguf"
_PROJECTOR: Final = "mmproj"
"""Names of GGUF files begin so that hold the part of a model that reads images; the language model is another file."""

_MODULES_FILES: Final = (MODULES_FILE, "config_sentence_transformers.json", "sentence_*_config.json")


@dataclass(frozen=True)
class Form:
    """The files that a model consists of.

    Attributes:
        stems: For each component that holds weights, by its path in the model's folder, the name of the weights' file
            without ".safetensors". The folder itself is the component "".
        config_file: The file that says what the model is; None for a single file.
        side_files: Patterns of the small files that belong to the model.
    """

    stems: Mapping[str, str] = field(default_factory=lambda: {"": "model"})
    config_file: str | None = CONFIG_FILE
    side_files: tuple[str, ...] = MODEL_PATTERNS

    @property
    def marker(self) -> str:
        """A file that the folder of such a model has, by which it is known before it is replaced."""
        return self.config_file or f"{self.stems['']}{WEIGHTS_SUFFIX}"


class ComponentsReader(CheckpointReader):
    """Reads the weights of several components as one model, whose tensors are called `component/name`.

    Args:
        folder: The model's folder.
        readers: A reader for each component, by its path in the folder; they are closed with this one.
    """

    def __init__(self, folder: Path, readers: Mapping[str, CheckpointReader]) -> None:
        self.folder = folder
        self._readers = dict(readers)
        self.tensors = MappingProxyType(dict(self._joined("tensors")))
        self.unindexed = MappingProxyType(dict(self._joined("unindexed")))
        self.other_files = tuple(_join(c, file) for c, reader in readers.items() for file in reader.other_files)

    def _joined(self, attribute: str) -> list[tuple[str, TensorInfo]]:
        return [
            (name, replace(info, name=name))
            for component, reader in self._readers.items()
            for name, info in ((_join(component, n), i) for n, i in getattr(reader, attribute).items())
        ]

    def _split(self, name: str) -> tuple[CheckpointReader, str]:
        component = next((c for c in self._readers if c and name.startswith(f"{c}/")), "")
        return self._readers[component], name.removeprefix(f"{component}/") if component else name

    def read_bytes(self, info: TensorInfo, first: int, buffer: torch.Tensor) -> None:
        """Fill `buffer` with bytes of a tensor."""
        reader, name = self._split(info.name)
        reader.read_bytes(replace(info, name=name), first, buffer)

    def read_runs(self, info: TensorInfo, starts: Sequence[int], length: int) -> torch.Tensor:
        """Return runs of neighbours of a tensor."""
        reader, name = self._split(info.name)
        return reader.read_runs(replace(info, name=name), starts, length)

    def fingerprint(self) -> str:
        """Return the components' hashes."""
        return " ".join(reader.fingerprint() for reader in self._readers.values())

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers.values():
            reader.close()


def open_form(path: Path, config: Mapping[str, Any] | None = None) -> tuple[CheckpointReader, dict[str, Any], Form]:
    """Open a model: return a reader of its full weights, its configuration, and the form that it has.

    The weights of quantised models are formed when they are read, and the configuration does not speak of them.

    Args:
        path: A folder, or a safetensors or GGUF file.
        config: The configuration of a GGUF file, in place of the one that its metadata give.

    Raises:
        CheckpointError: There are no weights, or a file is missing or damaged, or of an unknown quantised format.
    """
    if (file := gguf_file(path)) is not None:
        from resm_kernels.checkpoint.gguf import GgufReader

        opened = GgufReader(path, file, config)
        return opened, dict(opened.config), Form(side_files=MODEL_PATTERNS if path.is_dir() else ())
    reader, form = open_stored(path)
    try:
        config = read_form_config(path, form)
        if not isinstance(reader, ComponentsReader):
            return formed(reader, config), without_quantization(config), form
        quantised = next(filter(is_quantised, {**reader.tensors, **reader.unindexed}.values()), None)
        if quantised is not None or quantization_of(config, path):
            raise CheckpointError(
                f"{path}: holds quantised weights ({'config' if quantised is None else quantised.name}), which are "
                "read in models of one component alone; dequantise it first"
            )
    except BaseException:
        reader.close()
        raise
    return reader, config, form


def read_form_config(path: Path, form: Form) -> dict[str, Any]:
    """Return the configuration of a model of that form; a single file has none."""
    if form.config_file == CONFIG_FILE:
        return read_config(path)
    return {} if form.config_file is None else read_object(path / form.config_file, CheckpointError)


def open_stored(path: Path) -> tuple[CheckpointReader, Form]:
    """Open the weights of a model as they are stored, and return the form that the model has; see `open_form`."""
    if path.is_file():
        if not path.name.endswith(WEIGHTS_SUFFIX):
            raise CheckpointError(f"{path}: is no safetensors or GGUF file; need one, or a model folder")
        reader = CheckpointReader(path.parent, path.name)
        return reader, Form({"": path.name.removesuffix(WEIGHTS_SUFFIX)}, None, ())
    components, form = _components(path)
    if components == [""]:
        reader = CheckpointReader(path)
        return reader, replace(form, stems={"": reader.stem})
    readers, stems = _open_components(path, components)
    return readers, replace(form, stems=stems)


def weight_files(path: Path) -> list[Path]:
    """Return the files that `open_form` reads the weights of a folder from, and the indices that name them.

    Only small files are read, and weights need only their names.

    Raises:
        CheckpointError: There are no weights, or a small file is missing or damaged.
    """
    if (file := gguf_file(path)) is not None:
        return [file]
    return [file for component in _components(path)[0] for file in chosen_files(path / component)]


def gguf_file(path: Path) -> Path | None:
    """Return the GGUF file that a path is, or that a folder without other weights holds; None if there is none.

    Raises:
        CheckpointError: The folder holds several of them.
    """
    if not path.is_dir():
        return path if path.name.endswith(GGUF_SUFFIX) else None
    found = [file for file in sorted(path.glob(f"*{GGUF_SUFFIX}")) if not file.name.startswith(_PROJECTOR)]
    others = holds_weights(path) or any(os.path.lexists(path / name) for name in (PIPELINE_FILE, MODULES_FILE))
    if not found or others:
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4]) + (" …" if len(found) > 4 else "")
        raise CheckpointError(f"{path}: holds {len(found)} GGUF files ({names}); name the file that is meant")
    return found[0]


def is_adapter_folder(folder: Path) -> bool:
    """Return True for a folder that holds an adapter's configuration and not the weights of a whole model."""
    has_model = os.path.lexists(folder / SINGLE_FILE) or any(folder.glob(f"*{INDEX_SUFFIX}"))
    return os.path.lexists(folder / ADAPTER_FILE) and not has_model


def pretrained(path: Path, file: Path | None) -> dict[str, Any]:
    """Return the arguments with which transformers' `from_pretrained` opens a model: those of a GGUF file, or a folder.

    Args:
        path: The model's folder or file.
        file: The GGUF file that is to be opened; None for a folder of another kind.
    """
    if file is None:
        return {"pretrained_model_name_or_path": path}
    return {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}


def _components(path: Path) -> tuple[list[str], Form]:
    """Return the folders within a model's folder that hold weights, "" for itself, and its form without the stems."""
    if os.path.lexists(path / PIPELINE_FILE):
        config = read_object(path / PIPELINE_FILE, CheckpointError)
        # An entry of nulls is a component that the pipeline does without, even if its folder is there.
        absent = {name for name, entry in config.items() if isinstance(entry, list) and not any(entry)}
        components = [p.name for p in sorted(path.iterdir()) if p.name not in absent and holds_weights(p)]
        if not components:
            raise CheckpointError(f"{path}: has a {PIPELINE_FILE}, but none of its folders holds safetensors")
        listed = {name for name, entry in config.items() if isinstance(entry, list)}
        folders = [p.name for p in path.iterdir() if p.is_dir() and p.name in {*listed, *components}]
        inner = (f"{glob.escape(folder)}/{pattern}" for folder in folders for pattern in SMALL_FILES)
        return components, Form(config_file=PIPELINE_FILE, side_files=(*SMALL_FILES, *inner))
    if not os.path.lexists(path / MODULES_FILE):
        return [""], Form()
    modules = _modules(path)
    side_files = (*MODEL_PATTERNS, *_MODULES_FILES, *(f"{m}/{p}" for m in modules if m for p in SMALL_FILES))
    with_weights = [m for m in modules if holds_weights(path / m)]
    config_file = _join(with_weights[0], CONFIG_FILE) if with_weights else CONFIG_FILE
    return with_weights or [""], Form(config_file=config_file, side_files=side_files)


def _modules(path: Path) -> list[str]:
    """Return the folders of a sentence-transformers model's modules, "" for the model's own."""
    listed = parse_json(read_bytes(path / MODULES_FILE, CheckpointError), str(path / MODULES_FILE), CheckpointError)
    if not isinstance(listed, list):
        raise CheckpointError(f"{path / MODULES_FILE}: got a JSON {type(listed).__name__}, need a list")
    modules = [str(m["path"]) for m in listed if isinstance(m, dict) and "path" in m]
    for module in modules:
        if problem := path_problem(module):
            raise CheckpointError(f"{path / MODULES_FILE}: path: {problem}")
        if Path(module).is_absolute() or ".." in Path(module).parts or any(letter in module for letter in "*?["):
            raise CheckpointError(
                f"{path / MODULES_FILE}: path: got {shortened(module)}, need a folder within this one"
            )
    return modules


def _open_components(folder: Path, components: list[str]) -> tuple[CheckpointReader, dict[str, str]]:
    readers: dict[str, CheckpointReader] = {}
    try:
        for component in components:
            readers[component] = CheckpointReader(folder / component)
    except BaseException:
        for reader in readers.values():
            reader.close()
        raise
    return ComponentsReader(folder, readers), {component: reader.stem for component, reader in readers.items()}


def _join(component: str, name: str) -> str:
    return f"{component}/{name}" if component else name
