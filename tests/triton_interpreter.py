"""What Triton's interpreter lacks for tests: a GPU's arithmetic, that of bf16 above all, and checks of every access.

By itself it keeps bf16 numbers as uint16, adds and multiplies those bits as integers, and truncates where fp32 becomes
bf16. conftest.py has both around all tests where TRITON_INTERPRET=1 is set.
"""

import contextlib
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


@contextlib.contextmanager
def _replaced(*replacements):
    """For as long: each (owner, name, value) is set."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield


def as_on_a_gpu():
    """The arithmetic of a GPU where the interpreter has another.

    bf16: operations and conversions round to the nearest, products are summed in fp32. An FMA of fp16 or bf16 rounds
    once. tf32: a product does not read the last 13 bits of its factors. 2^x below 2^-126 is 0 (ex2.approx.ftz). And
    under NumPy 2.4 a number can be an index in Triton 3.6 too.
    """
    import ml_dtypes  # not needed where the kernels run on a GPU

    bf16 = np.dtype(ml_dtypes.bfloat16)
    handle, builder, numpy_type = interpreter.TensorHandle, interpreter.InterpreterBuilder, interpreter._get_np_dtype
    convert, fma, exp2 = builder.create_fp_to_fp, builder.create_fma, builder.create_exp2
    dot, patch_tensor = builder.create_dot, interpreter._patch_lang_tensor

    def numpy_type_or_bf16(dtype):
        return bf16 if dtype.scalar == tl.bfloat16 else numpy_type(dtype)

    def constant(self, value):
        return handle(np.array([value], bf16), tl.bfloat16)

    def cast(self, source, dtype):
        return handle(source.data.astype(numpy_type_or_bf16(dtype)), dtype.scalar)

    def convert_rounding(self, source, dtype, rounding):
        if tl.bfloat16 not in (source.dtype.scalar, dtype.scalar):
            return convert(self, source, dtype, rounding)
        assert rounding == interpreter._ir.ROUNDING_MODE.RTNE
        return cast(self, source, dtype)

    def fma_rounding_once(self, x, y, z):
        if z.dtype.scalar.primitive_bitwidth != 16:
            return fma(self, x, y, z)
        x, y, wide = (each.data.astype(np.float32) for each in (x, y, z))  # their product is exact
        return handle((x * y + wide).astype(z.data.dtype), z.dtype.scalar)

    def tf32(factor):
        bits = np.ascontiguousarray(factor.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return handle(bits.view(np.float32), tl.float32)

    def dot_in_tf32(self, a, b, sums, precision, *options):
        if a.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
            a, b = tf32(a), tf32(b)
        return dot(self, a, b, sums, precision, *options)

    def exp2_without_denormals(self, x):
        power = exp2(self, x)
        power.data[np.abs(power.data) < np.finfo(np.float32).tiny] = 0
        return power

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return _replaced(
        (interpreter, "_get_np_dtype", numpy_type_or_bf16),
        (interpreter, "_patch_lang_tensor", patch_tensor_and_index),
        (builder, "get_bf16", constant),
        (builder, "cast_impl", cast),
        (builder, "create_fp_to_fp", convert_rounding),
        (builder, "create_fma", fma_rounding_once),
        (builder, "create_dot", dot_in_tf32),
        (builder, "create_exp2", exp2_without_denormals),
    )


def _tensors(arguments):
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif hasattr(argument, "block_shape"):  # a TensorDescriptor
            yield argument.base


def _extent(tensor):
    """Bytes from a tensor's first element to its last, strides and all."""
    return (1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))) * tensor.element_size()


class _Accesses:
    """Of a launch: where its tensors are, and which of its programs have read and written each of their bytes."""

    NOBODY, SEVERAL = -1, -2

    def __init__(self, tensors):
        ranges = []
        for start, end in sorted((t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors if t.numel()):
            if ranges and start < ranges[-1][1]:
                ranges[-1][1] = max(end, ranges[-1][1])
            else:
                ranges.append([start, end])
        self.starts, self.ends = np.array(ranges, np.int64).reshape(-1, 2).T
        self.offsets = np.cumsum(self.ends - self.starts) - self.ends
        size = int((self.ends - self.starts).sum())
        self.writer, self.reader = (np.full(size, self.NOBODY, np.int32) for _ in range(2))
        self.barrier = np.zeros(size, np.int32)  # the last before it was written
        self.lane = np.zeros(size, np.int32)
        self.barriers = 0

    def bytes_of(self, pointers, mask):
        """A number for the first byte of every access that is not masked, and which lanes' they are."""
        on = np.broadcast_to(mask.data, np.shape(pointers.data)).astype(bool)  # a mask may have become an int32
        addresses = np.asarray(pointers.data)[on].astype(np.int64)
        tensor = np.searchsorted(self.starts, addresses, "right") - 1
        outside = (tensor < 0) | (addresses + pointers.get_element_ty().primitive_bitwidth // 8 > self.ends[tensor])
        if outside.any():
            raise IndexError(f"{outside.sum()} of {outside.size} accesses are outside the tensors of the launch")
        return addresses + self.offsets[tensor], on

    def refuse(self, wrong, what):
        if wrong.any():
            raise RuntimeError(f"a race at {wrong.sum()} of {wrong.size} accesses: {what}")

    def read(self, program, pointers, mask):
        place, _ = self.bytes_of(pointers, mask)
        writer, reader = self.writer[place], self.reader[place]
        self.refuse((writer != self.NOBODY) & (writer != program), "read, and written by another program")
        unordered = (writer == program) & (self.barrier[place] == self.barriers)
        self.refuse(unordered, "written and read by one program, without a barrier between")
        self.reader[place] = np.where((reader == self.NOBODY) | (reader == program), program, self.SEVERAL)

    def written(self, program, pointers, value, mask):
        place, on = self.bytes_of(pointers, mask)
        for of, what in ((self.writer, "written by two programs"), (self.reader, "read by one program, then written")):
            who = of[place]
            self.refuse((who != self.NOBODY) & (who != program), what)
        lanes = np.arange(place.size)
        self.lane[place] = lanes
        bits = np.ascontiguousarray(np.broadcast_to(value.data, on.shape)[on])
        bits = bits.view(f"u{bits.itemsize}")
        self.refuse(bits != bits[self.lane[place]], "two values written to one place at once")
        self.writer[place], self.barrier[place] = program, self.barriers


def accesses_checked():
    """An access outside every tensor of its launch raises, and a race does. By itself the interpreter sees neither.

    A race: two programs of a launch access a place and one of them writes; one program reads what it has written since
    its last barrier, which another of its threads may have done; or it writes two values to one place at once.
    """
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    begin, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    accesses = None

    def begin_launch(self, arguments, keywords):
        nonlocal accesses
        on_host = begin(self, arguments, keywords)
        accesses = _Accesses(_tensors(on_host[0]))
        return on_host

    def program(builder):
        (x, y, z), (columns, rows, _) = builder.grid_idx, builder.grid_dim
        return x + columns * (y + rows * z)

    def checked_load(self, pointers, mask, *others, **options):
        accesses.read(program(self), pointers, mask)
        return load(self, pointers, mask, *others, **options)

    def checked_store(self, pointers, value, mask, *others, **options):
        accesses.written(program(self), pointers, value, mask)
        return store(self, pointers, value, mask, *others, **options)

    def barrier(self):
        accesses.barriers += 1

    return _replaced(
        (executor, "_init_args_hst", begin_launch),
        (builder, "create_masked_load", checked_load),
        (builder, "create_masked_store", checked_store),
        (builder, "create_barrier", barrier),
    )
