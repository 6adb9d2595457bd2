"""From the operators through Triton's own just-in-time compiler and launcher down to the driver's calls, without a GPU.

tests/test_triton_launches.py builds libcuda.cpp and runs this file in a process where that is the CUDA driver. CPU
tensors stand for a GPU's. Nothing is executed: what is checked is that every launch is accepted, is what the compile
gates compile (triton_kernels/offline.py), goes to the current stream, and is compiled once for all batch sizes.
"""

import ctypes
import os

import pytest
import torch
import triton
from triton.backends.nvidia.driver import CudaDriver

import convnext_kernels as ck
from convnext_kernels import native, triton_kernels
from convnext_kernels.cli import tune
from convnext_kernels.triton_kernels import config, launch, offline

# Before Triton looks for a driver; by its name the loader finds it again.
STUB = ctypes.CDLL(os.environ["CUDA_STUB"], mode=ctypes.RTLD_GLOBAL)
CAPABILITY = int(os.environ.get("CUDA_STUB_CAPABILITY", "90"))
CHIP = launch.chip_of_architecture(CAPABILITY)
RUN, CHIP_OF, WHY_NOT_DEVICE = launch.run, launch.chip_of, launch.why_not_device
STREAM = 0x5EAF00


class Record(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("parameters", ctypes.c_void_p),
        ("parameter_bytes", ctypes.c_uint64),
    ]


STUB.stub_launch.restype = ctypes.POINTER(Record)


def last_launch():
    """All that the driver saw of it: the compiled form, how it was launched, the bytes of every parameter."""
    record = STUB.stub_launch(STUB.stub_launches() - 1)[0]
    parameters = ctypes.string_at(record.parameters, record.parameter_bytes)
    return record.function, tuple(record.grid), record.threads, record.shared, record.stream, parameters


def install_driver():
    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.set_current_device = lambda device: None
    driver.get_device_capability = lambda device=0: divmod(CAPABILITY, 10)
    driver.get_current_stream = lambda device: STREAM
    triton.runtime.driver.set_active(driver)


@pytest.fixture(autouse=True)
def on_the_chip(monkeypatch):
    """CPU tensors count as the chip's; every launch is compared with what the compile gates would compile of it."""
    if triton.runtime.driver._active is None:
        install_driver()
    monkeypatch.setattr(launch, "why_not_device", lambda device: None)
    monkeypatch.setattr(launch, "chip_of", lambda tensor: CHIP)
    monkeypatch.setattr(config, "chip_of", lambda device: CAPABILITY)
    config.forget()

    def run(kernel, grid, *arguments, **constants):
        """Twice: as Triton launches it, and by the shorter way that launch.run takes from the second time on."""
        if 0 in grid:
            return
        compiled = kernel[grid](*arguments, **constants, **launch.OPTIONS)
        expected = offline.specialised(launch.Launch(kernel, grid, arguments, constants), CAPABILITY)
        source = compiled.src
        assert (dict(source.signature), dict(source.constants), dict(source.attrs)) == expected[:3], kernel.__name__
        by_triton = last_launch()
        for _ in range(2):
            launch._launch(kernel, grid, arguments, constants)
            assert last_launch() == by_triton, kernel.__name__

    monkeypatch.setattr(launch, "run", run)


class Watch:
    """What the driver has seen since."""

    def __init__(self):
        self.launches, self.modules, self.maps = STUB.stub_launches(), STUB.stub_modules(), STUB.stub_tensor_maps()

    def records(self):
        return [STUB.stub_launch(i)[0] for i in range(self.launches, STUB.stub_launches())]

    def names(self):
        return {record.name.decode() for record in self.records()}

    def new_modules(self):
        return STUB.stub_modules() - self.modules

    def new_maps(self):
        return STUB.stub_tensor_maps() - self.maps


# (channels, mode, options of the block): both forms of the forward pass, GRN, kept and recomputed hidden tensors.
BLOCKS = {
    "fused-autocast": (96, "autocast", {"drop_path": 0.2}),
    "fused-pure-v2": (48, "pure", {"use_grn": True, "drop_path": 0.2}),
    "fused-whole-kept": (40, "pure", {"recompute": False}),
    "two-kernels": (384, "pure", {"drop_path": 0.2}),
    "two-kernels-v2": (384, "autocast", {"use_grn": True}),
}
# Those of a block's step; which others run depends on the form.
ALWAYS = {"_convolution_kernel", "_weight_gradient_kernel", "weight_gradient_kernel", "parameter_gradients_kernel"}


