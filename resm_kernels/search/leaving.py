"""What a function that judges a model must leave as it was, and when it is broken off."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from torch import nn

from resm_kernels.search.errors import ChangedModelError, TimeIsUp

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LONGEST: Final = 1e8
"""The most seconds that an alarm is set to, three years: the system's clocks end some time after."""


class ModelState:
    """Which parameters and hooks a model has.

    Args:
        model: The model; of one that is no torch module nothing is known.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._tensors = self._parameters()
        self._hooks = self._hook_counts()
        self._values = self._value_marks()

    @property
    def has_other_values(self) -> bool:
        """True if parameters have been written to since, as far as torch counts it: not through `.data` or NumPy."""
        return self._value_marks() != self._values

    def check(self) -> None:
        """Raise a ChangedModelError for a new hook, or a parameter that is another one or has another dtype or device.

        The trials that follow would judge another model than they say. Other values are no problem: the next merge
        writes all of them.
        """
        now = self._parameters()
        for name, (identity, kind) in self._tensors.items():
            found, there = now.get(name, (None, "not there"))
            if (found, there) != (identity, kind):
                what = f"is {there}, was {kind}" if there != kind else "is another parameter"
                raise ChangedModelError(
                    f"evaluate: the function changed the model: {name!r} {what}; need the model as it was, let it work "
                    "on a copy (copy.deepcopy(model))"
                )
        for name, count in self._hook_counts().items():
            if count > self._hooks.get(name, 0):
                raise ChangedModelError(
                    f"evaluate: the function left a hook on the module {name!r}, which would be there in the trials "
                    "that follow; let it remove its hooks (handle.remove())"
                )

    def _parameters(self) -> dict[str, tuple[int, str]]:
        named = self._model.named_parameters(remove_duplicate=False) if isinstance(self._model, nn.Module) else ()
        return {name: (id(p), f"{p.dtype} on {p.device} of shape {tuple(p.shape)}") for name, p in named}

    def _hook_counts(self) -> dict[str, int]:
        modules = self._model.named_modules() if isinstance(self._model, nn.Module) else ()
        return {name: sum(len(getattr(module, kind, ())) for kind in _HOOKS) for name, module in modules}

    def _value_marks(self) -> list[tuple[int, int]]:
        parameters = self._model.parameters() if isinstance(self._model, nn.Module) else ()
        # torch counts how often a tensor was changed in place, but for those that were made in inference mode.
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters if not p.is_meta]


@contextlib.contextmanager
def until(deadline: float | None) -> Iterator[None]:
    """Raise TimeIsUp within the context when `time.monotonic()` reaches the deadline.

    This needs the main thread and a signal, SIGALRM, with a timer, ITIMER_REAL, that nobody else uses; else the context
    ends when it is done, and so it does if a function within sets that timer. Code that is not Python's is broken off
    when it returns. A context that catches TimeIsUp, and ends or raises another error, raises TimeIsUp at its end.
    """
    if deadline is None or not _can_break_off():
        yield
        return

    is_up = False

    def stop(*_: object) -> None:
        nonlocal is_up
        is_up = True
        raise TimeIsUp

    try:
        try:
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, min(max(deadline - time.monotonic(), 1e-6), _LONGEST))
            yield
        finally:
            # The time may end here too, before the alarm is off.
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
            finally:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
    except Exception as error:
        if is_up:
            raise TimeIsUp from error
        raise
    if is_up:
        raise TimeIsUp


def _can_break_off() -> bool:
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer"):
        return False
    is_set = signal.getitimer(signal.ITIMER_REAL)[0] > 0  # by who started this process, which the alarm is to end
    return signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and not is_set
