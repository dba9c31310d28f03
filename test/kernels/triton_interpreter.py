"""The Triton kernels of sgl_kernel on a CPU, by Triton's interpreter with its bfloat16 repaired.

Triton decides when a kernel is defined whether it is to be interpreted. So `interpreted` imports the kernels a second
time, under TRITON_INTERPRET, for itself alone: other tests of the process keep the compiled ones and Triton as it is.

The interpreter holds a bfloat16 as the 16 bits that it is and calculates with those: a product of two is nonsense, and
a float32 is cut off instead of rounded (seen in Triton 3.5 to 3.9).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest

PACKAGE = "sgl_kernel.triton_ops"


@pytest.fixture
def interpreted() -> Iterator[ModuleType]:
    """sgl_kernel.triton_ops for tensors on the CPU."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        interpret_library(patch)
        repair(patch)
        yield _interpreted_package()


@cache
def _interpreted_package() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch, without(PACKAGE):
        patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module(PACKAGE)


@contextmanager
def without(package: str) -> Iterator[None]:
    """Import `package` anew inside; outside there is no trace of that."""
    parent, name = package.rsplit(".", 1)
    container = importlib.import_module(parent)
    missing = object()
    attribute = getattr(container, name, missing)
    hidden = _pop_modules(package)
    try:
        yield
    finally:
        _pop_modules(package)
        sys.modules.update(hidden)
        if attribute is not missing:
            setattr(container, name, attribute)
        elif hasattr(container, name):
            delattr(container, name)


def _pop_modules(package: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == package or name.startswith(package + ".")]
    return {name: sys.modules.pop(name) for name in names}


def interpret_library(patch: pytest.MonkeyPatch) -> None:
    """Interpret Triton's own device functions (zeros, sum, ...) too, where they were imported to be compiled."""
    import triton.language as tl
    from triton.language import standard
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    with suppress(ImportError):  # Triton imports it at some time of its own, and it wants those functions as they are
        importlib.import_module("triton.experimental.gluon")

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        finally:
            scope.restore()  # Triton leaves this out for functions that kernels call: nothing would compile any more

    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
    ours: dict[int, Any] = {}
    for module in (standard, tl):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                patch.setattr(module, name, ours.setdefault(id(value), interpreter.InterpretedFunction(value.fn)))


def repair(patch: pytest.MonkeyPatch) -> None:
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, binary = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == tl.bfloat16 and after == tl.float32:
            return TensorHandle(_widen(source.data), after)
        if before == tl.float32 and after == tl.bfloat16:
            return TensorHandle(_round(source.data), after)
        if before == tl.bfloat16 and after != tl.bfloat16:
            raise NotImplementedError(f"the interpreter cannot turn bfloat16 into {after}; go by float32")
        return cast(self, source, target)

    def binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
            raise NotImplementedError("the interpreter cannot calculate with bfloat16; go by float32")
        return binary(self, left, right, operation)

    def create_dot(self: Any, a: Any, b: Any, sums: Any, *_: Any) -> Any:
        # Products of 16-bit floats are exact in float64, and so are their sums but for extreme ranges: what a row gets
        # does not depend on how BLAS cuts a product up.
        left, right = ((_widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data) for x in (a, b))
        total = np.matmul(left.astype(np.float64), right.astype(np.float64)) + sums.data
        return TensorHandle(total.astype(sums.data.dtype), sums.dtype.scalar)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        make_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    # Not about bfloat16: the bounds of loops, as Triton 3.6 reads them, are more than numpy 2.5 lets pass.
    make_tensor = interpreter._patch_lang_tensor
    patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    patch.setattr(InterpreterBuilder, "binary_op", binary_op)
    patch.setattr(InterpreterBuilder, "create_dot", create_dot)


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
