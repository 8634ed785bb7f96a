"""The readers that are fuzzed: for each a way to make cases, and a call that reads one.

A case is the content of one file, in a folder where all else is right. Cases of the command line are its arguments, as
a JSON list.
"""

from __future__ import annotations

import contextlib
import gc
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

import torch
from guard import Finding, call_guarded
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from mutations import damaged, mutated, written
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from resm_kernels import cli
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.calibrate.prompts import read_prompts
from resm_kernels.checkpoint import CheckpointError, CheckpointReader, read_config
from resm_kernels.checkpoint.format import MAX_DIMENSIONS, read_header
from resm_kernels.checkpoint.statistics import StatisticsReader
from resm_kernels.dtypes import SAFETENSORS_DTYPES
from resm_kernels.engine import MergeError, merge_checkpoints
from resm_kernels.recipe import RecipeError, load_recipe

ERRORS = (CheckpointError, MergeError, RecipeError, CalibrationError)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "vocab_size": 4,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
    "text_config": {"vocab_size": 4, "dtype": "float32", "layer_types": ["full"]},
    "eos_token_id": [1, 2],
    "mlp_only_layers": [0],
    "layer_types": ["full"],
}
QUERY = "model.layers.0.self_attn.q_proj"
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {"k_proj": 4, r"^model\.layers\.\d+.(up|down)_proj": 3},
    "alpha_pattern": {".*q_proj": 8},
    "target_modules": ["q_proj"],
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "base_model_name_or_path": "base",
    "init_lora_weights": True,
}
TOKENIZER = {
    "chat_template": [{"name": "default", "template": "{{ messages }}"}, {"name": "other", "template": "x"}],
    "tokenizer_class": "LlamaTokenizer",
    "model_max_length": 10**30,
}
ABOUT = {
    "kind": "gram",
    "model": "m",
    "answers_by": "m",
    "fingerprint": "0",
    "prompts": 3,
    "tokens": 5,
    "scale": 1.0,
    "shared": {"model.layers.0.self_attn.k_proj.weight": f"{QUERY}.weight"},
    "transposed": [],
    "version": "0",
}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """The weights of a model so small that a merge takes a few milliseconds."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (4, 4), f"{QUERY}.weight": (4, 4), "lm_head.weight": (4, 4)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def factors() -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{QUERY}."
    return {f"{prefix}lora_A.weight": torch.ones(2, 4), f"{prefix}lora_B.weight": torch.ones(4, 2)}


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@st.composite
def safetensors(draw: DrawFn, good: bytes, metadata: Any = None) -> bytes:
    """A file with a mutated header; in some cases its stated length, or the data, are wrong too."""
    header, data = split(good)
    if metadata is not None:
        header["__metadata__"] = {"resm_kernels.statistics": written(draw(mutated(metadata))).decode(errors="replace")}
    numbers = st.sampled_from(
        [[0, len(data)], [len(data), len(data)], [0, 2**63], [64, 0], [4, 4], [0, 2**62, 2], [1] * 20]
    )
    dtypes = st.sampled_from([*SAFETENSORS_DTYPES, "F8_E5M2", "F4", "f32", "C64"])
    text = draw(damaged(mutated(header, numbers | dtypes).map(written)))
    wrong = st.sampled_from([0, 1, 7, 8, 2**31, 100_000_001, 2**63 - 1, 2**63, 2**64 - 1])
    length = len(text) if draw(st.integers(0, 9)) else draw(wrong)
    cut = data if draw(st.integers(0, 9)) else draw(st.sampled_from([b"", data[:-1], data + b"\0", data * 2]))
    return length.to_bytes(8, "little") + text + cut


RECIPE = """\
merge_method: ties
base_model: base
models:
  - model: expert0
    parameters: {weight: [0.5, 1], density: [{filter: mlp, value: 0.5}, {value: 1.0}]}
  - &e {model: expert1}
parameters:
  normalize: true
  lambda: 1e-1
dtype: float32
"""
SLICES = """\
merge_method: linear
slices:
  - sources:
      - {model: expert0, layer_range: [0, 1], parameters: {weight: 1}}
      - {model: expert1, layer_range: [0, 1], parameters: {weight: 0.5}}
"""
MODULES = """\
merge_method: slerp
base_model: base
modules:
  default:
    models: [{model: base}, {model: {model: {path: expert0}}}]