def step(block, samples, mode):
    """Forward and backward of a block on images of 7 x 7; the results hold whatever was in memory."""
    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    channels = block.norm.weight.numel()
    x = torch.zeros(samples, channels, 7, 7, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        y = block(x)
    return y, torch.autograd.grad(y, [x, *block.parameters()], torch.zeros_like(y))


def block_of(case):
    channels, mode, options = BLOCKS[case]
    block = ck.FusedConvNeXtBlock(channels, backend="triton", **options)
    return block.to(torch.float32 if mode == "autocast" else torch.bfloat16), mode


@pytest.mark.parametrize("case", BLOCKS)
def test_a_training_step(case):
    block, mode = block_of(case)
    watch = Watch()
    y, gradients = step(block, 2, mode)
    assert y.shape == (2, BLOCKS[case][0], 7, 7)
    assert [g.dtype for g in gradients[1:]] == [p.dtype for p in block.parameters()]
    form = {"fc1_kernel", "fc2_kernel"} if case.startswith("two") else {"fused_kernel"}
    whole_rows = case.startswith("fused") and not case.endswith("v2")
    form |= {"row_gradients_kernel"} if whole_rows else {"hidden_gradients_kernel"}
    assert watch.names() >= ALWAYS | form
    assert {record.stream for record in watch.records()} == {STREAM}
    # On chips with TMA the two kernels' operands are tensor maps: an operand each of both, for every launch.
    products = sum(record.name in (b"fc1_kernel", b"fc2_kernel") for record in watch.records())
    assert watch.new_maps() == (2 * products if CHIP.tma else 0)


@pytest.mark.parametrize("case", ["fused-pure-v2", "two-kernels-v2"])
def test_no_new_code_for_another_batch(case):
    block, mode = block_of(case)
    for samples in (2, 24):  # few rows make one part of a weight's gradient, many make several to be added
        step(block, samples, mode)
    watch = Watch()
    for samples in (1, 3, 16, 17):
        step(block, samples, mode)
    assert watch.launches < STUB.stub_launches()
    assert watch.new_modules() == 0


@pytest.mark.parametrize("offset", [0, 1])
def test_tensors_at_any_address(offset):
    """Slices of something larger, dense but not aligned: other code for the vector loads, copies for the TMA."""

    def tensor(*shape):
        memory = torch.zeros(torch.Size(shape).numel() + 8 + offset, dtype=torch.bfloat16)
        first = -memory.data_ptr() % 16 // 2 + offset  # the allocator of a CPU promises less than that of a GPU
        return memory[first : first + torch.Size(shape).numel()].view(shape)

    c, k = 384, 1536
    vectors = [tensor(c), tensor(c), tensor(k, c), tensor(k), None, None, tensor(c, k), tensor(c), tensor(c)]
    arguments = [tensor(2, 7, 7, c), tensor(2, 7, 7, c), *vectors, None, 1e-6, "none", torch.bfloat16, False]
    assert all((t.data_ptr() % 16 != 0) == bool(offset) for t in arguments if isinstance(t, torch.Tensor))
    watch = Watch()
    y, *_ = triton_kernels.implementation("layer_norm_mlp")(*arguments)
    assert y.shape == (2, 7, 7, c) and watch.names() >= {"fc1_kernel", "fc2_kernel"}


def test_subclasses_of_tensors():
    """Each dtype and address has its own code, whatever the class."""

    class Image(torch.Tensor):
        pass

    for dtype in (torch.float32, torch.bfloat16):
        for first in (0, 1):
            x = torch.zeros(2 * 24 + 1, dtype=dtype)[first:][: 2 * 24].view(2, 24).as_subclass(Image)
            y = triton_kernels.implementation("bias_gelu")(x, torch.zeros(24, dtype=dtype), "none")
            assert y.dtype == dtype


def test_single_operators():
    """What a block does not launch: LayerNorm and bias + GELU alone, kernels of other sizes, strides."""
    watch = Watch()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(2, 24, 9, 8, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        with ck.use_backend("triton"):
            rows = x.permute(0, 2, 3, 1)
            results = [
                ck.layer_norm(rows, torch.ones(24, dtype=dtype), torch.zeros(24, dtype=dtype)),
                ck.bias_gelu(rows, torch.zeros(24, dtype=dtype)),
                ck.depthwise_conv2d(x, torch.zeros(24, 1, 5, 5, dtype=dtype), None),
                ck.depthwise_conv2d(x, torch.zeros(24, 1, 7, 7, dtype=dtype), None, stride=2),
            ]
            for result in results:
                torch.autograd.grad(result, x, torch.zeros_like(result), retain_graph=True)
    assert watch.names() >= {"_convolution_kernel", "_gather_kernel"}
    assert len(watch.names()) >= 5 and {record.stream for record in watch.records()} == {STREAM}


@pytest.mark.parametrize("operator", ["layer_norm_mlp_backward", "layer_norm_mlp", "depthwise_conv2d"])
def test_what_tuning_compiles_ahead_is_what_is_launched(operator, tmp_path, monkeypatch):
    """The launches find it in Triton's cache on disk: nothing is added to it."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # not asked by either
    monkeypatch.setattr(tune, "_compiled", set())
    work = next(w for w in tune.workloads([(56, 7)], [2], [torch.bfloat16]) if w.operator == operator)
    with monkeypatch.context() as recording:
        recording.setattr(launch, "run", RUN)
        recording.setattr(launch, "chip_of", CHIP_OF)
        recording.setattr(launch, "why_not_device", WHY_NOT_DEVICE)
        tune._compile_variant(work, [], CHIP)
    ahead = set(tmp_path.rglob("*.cubin"))
    watch = Watch()
    triton_kernels.implementation(operator)(*tune.arguments_of(work, torch.device("cpu")))
    assert watch.new_modules() > 0
    assert set(tmp_path.rglob("*.cubin")) == ahead


def test_the_driver_is_asked_for_its_version():
    assert native.cuda_driver_version() == (13, 0)


def test_a_refused_launch_is_an_error():
    """More shared memory than a block can have: nothing runs instead."""
    arguments = [torch.zeros(2, 7, 7, 384, dtype=torch.bfloat16)] * 2
    c, k = 384, 1536
    shapes = [(c,), (c,), (k, c), (k,), None, None, (c, k), (c,), (c,)]
    arguments += [None if shape is None else torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
    arguments += [None, 1e-6, "none", torch.bfloat16, False]
    chosen = config.Config(
        {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 128, "GROUP": 2, "PROGRAMS": 1, "TMA": 0}, num_stages=4
    )
    refused = pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory")
    with config.override("mlp_form", config.Config({"FUSED": 0})), config.override("mlp_fc1", chosen), refused:
        triton_kernels.implementation("layer_norm_mlp")(*arguments)
