"""Registers the models with timm once timm is imported, so that nobody else waits 2 to 3 s for that import."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRATION = "mambavision.models.timm_models"


def register_with_timm() -> None:
    """At once if timm is imported already, else at the end of its import."""
    if "timm.models" in sys.modules:
        importlib.import_module(REGISTRATION)
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())


class _RegisterAfterImport(MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm.models":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(REGISTRATION)

        spec.loader.exec_module = execute_and_register
        return spec
