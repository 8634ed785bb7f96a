"""The readers that are fuzzed: for each a way to make cases, and a call that reads one.

A case is the content of one file, in a folder where all else is right. Cases of the command line are its arguments, as
a JSON list.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from cases import ADAPTER, CASES, CONFIG, RECIPE, factors, tensors
from guard import Finding, call_guarded
from hub_server import HubServer, hub_server
from hypothesis.strategies import SearchStrategy
from published import GGUF, HUB_FILES, MOE_CONFIG, SHARDS, gguf_bytes, moe
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from resm_kernels import cli
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.prompts import read_prompts
from resm_kernels.checkpoint import CheckpointError, CheckpointReader, read_config
from resm_kernels.checkpoint.format import MAX_DIMENSIONS, read_header
from resm_kernels.checkpoint.gguf_header import read_gguf_header
from resm_kernels.checkpoint.statistics import StatisticsReader
from resm_kernels.engine import MergeError, merge_checkpoints
from resm_kernels.hub import HubError
from resm_kernels.recipe import RecipeError, load_recipe

ERRORS = (CheckpointError, MergeError, RecipeError, CalibrationError, HubError)


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        cases: Makes cases.
        read: Reads one in a folder that `make_world` has made; raises a Finding if it is at fault.
        packages: What has to be installed for it.
    """

    cases: SearchStrategy[bytes]
    read: Callable[[Path, bytes], None]
    packages: tuple[str, ...]


def import_packages() -> None:
    """Import what some readers ask, where it is installed: this takes seconds, which is no case's doing."""
    for name in ("gguf", "huggingface_hub"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        # The names matter: transformers imports its modules only when somebody asks for what they define.
        from transformers import AutoConfig, PreTrainedModel  # noqa: F401


def make_world(root: Path) -> Path:
    """Make models, an adapter and recipes in a folder, and return its real path."""
    root = Path(os.path.realpath(root))
    for i, name in enumerate(("base", "expert0", "expert1")):
        (root / name).mkdir()
        save_file(tensors(i), root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps(CONFIG))
    (root / "adapter").mkdir()
    save_file(factors(), root / "adapter" / "adapter_model.safetensors")
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    for name, fused in (("apart", False), ("fused", True), ("moe", False)):
        (root / name).mkdir()
        save_file(moe(0, fused=fused), root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps(MOE_CONFIG))
    _publish(root / "published")
    (root / "temporary").mkdir()
    (root / "good.yml").write_text(RECIPE)
    os.mkfifo(root / "pipe")
    return root


def _publish(folder: Path) -> None:
    """Make the files that a list of the hub may name."""
    for name in HUB_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    weights = tensors(3)
    for file in (name for name in HUB_FILES if name.endswith(".safetensors")):
        save_file(weights, folder / file)
    parts = {shard: dict(list(weights.items())[i::2]) for i, shard in enumerate(SHARDS)}
    for shard, part in parts.items():
        save_file(part, folder / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in parts.items() for name in part}}
    contents = {
        "model.safetensors.index.json": index,
        "model_index.json": {"_class_name": "Pipeline", "unet": ["diffusers", "UNet2DModel"], "vae": [None, None]},
        "modules.json": [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.T"}],
        "adapter_config.json": ADAPTER | {"base_model_name_or_path": "org/base"},
    } | {name: CONFIG for name in HUB_FILES if name.endswith("config.json") and "adapter" not in name}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    save_file(factors(), folder / "adapter_model.safetensors")
    (folder / "model.gguf").write_bytes(gguf_bytes(GGUF))


@contextlib.contextmanager
def _file(file: Path, content: bytes) -> Iterator[None]:
    """Have this content in a file, and what was there before afterwards."""
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    try:
        yield
    finally:
        file.unlink()
        if before is not None:
            file.write_bytes(before)


def _merge(root: Path, recipe: Any, names: str = "", cache: Path | None = None) -> None:
    """Merge; an error must name the file or folder `names`. What is fetched goes to `cache`, which is deleted."""
    out = root / "out"

    def merge() -> None:
        try:
            merge_checkpoints(recipe, out, threads=1)
        finally:
            if cache is not None:
                shutil.rmtree(cache, ignore_errors=True)

    error = call_guarded(merge, root, ERRORS, out)
    if error is None:
        with CheckpointReader(out) as reader:
            for name in reader.tensors:
                reader.read(name)
        read_config(out)
        shutil.rmtree(out)
    elif names not in str(error):
        raise Finding(f"an error that does not name {names}: {error}")


def _linear(root: Path, *models: str, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(root / m), "parameters": {"weight": 1}} for m in models],
    } | keys


