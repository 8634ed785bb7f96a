"""How a command of `resm-kernels` loads what it needs, and how it ends: what it says on stderr, and its exit code."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

INTERRUPTED = 130
_Keywords = TypeVar("_Keywords", bound=Mapping[str, Any])


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Import within this context: the garbage collector then ignores the half a million objects that imports make.

    They live as long as the process. The collector would visit them several times while their number grows, and again
    at the end of the process (measured: 0.8 s of the 2.2 s that importing and exiting take).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def options_of(parameters: Mapping[str, Any], keywords: type[_Keywords]) -> _Keywords:
    """Return the parameters of a command that are keywords of its function, which a typed dictionary names."""
    chosen: Any = {name: parameters[name] for name in keywords.__annotations__}
    return cast(_Keywords, chosen)


def say(lines: Iterable[str], *, quiet: bool) -> None:
    """Print what a plan says on stderr; if `quiet`, warnings alone."""
    for line in lines:
        if not quiet or line.startswith("warning"):
            print(line, file=sys.stderr)


def show_stats(
    recipe: Path,
    json_file: Path | None,
    plot: Path | None,
    *,
    spectra: bool,
    memory_limit: str,
    strict: bool,
    quiet: bool,
) -> None:
    """Do what the command `stats` is asked for; `cli` documents the arguments."""
    with loading():
        from rich.console import Console

        from resm_kernels.console import progress_display, stats_json, stats_table
        from resm_kernels.engine import checkpoint_stats
        from resm_kernels.recipe import load_recipe

    if json_file is not None and json_file.is_dir():
        raise ValueError(f"--json: got {json_file}, which is a folder; need the name of a file")
    if plot is not None:
        from resm_kernels.plot import check_plot

        check_plot(plot)
    checked = load_recipe(recipe)
    with progress_display(Console(stderr=True), "reading", quiet=quiet) as progress:
        rows = checkpoint_stats(
            checked,
            memory_limit=memory_limit,
            progress=progress,
            spectra=spectra,
            strict=strict,
            say=functools.partial(say, quiet=quiet),
        )
    experts = [source.model for source in checked.parts[0].slices[0].experts]
    if json_file is None or str(json_file) != "-":
        # A pipe or a file has no width that the table has to fit into: it is made so wide that no column folds.
        wide = 300 if spectra else 200
        Console(width=None if sys.stdout.isatty() else wide).print(stats_table(rows))
    if plot is not None:
        from resm_kernels.plot import plot_stats

        plot_stats(rows, experts, plot)
    if json_file is not None:
        text = stats_json(rows, experts)
        if str(json_file) == "-":
            print(text)
        else:
            json_file.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def cut_off_named(otherwise: str) -> Iterator[None]:
    """Say what becomes of the work within the context if it is interrupted or terminated.

    Args:
        otherwise: What is said if the exception has no note about it.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        fail(f"interrupted; {_notes(error) or otherwise}", INTERRUPTED)
    except SystemExit as error:
        fail(f"terminated; {_notes(error) or otherwise}", int(error.code or 0))


def fail_with(error: Exception) -> NoReturn:
    """Print an exception, with the notes that were added to it, as one line, and end the process."""
    notes = _notes(error)
    if isinstance(error, OSError) and error.filename is not None:
        fail(f"{error.filename}: {error.strerror}{f'; {notes}' if notes else ''}", 1)
    expected = isinstance(error, (ValueError, OSError))
    kind = "" if expected else f"{type(error).__name__}: "
    hint = "" if expected else " (--traceback before the command shows where)"
    fail(f"{kind}{error}{f'; {notes}' if notes else ''}{hint}", 1)


def fail(message: str, code: int) -> NoReturn:
    """Print one line and end the process."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def set_up_process() -> None:
    """Turn signals that end the process into exceptions and warnings of this library into plain lines; silence Ray."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), _terminate)
    # Ray would print its own reports of workers and machines that died, dozens of lines of a log, to stdout.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
    show = warnings.showwarning

    def show_note(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if category.__module__.startswith("resm_kernels."):
            print(f"note: {message}", file=sys.stderr)
        else:
            show(message, category, *place, **options)

    warnings.showwarning = show_note


def _terminate(signum: int, _: Any) -> None:
    # An exception lets unfinished work be flushed, or deleted; by default the process would end at once.
    raise SystemExit(128 + signum)


def _notes(error: BaseException) -> str:
    return "; ".join(getattr(error, "__notes__", ()))
