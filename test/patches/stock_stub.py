"""Lets stock SGLang be imported on a machine without a GPU: `triton` and `sgl_kernel` become empty shells.

Run inside the scratch environment only. What really uses triton (torch, transformers) is imported first, so that it
sees the truth.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from unittest.mock import MagicMock

SHELLS = {"triton", "sgl_kernel"}


class Shell(types.ModuleType):
    """A module in which every name exists."""

    __path__: list[str] = []
    __version__ = "3.5.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[:1].isupper():
            value = type(name, (), {"__init__": lambda self, *args, **kwargs: None})
        else:
            value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class ShellFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of `SHELLS`, and everything below."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in SHELLS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Shell(spec.name)

    def exec_module(self, module):
        pass


class _NoDriver:
    @property
    def active(self):
        raise RuntimeError("no triton driver")


def install():
    """Make `import sglang.srt.managers.tokenizer_manager` work from here on."""
    import torch

    # torchvision's own operators are in a library that needs CUDA; their schemas are enough for the import.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    install.library = library
    import torchvision  # noqa: F401
    import transformers.image_utils
    import transformers.processing_utils  # noqa: F401
    import xgrammar  # noqa: F401

    # Each release was written for one transformers; a model type that another one has as well is no reason to stop.
    from transformers.models.auto import configuration_auto

    register = configuration_auto.CONFIG_MAPPING.register
    configuration_auto.CONFIG_MAPPING.register = lambda key, value, exist_ok=False: register(key, value, exist_ok=True)

    sys.meta_path.insert(0, ShellFinder())
    import triton
    import triton.runtime

    triton.runtime.driver = _NoDriver()


class OnDemand(importlib.abc.MetaPathFinder):
    """Calls `install` at the first import of sglang's server."""

    def find_spec(self, name, path=None, target=None):
        if name == "sglang.srt":
            sys.meta_path.remove(self)
            install()


def on_demand():
    """For a process that may or may not come to import sglang."""
    sys.meta_path.insert(0, OnDemand())
