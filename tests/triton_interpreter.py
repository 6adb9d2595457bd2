"""What Triton's interpreter lacks for tests: a GPU's arithmetic, that of bf16 above all, and a check of every access.

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
    once. 2^x below 2^-126 is 0 (ex2.approx.ftz). And under NumPy 2.4 a number can be an index in Triton 3.6 too.
    """
    import ml_dtypes  # not needed where the kernels run on a GPU

    bf16 = np.dtype(ml_dtypes.bfloat16)
    handle, builder, numpy_type = interpreter.TensorHandle, interpreter.InterpreterBuilder, interpreter._get_np_dtype
    convert, fma, exp2 = builder.create_fp_to_fp, builder.create_fma, builder.create_exp2
    patch_tensor = interpreter._patch_lang_tensor

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


def bounds_checked():
    """An access outside every tensor of its launch raises. By itself the interpreter reads whatever is there."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    begin, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    starts = ends = np.zeros(0, np.uint64)

    def begin_launch(self, arguments, keywords):
        nonlocal starts, ends
        on_host = begin(self, arguments, keywords)
        ranges = {t.data_ptr(): t.data_ptr() + _extent(t) for t in _tensors(on_host[0]) if t.numel()}
        starts, ends = (np.array(each, np.uint64) for each in zip(*sorted(ranges.items())))
        return on_host

    def check(pointers, mask):
        on = np.broadcast_to(mask.data, np.shape(pointers.data)).astype(bool)  # a mask may have become an int32
        addresses = np.asarray(pointers.data)[on].astype(np.uint64)
        size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        tensor = np.searchsorted(starts, addresses, "right")
        outside = (tensor == 0) | (addresses + size > ends[np.maximum(tensor, 1) - 1])
        if outside.any():
            raise IndexError(f"{outside.sum()} of {outside.size} accesses are outside the tensors of the launch")

    def checked_load(self, pointers, mask, *others, **options):
        check(pointers, mask)
        return load(self, pointers, mask, *others, **options)

    def checked_store(self, pointers, value, mask, *others, **options):
        check(pointers, mask)
        return store(self, pointers, value, mask, *others, **options)

    return _replaced(
        (executor, "_init_args_hst", begin_launch),
        (builder, "create_masked_load", checked_load),
        (builder, "create_masked_store", checked_store),
    )
