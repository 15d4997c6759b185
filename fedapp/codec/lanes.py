"""Compiled code that works on a few dozen numbers at once, where compilers do not see by themselves how."""

from collections.abc import Callable, Iterable
from typing import Any, cast

from llvmlite import ir
from numba.core import types
from numba.core.errors import TypingError
from numba.cpython.unsafe import numbers
from numba.extending import intrinsic


def _select(typing: Any, condition: Any, this: Any, that: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return this(types.boolean, this, this), generate


select = cast(Callable[[Any, Any, Any], Any], intrinsic(_select))
"""select(condition, this, that): both are at hand, and nothing jumps."""


trailing_zeros = cast(Callable[[Any], Any], numbers.trailing_zeros)
"""How many bits of an integer, which is not 0, are 0 below its lowest 1."""


def permutation(order: Iterable[int]) -> Callable[[Any, int, int], None]:
    """What copies numbers of a float32 array (n,), contiguous, from a place on to another, in this order.

    Compiled, permute(x, to, of) does x[to + i] = x[of + order[i]]. It does not look whether x is that long.
    """
    places = [int(place) for place in order]

    def permute(typing: Any, x: Any, to: Any, of: Any) -> Any:
        if x != types.Array(types.float32, 1, "C"):
            raise TypingError(f"not a contiguous array of float32: {x}")
        vector = ir.VectorType(ir.FloatType(), len(places))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            data = context.make_array(x)(context, builder, arguments[0]).data
            target, source = (
                builder.bitcast(builder.gep(data, [at]), vector.as_pointer()) for at in arguments[1:]
            )
            values = builder.load(source, align=4)
            nothing = ir.Constant(vector, ir.Undefined)
            builder.store(builder.shuffle_vector(values, nothing, mask), target, align=4)
            return context.get_dummy_value()

        return types.void(x, types.int64, types.int64), generate

    return cast(Callable[[Any, int, int], None], intrinsic(permute))
