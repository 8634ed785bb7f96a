"""Translates options of mergekit-yaml and mergekit-multi to this command line.

Some have another name here, some have no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Flag:
    """One of mergekit's options.

    Attributes:
        names: Its spellings.
        note: Why it has no effect here; empty if it has one.
        takes_value: True if a value follows it.
        ours: The arguments that replace it; a value that follows it is passed on.
        refused: Why it is refused; empty if it is accepted.
        positional: True if its value alone is passed on.
    """

    names: tuple[str, ...]
    note: str = ""
    takes_value: bool = False
    ours: tuple[str, ...] = ()
    refused: str = ""
    positional: bool = False


FLAGS: Final = (
    Flag(("--cuda",), ours=("--device", "cuda")),
    Flag(("--no-cuda",), ours=("--device", "cpu")),
    Flag(("--gpu-rich",), ours=("--device", "cuda:all")),
    Flag(("--out-shard-size",), takes_value=True, ours=("--max-shard-size",)),
    Flag(("--num-threads", "-j"), takes_value=True, ours=("--threads",)),
    Flag(("--intermediate-dir", "-I"), takes_value=True, ours=("--keep-intermediates",)),
    Flag(("--out-path",), takes_value=True, positional=True),
    Flag(("--lazy", "--no-lazy"), "a kept merge is used again if it is of the same recipe and inputs, and whole"),
    Flag(("--lazy-unpickle", "--no-lazy-unpickle"), "tensors are always read one by one"),
    Flag(("--low-cpu-memory", "--no-low-cpu-memory"), "memory is bounded by --memory-limit"),
    Flag(("--read-to-gpu", "--no-read-to-gpu"), "tensors are read into pinned memory, from which GPUs copy"),
    Flag(("--multi-gpu", "--no-multi-gpu"), "choose GPUs by --device, such as cuda:all"),
    Flag(("--transformers-cache",), "models of the hub are kept where HF_HUB_CACHE says", takes_value=True),
    Flag(("--lora-merge-cache",), "adapters are applied as they are read", takes_value=True),
    Flag(("--lora-merge-dtype",), "adapters are applied in fp32 or better", takes_value=True),
    Flag(("--clone-tensors", "--no-clone-tensors"), "a layer may always be used more than once"),
    Flag(("--async-write", "--no-async-write"), "writing is always asynchronous"),
    Flag(("--write-threads",), "one thread keeps up with the disk", takes_value=True),
    Flag(("--safe-serialization",), "the output is always safetensors"),
    Flag(("-v", "-vv", "-vvv"), "there is no log; --dry-run shows the plan"),
    Flag(("--no-quiet",), "this is the default"),
    Flag(("--no-unsafe-truncate-embeddings",), "this is the default"),
    Flag(("--no-safe-serialization",), refused="the output is always safetensors"),
    Flag(
        ("--unsafe-truncate-embeddings",),
        refused="cutting embeddings mixes up tokens; set tokenizer_source: base or union in the recipe",
    ),
)
_BY_NAME: Final = {name: flag for flag in FLAGS for name in flag.names}
_UNITS: Final = {"K": 10**3, "M": 10**6, "B": 10**9}


def translate(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments with mergekit's options translated, and a note for each option that has no effect here.

    Raises:
        ValueError: An option is refused, or lacks its value.
    """
    ours: list[str] = []
    notes: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        flag = _BY_NAME.get(name)
        if argument == "--":
            return [*ours, argument, *rest], notes
        if flag is None:
            ours.append(argument)
            continue
        if flag.refused:
            raise ValueError(f"{name}: {flag.refused}")
        if flag.takes_value and not equals:
            following = next(rest, None)
            if following is None:
                raise ValueError(f"{name}: got no value, need one after it")
            value = following
        if flag.note:
            notes.append(f"{name}: {flag.note}")
        ours += flag.ours
        if flag.takes_value and (flag.ours or flag.positional):
            ours.append(_bytes(value) if name == "--out-shard-size" else value)
    return ours, notes


def _bytes(size: str) -> str:
    """Return the size in this command line's words: mergekit's B stands for a billion bytes, not for a byte."""
    unit = _UNITS.get(size[-1:].upper())
    return size if unit is None or not size[:-1].isdecimal() else str(int(size[:-1]) * unit)


def repeated(arguments: Sequence[str], option: str) -> list[str]:
    """Repeat an option for each of its values: `--prompts a b` becomes `--prompts a --prompts b`.

    The values end before the next argument that begins with a dash.
    """
    result: list[str] = []
    takes_values = False
    for argument in arguments:
        if argument == option:
            takes_values = True
            result.append(argument)
        elif argument.startswith("-"):
            takes_values = False
            result.append(argument)
        else:
            is_further = takes_values and result[-1] != option
            result += [option, argument] if is_further else [argument]
    return result
