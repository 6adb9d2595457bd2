"""What a block keeps for backward: counted by saved-tensor hooks, and by the memory that goes when the graph goes."""

import ctypes
import gc

import pytest
import torch

import convnext_kernels as ck


def formula(dtype, c, h, w, drop_path):
    """Bytes an input element: x and z in the compute dtype, mean and rstd, the drop-path vector."""
    return 2 * dtype.itemsize + 8 / c + (4 / (h * w * c) if drop_path else 0)


def saved_bytes(block, x, autocast):
    """Bytes of the storages that autograd keeps, the parameters' left out."""
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=autocast):
        y = block(x)
    return sum(storages.values()), y


MODES = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "autocast": (torch.bfloat16, True)}


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("c", [40, 96, 384])
def test_saved_bytes_by_hooks(c, mode, use_grn):
    dtype, autocast = MODES[mode]
    block = ck.FusedConvNeXtBlock(c, 0.2, use_grn=use_grn).to(torch.float32 if autocast else dtype)
    x = torch.randn(4, c, 14, 14, dtype=torch.float32 if autocast else dtype, requires_grad=True)
    x = (x * 1).contiguous(memory_format=torch.channels_last)  # an activation, not a leaf
    got, _ = saved_bytes(block, x, autocast)
    assert got / x.numel() == pytest.approx(formula(dtype, c, 14, 14, True), rel=1e-9)


def test_eager_keeps_six_times_as_much():
    """The comparison the design is made for; 24 bytes and more is what eager keeps under CPU autocast."""
    x = torch.randn(4, 96, 14, 14, requires_grad=True).contiguous(memory_format=torch.channels_last) * 1
    ours, _ = saved_bytes(ck.FusedConvNeXtBlock(96), x, True)
    theirs, _ = saved_bytes(ck.ReferenceConvNeXtBlock(96), x, True)
    assert theirs / ours > 5.5
    theirs, _ = saved_bytes(ck.ReferenceConvNeXtBlock(96, use_grn=True), x, True)
    ours, _ = saved_bytes(ck.FusedConvNeXtBlock(96, use_grn=True), x, True)
    assert theirs / ours > 9


class Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2`` (malloc.h)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated_bytes():
    """Bytes that this process has from malloc: not the resident ones, as malloc may keep what is freed."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd  # in the heaps, and in mappings of their own


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(("mode", "c"), [("fp32", 96), ("autocast", 40), ("autocast", 96), ("autocast", 384)])
def test_saved_bytes_by_freed_memory(mode, c, use_grn):
    """Tensors stashed on the context escape the hooks; memory does not."""
    dtype, autocast = MODES[mode]
    block = ck.FusedConvNeXtBlock(c, use_grn=use_grn)
    pixels = 64 * 1000 * 96 // c
    x = torch.randn(1, c, 64, pixels // 64, requires_grad=True).contiguous(memory_format=torch.channels_last) * 1

    def forward():
        with torch.autocast("cpu", enabled=autocast):
            return block(x)

    forward()  # libraries allocate their own buffers on a first call
    y = forward()
    before = allocated_bytes()
    del y
    freed = before - allocated_bytes()
    # y itself, and what was kept. In fp32 x is kept by reference: it is alive anyway.
    kept = formula(dtype, c, 1, pixels, False) - (0 if autocast else dtype.itemsize)
    assert freed / x.numel() == pytest.approx(4 + kept, rel=0.05)


def test_kept_hidden_is_counted():
    x = torch.randn(2, 96, 14, 14, requires_grad=True).contiguous(memory_format=torch.channels_last) * 1
    recomputed, _ = saved_bytes(ck.FusedConvNeXtBlock(96), x, True)
    kept, _ = saved_bytes(ck.FusedConvNeXtBlock(96, recompute=False), x, True)
    assert (kept - recomputed) / x.numel() == 8
