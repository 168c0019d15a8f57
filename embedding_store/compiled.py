"""What the compiled inner loops (`probing`, `rowwise`, `online_model.kernels`) share.

Compiled by numba when they are first imported (about 2 s) and kept beside their files or, where those are read-only,
in the user's cache; `make setup` does it ahead. Where neither can be written every process compiles for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


def compiled(*signature: types.Type) -> Callable[[Callable], Any]:
    """Compiles for these arguments at once, from the cache where there is one."""

    def compile_(function: Callable) -> Any:
        try:
            return njit(signature, cache=True, error_model="numpy")(function)
        except RuntimeError:  # numba finds no place that it may write to
            return njit(signature, error_model="numpy")(function)

    return compile_


def _prefetch_code(typing: Any, array: types.Type, index: types.Type) -> Any:
    """Asks for the cache line of array[index] of a contiguous array, and does not wait for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        pointer = builder.gep(context.make_array(array)(context, builder, arguments[0]).data, [arguments[1]])
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.bitcast(pointer, byte), word(0), word(3), word(1)])  # a read, kept, data
        return context.get_dummy_value()

    return types.void(array, index), generate


prefetch: Any = intrinsic(_prefetch_code)
