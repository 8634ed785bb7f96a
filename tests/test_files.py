"""Files of others are read within limits, and what is wrong with one is said with its name, the place and the need."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import Family, llama_config, save_adapter
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from resm_kernels.checkpoint import CheckpointError, CheckpointReader
from resm_kernels.checkpoint.format import read_header
from resm_kernels.checkpoint.statistics import StatisticsReader
from resm_kernels.engine import merge_checkpoints
from resm_kernels.files import check_structure, expanded, parse_json, path_problem, read_bytes, shortened
from resm_kernels.files.yaml_text import parse_yaml
from resm_kernels.recipe import RecipeError, load_recipe

SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a pipe, need a regular file"),
    "folder": (Path.mkdir, "is a folder, need a regular file"),
    "socket": (lambda path: _socket(path), "is a socket, need a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, need a regular file"),
    "loop": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "link to nowhere": (lambda path: path.symlink_to("nowhere"), "is a link to a file that does not exist"),
}


def _socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "model.safetensors", "tokenizer.json", "spiece.model", "chat_template.jinja"),
        *("generation_config.json", "tokenizer_config.json"),
    ],
)
def test_only_regular_files_of_models_are_opened(family: Family, name: str, kind: str) -> None:
    make, message = SPECIAL[kind]
    file = family.base_folder / name
    file.unlink(missing_ok=True)
    make(file)
    with pytest.raises(CheckpointError, match=message) as caught:
        merge_checkpoints(family.recipe(chat_template="auto"), family.out)
    assert str(file) in str(caught.value)
    assert family.leftovers() == []


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_opened_elsewhere(family: Family, kind: str) -> None:
    make, message = SPECIAL[kind]
    make(family.root / "recipe")
    with pytest.raises(RecipeError, match=message):
        load_recipe(family.root / "recipe")
    with pytest.raises(CheckpointError, match=message):
        StatisticsReader(family.root / "recipe")
    factors = {f"base_model.model.model.layers.0.mlp.up_proj.lora_{f}.weight": torch.ones(1, 1) for f in "AB"}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        adapter = save_adapter(family.root / f"adapter {name}", factors, {"peft_type": "LORA", "r": 1, "lora_alpha": 1})
        (adapter / name).unlink()
        make(adapter / name)
        with pytest.raises(CheckpointError, match=message):
            merge_checkpoints(
                family.recipe("linear", models=[{"model": f"{family.base_folder}+{adapter}"}]), family.out
            )
    shards = family.root / "shards"
    shards.mkdir()
    make(shards / "a.safetensors")
    (shards / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(shards)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_files_of_the_system_do_not_block(tmp_path: Path) -> None:
    """/proc/self/mem claims no size and fails; /proc/kmsg, where it may be opened, waits for the next message."""
    for file in (Path("/proc/self/mem"), Path("/proc/kmsg")):
        with pytest.raises(CheckpointError, match=f"{file}: cannot be read"):
            read_bytes(file, CheckpointError)


def test_linked_files_are_read(family: Family) -> None:
    file = family.base_folder / "model.safetensors"
    file.rename(family.root / "blob")
    file.symlink_to("../blob")
    assert CheckpointReader(family.base_folder).tensors


@pytest.mark.parametrize("limit", [5, 6])
def test_larger_files_than_the_limit_are_refused(tmp_path: Path, limit: int) -> None:
    (tmp_path / "f").write_bytes(b"123456")
    if limit == 6:
        assert read_bytes(tmp_path / "f", CheckpointError, limit=limit) == b"123456"
        return
    with pytest.raises(CheckpointError, match="has 6 bytes or more, need at most 5"):
        read_bytes(tmp_path / "f", CheckpointError, limit=limit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": [1, {"b": 2, "b": 3}]}', r"f: a\[1\]: the key 'b' is there twice"),
        ('{"a": 1e400}', "f: a: got 1e400, need a number that float64 can hold"),
        ('{"a": [0, ' + "9" * 101 + "]}", r"f: a\[1\]: got a whole number of more than 100 digits"),
        ('{"a": ' + "9" * 10_000 + "}", "more than 100 digits"),
        ('{"a": "x\\ud800"}', r"f: a: character 1 is \\ud800, half of a surrogate pair"),
        ('{"\\udc00": 1}', r"key '.udc00': character 0"),
        ("[" * 65 + "]" * 65, "nested more than 64 levels deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 levels deep"),
        ("[" * 100_000, "nested more than 64 levels deep"),
        ("[" * 11_000_000, "more than 5000000 values"),
        ("[" + "[]," * 5_100_000 + "0]", "more than 5000000 values"),
        (b'{"a": "\xff"}', "byte 7 is 0xff, which is not UTF-8"),
        (b"\xef\xbb\xbf\xff", "byte 3 is 0xff"),
        ("{}".encode("utf-16"), "not UTF-8"),
        ("{", "f: cannot be read as JSON: .*line 1 column 2"),
        ("", "cannot be read as JSON"),
    ],
)
def test_json_is_read_within_limits(text: str | bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_json(text, "f", CheckpointError)


def test_json_that_models_have_is_read() -> None:
    data = parse_json(
        b'\xef\xbb\xbf{"a": Infinity, "b": 1e-400, "c": ' + str(10**30).encode() + b"}", "f", CheckpointError
    )
    assert data == {"a": math.inf, "b": 0.0, "c": 10**30}
    assert parse_json("[" * 64 + "]" * 64, "f", CheckpointError) is not None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(json_values)
def test_json_is_what_the_standard_library_reads(data: Any) -> None:
    assert parse_json(json.dumps(data).encode(), "f", CheckpointError) == data


@given(json_values)
def test_yaml_is_what_pyyaml_reads(data: Any) -> None:
    text = yaml.safe_dump(data)
    assert parse_yaml(text, "f", RecipeError)[0].data == yaml.safe_load(text)


GROWING = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GROWING, "f:5: has more than 100000 values with its aliases written out"),
        (
            GROWING.replace("[x, x, x, x, x, x, x, x, x, x]", "{x: 1}").replace("[", "{<<: [").replace("]\n", "]}\n"),
            "f:6: has",
        ),
        ("a: 1\nb: &b [1, *b]", r"f:2: the alias \*b stands in the part that it stands for"),
        ("a: &a {b: *a}", r"f:1: the alias \*a"),
        ("x:\n- " + "[" * 40 + "]" * 40, "f:2: is nested more than 32 levels deep"),
        ("- " * 5000, "f:1: is nested more than 32"),
        ("{a: 1, a: 2}", "f:1: key 'a' is already set in line 1"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "f:4: key 'c' is already set in line 3"),
        ("? [a]\n: 1", "f:1: a list or mapping is a key"),
        ("a: " + "9" * 101, "f:1: got a whole number of more than 100 digits"),
        ("a: " + "9" * 9999, "f:1: got a number of more than 100 digits"),
        ("a: 1" + ":59" * 60_000, "f:1: got a number of more than 100 digits"),
        ("a: 1.0e+400", "f:1: got '1.0e.400', need a number that float64 can hold"),
        ('\na: "\\ud800"', r"f:2: character 0 is \\ud800"),
        ("a: 2001-99-99", "f:1: got '2001-99-99', which is no timestamp"),
        ("a: !!int x", "f:1: got 'x', which is no int"),
        ("a: !!bool x", "f:1: got 'x', which is no bool"),
        ("a: 0x_", "f:1: got '0x_', which is no int"),
        ("a: *b", "f:1: not valid YAML: found undefined alias"),
        ("\n\na: \0", "f:3: not valid YAML: has the character #x0000"),
        ("a\n" + "---\nb\n" * 100, "f:200: has more than 100 documents"),
        (("a: [" + "1," * 60_000 + "]\n---\n") * 2, "f:3: has more than 100000 values"),
        ("a: " + "x" * 300_000, "f: has more than 262144 bytes"),
        ("a: [" + "1," * 110_000 + "]", "has more than 100000 values"),
    ],
)
def test_yaml_is_read_within_limits(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_yaml(text, "f", RecipeError)


def test_documents_are_read_apart() -> None:
    first, second = parse_yaml("# first\na: 1\n---\nb: 2  # two\n...\n", "f", RecipeError)
    assert (first.data, second.data) == ({"a": 1}, {"b": 2})
    assert (first.text, second.text) == ("a: 1\n", "b: 2  # two\n")
    assert (first.first_line, second.first_line, second.line(("b",))) == (2, 4, 4)
    assert parse_yaml("", "f", RecipeError) == () and parse_yaml("# no\n", "f", RecipeError) == ()


def test_aliases_and_merge_keys_are_read() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n"
    assert parse_yaml(text, "f", RecipeError)[0].data == yaml.safe_load(text)


def test_structures_of_callers_are_checked_too() -> None:
    circle: dict[str, Any] = {"merge_method": "ties"}
    circle["models"] = [circle]
    with pytest.raises(RecipeError, match=r"recipe: models\[0\].models.*nested more than 32"):
        load_recipe(circle)
    many: Any = "x"
    for _ in range(9):
        many = [many] * 10
    with pytest.raises(RecipeError, match="more than 100000 values"):
        load_recipe({"models": many})
    for value, message in ((10**5000, "more than 100 digits"), ("\ud800", "surrogate")):
        with pytest.raises(RecipeError, match=rf"recipe: parameters.weight: .*{message}"):
            load_recipe({"parameters": {"weight": value}})
    check_structure({"a": (1, [2.0, None])}, "f", ValueError)


def test_values_are_shown_short() -> None:
    assert len(shortened("x" * 10**6)) <= 300 and len(shortened([["y" * 1000] * 1000])) < 3000
    assert "too large to show" in shortened([10**5000])


def test_paths_that_no_file_can_have_are_refused() -> None:
    for text, message in (
        ("a\0b", "NUL byte"),
        ("\ud800", r"character \\ud800"),
        ("x" * 256, "a name of 256 bytes; need at most 255"),
        ("ä" * 128, "a name of 256 bytes"),
        ("x/" * 2500, "a path of 5001 bytes; need at most 4095"),
    ):
        with pytest.raises(RecipeError, match=f"model: got .*{message}"):
            expanded(text, RecipeError, "model")
    assert path_problem("x" * 255) is path_problem("\udcff") is None  # the second is a name that is not UTF-8
    assert str(expanded("~nosuchuser/x", RecipeError, "model")) == "~nosuchuser/x"


def test_models_of_recipes_have_paths(family: Family) -> None:
    for name, message in (
        ("~nosuchuser/x", r"models\[0\].model: got '~nosuchuser/x', but no user has that name"),
        ("x" * 300, r"models\[0\].model: got .* a name of 300 bytes"),
        ("a\0b", r"models\[0\].model: got .* NUL byte"),
        (str(family.base_folder / "config.json"), "which is a file; need a local model folder"),
    ):
        with pytest.raises(RecipeError, match=message):
            merge_checkpoints(family.recipe("linear", models=[{"model": name}]), family.out)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [8, 8]}, "below 2.63"),
        ({"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [8, 8]}, "below 2.63"),
        ({"dtype": "F32", "shape": [0] * 17, "data_offsets": [8, 8]}, "at most 16 dimensions"),
        ({"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [8, 8]}, "below 2.63"),
        ({"dtype": "F32", "shape": [2**40], "data_offsets": [8, 2**42 + 8]}, "but its tensors end at"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [8, 8]}, "need whole numbers of at least 0"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [8, 12]}, "need whole numbers"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "begins at byte"),
        ({"dtype": "F32", "shape": [0], "data_offsets": [12, 12]}, "begins at byte"),
        ({"dtype": "F32", "shape": [0], "data_offsets": [8]}, "need 0 bytes"),
        ({"dtype": "F31", "shape": [0], "data_offsets": [8, 8]}, "unsupported dtype F31"),
        ({"dtype": [], "shape": [0], "data_offsets": [8, 8]}, "need a name such as F32"),
        ({"shape": [0], "data_offsets": [8, 8]}, "dtype: got None"),
        ([], r"tensor 'x': got \[\], need an object"),
    ],
)
def test_headers_cannot_claim_what_is_not_there(tmp_path: Path, entry: Any, message: str) -> None:
    content = save({"a": torch.ones(2)})
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length]) | {"x": entry}
    text = json.dumps(header).encode()
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(tmp_path / "f")
    assert str(tmp_path / "f") in str(caught.value)


def test_memory_is_not_taken_for_what_a_header_claims(tmp_path: Path) -> None:
    for length in (90_000_000, 100_000_001, 2**63, 2**64 - 1):
        (tmp_path / "f").write_bytes(struct.pack("<Q", length) + b"{")
        tracemalloc.start()
        with pytest.raises(CheckpointError, match="its header has"):
            read_header(tmp_path / "f")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20
    with open(tmp_path / "f", "wb") as stream:
        stream.write(struct.pack("<Q", 100_000_001))
        stream.truncate(10**12)  # a terabyte of nothing
    with pytest.raises(CheckpointError, match="100000001 bytes, need at most 100000000"):
        read_header(tmp_path / "f")


def test_tensors_have_names_of_bounded_length(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(save({"x" * 1000: torch.ones(2), "a\nb": torch.ones(2)}))
    assert len(read_header(tmp_path / "f")) == 2
    (tmp_path / "f").write_bytes(save({"x" * 1001: torch.ones(2)}))
    with pytest.raises(CheckpointError, match="1001 letters, need at most 1000"):
        read_header(tmp_path / "f")


def test_indices_name_files_in_their_folder(tmp_path: Path) -> None:
    for shard in ("../f", "/etc/passwd", "", "..", None, 5, "a\0b", "x" * 300, "a\n", "sub/f"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": shard}}))
        with pytest.raises(CheckpointError, match=r"weight_map: 't': names the shard .* in the same folder"):
            CheckpointReader(tmp_path)


def test_configurations_of_odd_types_do_not_end_in_internal_errors(family: Family) -> None:
    odd = {"layer_types": 5, "text_config": [1], "eos_token_id": [[1]], "dtype": {"a": 1}, "mlp_only_layers": "x"}
    for folder in (family.base_folder, *family.folders):
        (folder / "config.json").write_text(json.dumps(llama_config(**odd)))
    merge_checkpoints(family.recipe(), family.out)
    assert json.loads((family.out / "config.json").read_text())["layer_types"] == 5


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("rank_pattern", [1], "rank_pattern: got .1., need an object"),
        ("rank_pattern", {"a": "b"}, "rank_pattern: 'a': got 'b', need a positive whole number"),
        ("rank_pattern", {r"(a)\1": 1}, r"rank_pattern: pattern .* is not supported"),
        ("alpha_pattern", {"(": 1}, r"alpha_pattern: pattern '\(' is no regular expression"),
        ("r", 2**30, "r: got 1073741824, need a positive whole number up to 1048576"),
        ("r", 1.0, "r: got 1.0"),
        ("lora_alpha", float("nan"), "lora_alpha: got nan"),
        ("lora_alpha", 1e300, "lora_alpha: got 1e.300"),
        ("use_dora", "false", "use_dora: got 'false', need true or false"),
        ("base_model_name_or_path", 5, "base_model_name_or_path: got 5, need a text"),
        ("base_model_name_or_path", "a\0b", "base_model_name_or_path: got 'a.x00b', which has a NUL byte"),
        ("peft_type", [], r"peft_type: got \[\], need LORA, "),
    ],
)
def test_adapters_state_values_of_the_right_type(family: Family, entry: str, value: Any, message: str) -> None:
    module = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(1, 32), f"{module}.lora_B.weight": torch.ones(48, 1)}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1} | {entry: value}
    adapter = save_adapter(family.root / "adapter", factors, config)
    with pytest.raises(CheckpointError, match=message) as caught:
        merge_checkpoints(family.recipe("task_arithmetic", models=[{"model": str(adapter)}]), family.out)
    assert str(adapter / "adapter_config.json") in str(caught.value)
