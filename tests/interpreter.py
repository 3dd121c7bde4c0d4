"""Makes Triton's interpreter fit for a test suite."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_to_bfloat16() -> None:
    """Let a cast from float32 to bfloat16 round to nearest even, as devices do, where the interpreter truncates."""
    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return original(self, source, target)
        bits = source.data.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16)
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = cast


def fuse_multiply_add() -> None:
    """Let ``tl.fma`` round once, as devices do, where the interpreter rounds the product as well."""

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # The product of two float32 numbers is exact in float64.
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma


def patch_once() -> None:
    """Let the nested functions of a kernel find the language patched, where they would patch it again: half the time.

    A kernel replaces the builtins of the language before its first operation and restores them after its last.
    Also, NumPy warns of infinities and NaN, which a device does not.
    """
    np.seterr(invalid="ignore", over="ignore", divide="ignore")
    original = interpreter._patch_lang
    languages: dict[int, list[ModuleType]] = {}  # by identity of a module's globals

    def patch_lang(function: Any) -> Any:
        names = function.__globals__
        if id(names) not in languages:
            languages[id(names)] = [lang for lang in (tl, tl.core) if any(lang is value for value in names.values())]
        if any(tl.core.is_builtin(lang.load) for lang in languages[id(names)]):
            return original(function)
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = patch_lang