def _read_header(root: Path, case: bytes) -> None:
    file = root / "expert1" / "model.safetensors"
    with _file(file, case):
        error = call_guarded(lambda: read_header(file), root, ERRORS)
        try:
            with safe_open(file, "pt") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError:
            shapes = None
        if error is None:
            # The safetensors library is the oracle: what is read here, it reads too, and as the same.
            if shapes != {name: info.shape for name, info in read_header(file).items()}:
                raise Finding(f"the safetensors library reads {shapes}")
        elif str(file) not in str(error):
            raise Finding(f"an error that does not name the file: {error}")
        elif shapes is not None and not any(reason in str(error) for reason in _STRICTER):
            raise Finding(f"the safetensors library reads {shapes}, here: {error}")
        _merge(root, _linear(root, "expert0", "expert1"), str(root))


# What this library refuses and the safetensors library accepts.
_STRICTER = (
    "does not begin with {",
    "is there twice",
    "has dtype",
    f"need at most {MAX_DIMENSIONS} dimensions",
    "its name",
    "surrogate",
    "more than 64",
)


def _read_index(root: Path, case: bytes) -> None:
    folder = root / "sharded"
    folder.mkdir()
    try:
        for name, tensor in tensors(5).items():
            save_file({name: tensor}, folder / f"{name}.safetensors")
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "model.safetensors.index.json").write_bytes(case)
        _merge(root, _linear(root, "expert0", "sharded"), str(folder))
    finally:
        shutil.rmtree(folder)


def _read_config(root: Path, case: bytes) -> None:
    with _file(root / "base" / "config.json", case), _file(root / "base" / "generation_config.json", b"{}"):
        _merge(root, _linear(root, "base", "expert0"), str(root))


def _read_recipe(root: Path, case: bytes) -> None:
    recipe = root / "r.yml"
    with _file(recipe, case), contextlib.chdir(root) if sys.version_info >= (3, 11) else _chdir(root):
        error = call_guarded(lambda: load_recipe(recipe), root, ERRORS)
        if error is None and load_recipe(recipe).output_tokenizer is None:  # transformers would read tokenizers
            _merge(root, recipe)
        elif error is not None and str(recipe) not in str(error):
            raise Finding(f"an error that does not name the recipe: {error}")


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _read_adapter_config(root: Path, case: bytes) -> None:
    with _file(root / "adapter" / "adapter_config.json", case):
        _merge_adapter(root)


def _read_adapter(root: Path, case: bytes) -> None:
    with _file(root / "adapter" / "adapter_model.safetensors", case):
        _merge_adapter(root)


def _merge_adapter(root: Path) -> None:
    base = str(root / "base")
    recipe = {"merge_method": "task_arithmetic", "base_model": base, "models": [{"model": str(root / "adapter")}]}
    _merge(root, recipe, str(root / "adapter"))
    pair = {"models": [{"model": f"{base}+{root / 'adapter'}", "parameters": {"weight": 1}}], "merge_method": "linear"}
    _merge(root, pair, str(root / "adapter"))


def _read_tokenizer(root: Path, case: bytes) -> None:
    with _file(root / "base" / "tokenizer_config.json", case):
        _merge(root, _linear(root, "base", "expert0", chat_template="auto"), str(root / "base"))


def _read_statistics(root: Path, case: bytes) -> None:
    file = root / "s.safetensors"
    with _file(file, case):
        error = call_guarded(lambda: StatisticsReader(file).close(), root, ERRORS)
        if error is not None and str(file) not in str(error):
            raise Finding(f"an error that does not name the file: {error}")
        recipe = {"merge_method": "regmean", "models": [{"model": str(root / "expert0"), "statistics": str(file)}] * 2}
        _merge(root, recipe, str(root))


