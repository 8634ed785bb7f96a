"""Python runs this file at its start where PYTHONPATH names this folder: RESM_NATIVE_FILE replaces the extension.

The tests and the processes that they start then run that build of resm_kernels._native, and the installation stays as
it is.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec

NAME = "resm_kernels._native"


class Replacement:
    """A finder of one module."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, os.environ["RESM_NATIVE_FILE"]) if name == NAME else None


sys.meta_path.insert(0, Replacement)
