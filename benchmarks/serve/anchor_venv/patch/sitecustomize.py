"""Lets NIXL's progress thread sleep between polls, in every process that has this folder on its
PYTHONPATH: the same change that the cluster makes to its own engines (workers/connector.py).

NIXL 1.5.1's Python API sets a delay of 0, and each idle engine then spins one core. Where
engines have a core each, that halves what they compute with.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

DELAY_US = 1000
# What `nixl._api` is an alias of on a machine without CUDA 13.
MODULE = "nixl_cu12._api"


class Loader(importlib.abc.Loader):
    """Loads the module as ever, then replaces the config class that its agents are made with."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._inner.exec_module(module)
        bindings = module.nixlBind

        class Config(bindings.nixlAgentConfig):  # type: ignore[name-defined]
            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, DELAY_US if name == "pthrDelay" else value)

        class Bindings:
            nixlAgentConfig = Config

            def __getattr__(self, name: str) -> Any:
                return getattr(bindings, name)

        module.nixlBind = Bindings()


class Finder(importlib.abc.MetaPathFinder):
    """Wraps the loader of that one module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = Loader(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