def _read_prompts(root: Path, case: bytes) -> None:
    file = root / "p.jsonl"
    with _file(file, case):
        error = call_guarded(lambda: read_prompts(file), root, ERRORS)
        if error is not None and str(file) not in str(error):
            raise Finding(f"an error that does not name the file: {error}")


def _read_gguf(root: Path, case: bytes) -> None:
    import gguf

    file = root / "model.gguf"
    with _file(file, case):
        error = call_guarded(lambda: read_gguf_header(file), root, ERRORS)
        if error is None:
            # gguf is the oracle: what is read here, it reads as the same, if it knows the encoding.
            found = {t.name: (t.shape, t.offset) for t in read_gguf_header(file).tensors}
            with contextlib.suppress(Exception):
                read = {t.name: (tuple(map(int, t.shape[::-1])), t.data_offset) for t in gguf.GGUFReader(file).tensors}
                if read != found:
                    raise Finding(f"gguf reads {read}")
        elif str(file) not in str(error):
            raise Finding(f"an error that does not name the file: {error}")
        _merge(root, _linear(root, "model.gguf", "model.gguf"), str(file))


@functools.cache
def _hub(folder: Path) -> HubServer:
    """A hub that publishes a folder as org/base, until the process ends."""
    server = _to_the_end.enter_context(hub_server())
    server.add("org/base", folder)
    return server


_to_the_end = contextlib.ExitStack()
atexit.register(_to_the_end.close)


def _read_hub(root: Path, case: bytes) -> None:
    from huggingface_hub import constants

    server, cache = _hub(root / "published"), root / "cache"
    server.answer = case
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(root / "token"),
    }
    recipe = _linear(root, "expert0")
    recipe["models"].append({"model": "org/base", "parameters": {"weight": 1}})
    with (
        mock.patch.multiple(constants, **settings),
        mock.patch("tempfile.tempdir", str(root / "temporary")),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        _merge(root, recipe, "org", cache)  # as org/base, or by its folder in the cache


def _read_rearranged(root: Path, case: bytes) -> None:
    with _file(root / "moe" / "model.safetensors", case):
        for other in ("apart", "fused"):
            _merge(root, _linear(root, other, "moe"), str(root))


def _run_command(root: Path, case: bytes) -> None:
    arguments = json.loads(case)
    stderr = io.StringIO()

    def run() -> None:
        with (
            _chdir(root),
            mock.patch.object(sys, "argv", ["resm-kernels", *arguments]),
            mock.patch("signal.signal"),
            contextlib.redirect_stderr(stderr),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            try:
                cli.main()
            except SystemExit as exit_:
                if exit_.code not in (0, 1, 2):
                    raise Finding(f"exit code {exit_.code}") from None
        gc.unfreeze()  # the command freezes what it has loaded, for a process that runs one command

    shutil.copytree(
        root, copied := root.parent / f"{root.name}-run", symlinks=True, ignore=shutil.ignore_patterns("pipe")
    )
    os.mkfifo(copied / "pipe")
    try:
        root = copied
        call_guarded(run, root, ERRORS, root)
    finally:
        shutil.rmtree(copied)
    text = stderr.getvalue()
    if "--traceback before the command" in text or "[Errno" in text:
        raise Finding(f"an internal error: {text.strip()[:300]}")


_READERS = {
    "header": _read_header,
    "index": _read_index,
    "config": _read_config,
    "recipe": _read_recipe,
    "adapter_config": _read_adapter_config,
    "adapter": _read_adapter,
    "tokenizer": _read_tokenizer,
    "statistics": _read_statistics,
    "prompts": _read_prompts,
    "gguf": _read_gguf,
    "hub": _read_hub,
    "rearranged": _read_rearranged,
    "command": _run_command,
}
_PACKAGES = {"gguf": ("gguf", "transformers"), "hub": ("huggingface_hub",), "rearranged": ("transformers",)}
TARGETS = {name: Target(CASES[name], read, _PACKAGES.get(name, ())) for name, read in _READERS.items()}
