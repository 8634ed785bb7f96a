"""Prompts with their answers as token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer as token ids."""

    tokens: tuple[int, ...]  # prompt and answer; the end token, if the expert produced one, is the last of them
    answer_start: int  # position of the answer's first token, at least 1