parameters: {t: 0.5}
chat_template: chatml
tokenizer: {source: base, pad_to_multiple_of: 4, tokens: {x: {source: {kind: zero}, force: true}}}
"""
_PIECES = (
    *("- ", "? ", ": ", "[", "]", "{", "}", "&a ", "*a", "<<: *a", "<<: ", "!!int ", "!!float ", "!!timestamp ", "!x "),
    *(
        "\n---\n",
        "|\n ",
        ">\n ",
        '"',
        "'",
        "%YAML 1.1\n",
        "#",
        "\t",
        "\n",
        " " * 20,
        "\\ud800",
        "\0",
        "\ufeff",
        "\u2028",
    ),
    *("~", "null", "true", ".inf", ".nan", "1e400", "1.0e+400", "1:59:59", "0x_", "0b_", "9" * 200, "9" * 5000),
    *(
        "2001-99-99",
        "~nosuchuser/x",
        "expert0+adapter",
        "x" * 300,
        "[" * 40,
        "{a: " * 40,
        "- " * 40,
        "model: ",
        "*",
        "=",
    ),
    *(
        "parameters: {",
        "lambda: ",
        "weight: ",
        "tokens: ",
        "layer_range: [0, ",
        "slices:\n",
        "tokenizer_source: union\n",
    ),
)


@st.composite
def yaml_texts(draw: DrawFn) -> bytes:
    """A recipe with pieces of YAML inserted, cut out or repeated, or one that JSON states."""
    text = draw(st.sampled_from([RECIPE, SLICES, MODULES]))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.sampled_from([0, 0, 1, 5, 20]))
        piece = draw(st.sampled_from(_PIECES) | st.text(max_size=4))
        text = text[:start] + piece * draw(st.sampled_from([1, 1, 1, 3, 100])) + text[end:]
    return text.encode(errors="surrogatepass")


STRUCTURES: tuple[Any, ...] = (
    {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "expert0", "parameters": {"weight": [0, 1]}}, {"model": "expert1", "statistics": None}],
        "parameters": {"lambda": 1, "density": [{"filter": "x", "value": 1}, {"value": 0.5}]},
        "tokenizer": {
            "source": "union",
            "tokens": {"a": {"source": {"kind": "model_token", "model": "base", "token": "b"}}},
        },
    },
    {
        "merge_method": "linear",
        "slices": [{"sources": [{"model": "expert0", "layer_range": [0, 1], "parameters": {"weight": 1}}]}],
        "dtype": "bfloat16",
        "chat_template": "auto",
    },
)
_ARGUMENTS = (
    *("merge", "merge", "merge", "stats", "extract-lora", "info", "calibrate", "mrege", "--", "--help", "-h", "-q"),
    *(
        "good.yml",
        "good.yml",
        "out",
        "out",
        "base",
        "expert0",
        "expert0+adapter",
        "nowhere",
        "pipe",
        "/dev/null",
        ".",
        "",
    ),
    *(
        "--dry-run",
        "--overwrite",
        "--traceback",
        "--json",
        "--rank",
        "1",
        "--memory-limit",
        "--max-shard-size",
        "--threads",
    ),
    *("--random-seed", "--device", "--device-memory", "--out-shard-size", "--num-threads", "--cuda", "-j", "--prompts"),
    *("--target", "--energy", "--dtype", "--accuracy", "--max-rank", "--copy-tokenizer", "--embeddings", "--save-rest"),
    *("9" * 400, "9" * 5000, "-1", "0", "1e400", "nan", "inf", "5GB", "1B", "0.5KiB", "٣", "x" * 300, "~nosuchuser/x"),
    *(
        "out\udcff",
        "a/../out",
        "out/x",
        "cpu",
        "cuda:99",
        "cuda:99999999999999999999",
        "auto",
        "float32",
        "=",
        "--=",
        "--rank=",
    ),
    *(
        "base/config.json",
        "adapter",
        "--answers-by",
        "--polish-steps",
        "--held-out",
        "--spectra",
        "2",
        "1024",
        "18446744073709551616",
    ),
)


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        cases: Makes cases.
        read: Reads one in a folder that `place` has made; raises a Finding if it is at fault.
    """

    cases: SearchStrategy[bytes]
    read: Callable[[Path, bytes], None]


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
    (root / "good.yml").write_text(RECIPE)
    os.mkfifo(root / "pipe")
    return root


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


def _merge(root: Path, recipe: Any, names: str = "") -> None:
    """Merge; an error must name the file or folder `names`."""
    out = root / "out"
    error = call_guarded(lambda: merge_checkpoints(recipe, out, threads=1), root, ERRORS, out)
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


def _arguments(arguments: list[str]) -> bytes:
    return json.dumps(arguments).encode()


_GOOD = save(tensors(1))
_STATISTICS = save({f"{QUERY}.weight": torch.eye(4)})
_LINE = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
TARGETS = {
    "header": Target(safetensors(_GOOD), _read_header),
    "index": Target(
        damaged(mutated({"metadata": {}, "weight_map": {n: f"{n}.safetensors" for n in tensors(0)}}).map(written)),
        _read_index,
    ),
    "config": Target(damaged(mutated(CONFIG).map(written)), _read_config),
    "recipe": Target(yaml_texts() | damaged(st.sampled_from(STRUCTURES).flatmap(mutated).map(written)), _read_recipe),
    "adapter_config": Target(damaged(mutated(ADAPTER).map(written)), _read_adapter_config),
    "adapter": Target(safetensors(save(factors())), _read_adapter),
    "tokenizer": Target(damaged(mutated(TOKENIZER).map(written)), _read_tokenizer),
    "statistics": Target(safetensors(_STATISTICS, ABOUT), _read_statistics),
    "prompts": Target(
        damaged(st.sampled_from([_LINE, {"prompt": "x", "response": "y"}]).flatmap(mutated).map(written)), _read_prompts
    ),
    "command": Target(
        st.lists(st.sampled_from(_ARGUMENTS) | st.text(max_size=4), max_size=8).map(_arguments), _run_command
    ),
}
