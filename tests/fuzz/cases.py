"""How cases are made: files that are right but for a few places, pieces of recipes, arguments of the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from hub_server import commit_of
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from mutations import damaged, mutated, written
from published import gguf_files, hub_answers, moe_files
from safetensors.torch import save

from resm_kernels.dtypes import SAFETENSORS_DTYPES

CORPUS = Path(__file__).parent / "corpus"
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


def other_adapters() -> list[dict[str, torch.Tensor]]:
    """An adapter of an embedding, one with whole tensors and biases, and one with DoRA's magnitudes."""
    prefix = "base_model.model."
    embedding = {
        f"{prefix}model.embed_tokens.lora_embedding_{f}": torch.ones(*s) for f, s in (("A", (2, 4)), ("B", (4, 2)))
    }
    whole = {f"{prefix}lm_head.modules_to_save.weight": torch.ones(4, 4), f"{prefix}{QUERY}.lora_B.bias": torch.ones(4)}
    magnitude = {f"{prefix}{QUERY}.lora_magnitude_vector": torch.ones(4)}
    return [embedding, factors() | whole, factors() | magnitude, {f"{prefix}{QUERY}.base_layer.bias": torch.ones(4)}]


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@st.composite
def safetensors(
    draw: DrawFn, good: bytes, metadata: Any = None, names: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """A file with a mutated header; in some cases its stated length, or the data, are wrong too.

    Args:
        good: The file.
        metadata: What is written into the header, mutated; None for nothing.
        names: Names of tensors that are exchanged for others before all else.
    """
    header, data = split(good)
    header = {names.get(name, name): entry for name, entry in header.items()}
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


_ADAPTERS = [save(stored) for stored in (factors(), factors(), *other_adapters())]
_PATTERNS = (
    *(
        {"(a+)+$": 2},
        {"q_proj": 2, ".*": 3},
        {r"(?:q|k)_proj": 2},
        {r"(a)\1": 2},
        {"(?=a)": 2},
        {"(": 2},
        {"a{999}{999}": 2},
    ),
    *(
        {"[": 1},
        {"[]-a]": 2},
        {"((((((.*)*)*)*)*)*)*x": 2},
        {"a{1000}": 2},
        {"^$": 1},
        {r"\b\w+\B": 2},
        {"x|": 2},
        {"\n": 2},
    ),
)

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


def _arguments(arguments: list[str]) -> bytes:
    return json.dumps(arguments).encode()


def _with_corpus(name: str, made: SearchStrategy[bytes]) -> SearchStrategy[bytes]:
    """Cases that are made anew, and, in every fourth, those of the corpus with some damage."""
    kept = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    return st.one_of(made, made, made, damaged(st.sampled_from(kept))) if kept else made


_LINE = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
_INDEX = {"metadata": {}, "weight_map": {name: f"{name}.safetensors" for name in tensors(0)}}
_MADE = {
    "header": safetensors(save(tensors(1))),
    "index": damaged(mutated(_INDEX).map(written)),
    "config": damaged(mutated(CONFIG).map(written)),
    "recipe": yaml_texts() | damaged(st.sampled_from(STRUCTURES).flatmap(mutated).map(written)),
    "adapter_config": damaged(mutated(ADAPTER, st.sampled_from(_PATTERNS)).map(written)),
    "adapter": st.sampled_from(_ADAPTERS).flatmap(safetensors),
    "tokenizer": damaged(mutated(TOKENIZER).map(written)),
    "statistics": safetensors(save({f"{QUERY}.weight": torch.eye(4)}), ABOUT),
    "prompts": damaged(st.sampled_from([_LINE, {"prompt": "x", "response": "y"}]).flatmap(mutated).map(written)),
    "gguf": gguf_files,
    "hub": hub_answers(commit_of("org/base")),
    "rearranged": moe_files(lambda good, names: safetensors(good, names=names)),
    "command": st.lists(st.sampled_from(_ARGUMENTS) | st.text(max_size=4), max_size=8).map(_arguments),
}
CASES = {name: made if name == "command" else _with_corpus(name, made) for name, made in _MADE.items()}
