"""Which backend runs: chosen at every call, in inference mode, in compiled graphs and by a block's own argument."""

import copy
import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels import backends, native, reference_backend
from test_block import image
from test_operators import raw_samples

ops = torch.ops.convnext_kernels


@pytest.fixture
def seen(monkeypatch):
    """The names of the operators that run in the reference backend, in order."""
    names, running = [], []
    for operator in backends.OPERATORS:
        function = getattr(reference_backend, operator)

        def counted(*arguments, _name=operator, _function=function):
            if not running:  # the reference of the MLP calls that of LayerNorm
                names.append(_name)
            running.append(_name)
            try:
                return _function(*arguments)
            finally:
                running.pop()

        monkeypatch.setattr(reference_backend, operator, counted)
    monkeypatch.setattr(backends, "_decided", {})
    return names


FORWARD = ["depthwise_conv2d", "layer_norm_mlp"]
BACKWARD = ["layer_norm_mlp_backward", "depthwise_conv2d_input_grad", "depthwise_conv2d_weight_grad"]


def samples():
    return {str(operator).split(".")[-1]: (operator, arguments) for operator, arguments in raw_samples_fp32()}


def raw_samples_fp32():
    return raw_samples(torch.float32, requires_grad=False)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", backends.OPERATORS)
def test_a_raw_operator_honours_the_choice_in_every_mode(name, mode, seen):
    operator, arguments = samples()[name]
    with mode():
        ours = operator(*arguments)
        assert not seen
        with ck.use_backend("reference"):
            theirs = operator(*arguments)
        assert seen == [name]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        operator(*arguments)
        assert seen == [name]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_block_honours_the_choice_in_every_mode(mode, seen):
    block, x = ck.FusedConvNeXtBlock(8), image(2, 8, 5, 5)
    with mode(), ck.use_backend("reference"):
        block(x)
    assert seen == FORWARD


def test_the_backward_pass_follows_the_choice_at_its_own_time(seen):
    block, x = ck.FusedConvNeXtBlock(8), image(2, 8, 5, 5).requires_grad_()
    y = block(x)
    with ck.use_backend("reference"):
        y.sum().backward()
    assert seen == BACKWARD


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_is_the_forward_passes_alone(backend):
    block, x = ck.FusedConvNeXtBlock(8, 0, 1.0, backend=backend), image(2, 8, 5, 5).requires_grad_()
    inputs = [x, *block.parameters()]
    expected = torch.autograd.grad(block(x).square().sum(), inputs)
    loss = block(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, inputs)
        y = torch.ops.convnext_kernels.depthwise_conv2d(x.detach(), block.dwconv.weight, None, 1, None)
    assert all(map(torch.equal, got, expected))
    assert y.dtype == torch.float32


def test_a_blocks_own_backend_goes_before_the_context(seen):
    block, x = ck.FusedConvNeXtBlock(8, backend="reference"), image(2, 8, 5, 5).requires_grad_()
    with ck.use_backend("cpu"):
        block(x).sum().backward()
        with torch.inference_mode():
            block(x)
    assert seen == FORWARD + BACKWARD + FORWARD
    seen.clear()
    block.backend = "cpu"
    with ck.use_backend("reference"):
        block(x).sum().backward()
    assert not seen
    block.backend = "auto"
    with ck.use_backend("reference"):
        block(x)
    assert not seen


def test_a_compiled_block_keeps_its_own_backend_and_follows_the_context_otherwise(seen):
    torch._dynamo.reset()
    x = image(2, 8, 5, 5).requires_grad_()
    block = ck.FusedConvNeXtBlock(8)
    compiled = torch.compile(block, fullgraph=True)
    compiled(x).sum().backward()
    assert not seen
    with ck.use_backend("reference"):  # without tracing again
        compiled(x).sum().backward()
    assert seen == FORWARD + BACKWARD
    seen.clear()
    compiled = torch.compile(ck.FusedConvNeXtBlock(8, backend="reference"), fullgraph=True)
    with ck.use_backend("cpu"):
        y = compiled(x)
        y.sum().backward()
        assert seen == FORWARD + BACKWARD
        with torch.inference_mode():
            compiled(x.detach())
    assert seen == FORWARD + BACKWARD + FORWARD


def test_an_exported_block_keeps_its_backend(seen):
    block, x = ck.FusedConvNeXtBlock(8, backend="reference").eval(), image(2, 8, 5, 5)
    program = torch.export.export(block, (x,))
    assert not seen  # tracing runs nothing
    (node,) = [n for n in program.graph.nodes if str(n.target) == "convnext_kernels.convnext_block.default"]
    assert node.args[-1] == "reference"
    program.module()(x)
    assert seen == FORWARD


def test_an_operator_is_one_node_in_a_compiled_graph():
    """Whatever the backend, the compiler sees the operator and not what the reference is made of."""
    graphs = []

    def record(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    x = image(2, 8, 5, 5).requires_grad_()
    compiler = aot_autograd(fw_compiler=record, bw_compiler=record)
    block = ck.FusedConvNeXtBlock(8, backend="reference")
    with ck.use_backend("reference"):
        torch.compile(block, fullgraph=True, backend=compiler)(x).sum().backward()
        torch.compile(ck.bias_gelu, fullgraph=True, backend=compiler)(torch.randn(3, 8))
    names = {name for graph in graphs for name in graph}
    assert {
        f"convnext_kernels.{name}.default" for name in ("convnext_block", "convnext_block_backward", "bias_gelu")
    } < names
    assert not any("convolution" in name or "native_layer_norm" in name or name == "gelu.default" for name in names)


def test_transforms_modes_and_lazy_views_reach_the_operator(seen):
    x, bias = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(torch.func.functionalize(lambda x: ck.bias_gelu(x, bias))(x), ck.bias_gelu(x, bias))
    called = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode(), ck.use_backend("reference"):
        ck.bias_gelu(x, bias)
    assert "convnext_kernels.bias_gelu.default" in called and seen == ["bias_gelu"]
    # A negated view: its memory holds the opposite of its values.
    negated = torch._neg_view(x)
    torch.testing.assert_close(ops.bias_gelu(negated, bias, "none"), ops.bias_gelu(-x, bias, "none"))


def test_state_dict_copies_and_pickles_keep_the_backend():
    block = ck.FusedConvNeXtBlock(8, backend="reference")
    assert "backend" not in " ".join(block.state_dict())
    plain = ck.FusedConvNeXtBlock(8)
    plain.load_state_dict(block.state_dict(), strict=True)
    assert plain.backend is None and "backend" not in repr(plain)
    assert "backend='reference'" in repr(block)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.backend == "reference"
    del block.__dict__["backend"]  # a block pickled before there was the argument
    assert block(image(1, 8, 3, 3)).shape == (1, 8, 3, 3)


def test_fuse_passes_the_backend_on(seen):
    timm = pytest.importorskip("timm")
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=4).eval()
    x = torch.randn(1, 3, 32, 32)
    ck.fuse(model, backend="reference", norms=False)
    model(x)
    assert seen == FORWARD * 4
    other = copy.deepcopy(model)
    seen.clear()
    other(x)
    assert seen == FORWARD * 4
    ck.fuse(model)
    seen.clear()
    model(x)
    assert not seen
    with pytest.raises(
        ValueError, match="fuse: argument 'backend': expected one of auto, cpu, cuda, triton, reference"
    ):
        ck.fuse(model, backend="tpu")


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="FusedConvNeXtBlock: argument 'backend': expected one of"):
        ck.FusedConvNeXtBlock(8, backend="tpu")
    block = ck.FusedConvNeXtBlock(8)
    block.backend = "tpu"
    with pytest.raises(ValueError, match=r"convnext_block: argument 'backend': expected one of .*, got 'tpu'"):
        block(image(1, 8, 3, 3))


def python(code, **environment):
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


def test_the_environment_variable():
    code = "import convnext_kernels.backends as b; print(b.current())"
    assert python(code, CONVNEXT_KERNELS_BACKEND="reference").stdout == "reference\n"
    assert python(code, CONVNEXT_KERNELS_BACKEND="").stdout == "auto\n"
    wrong = python(code, CONVNEXT_KERNELS_BACKEND="tpu").stderr
    assert "CONVNEXT_KERNELS_BACKEND: expected one of auto, cpu, cuda, triton, reference, got 'tpu'" in wrong


# --- refusals


def test_a_forced_backend_that_cannot_run_names_operator_argument_and_reason():
    x = torch.randn(2, 4)
    with ck.use_backend("cuda"), pytest.raises(RuntimeError) as error:
        ck.bias_gelu(x)
    assert str(error.value) == (
        "convnext_kernels::bias_gelu: backend 'cuda' is forced, but the tensors are on 'cpu'; "
        "argument 'x' is torch.float32 of shape (2, 4) on 'cpu'"
    )
    with torch.inference_mode(), ck.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' is forced"):
        ops.bias_gelu(x, None, "none")
    with pytest.raises(RuntimeError, match="depthwise_conv2d: backend 'cuda' is forced"):
        ck.FusedConvNeXtBlock(8, backend="cuda")(image(1, 8, 3, 3))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors_outside_the_interpreter():
    pytest.importorskip("triton")
    with ck.use_backend("triton"), pytest.raises(RuntimeError) as error:
        ck.layer_norm(torch.randn(2, 4))
    assert str(error.value) == (
        "convnext_kernels::layer_norm: backend 'triton' is forced, but Triton kernels need a CUDA tensor, not one on "
        "'cpu' (TRITON_INTERPRET=1 takes CPU tensors); argument 'x' is torch.float32 of shape (2, 4) on 'cpu'"
    )


def test_without_triton_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(backends, "_triton_kernels", lambda: "Triton cannot be imported (No module named 'triton')")
    backends.triton_reason.cache_clear()
    try:
        with ck.use_backend("triton"), pytest.raises(RuntimeError, match="Triton cannot be imported"):
            ck.layer_norm(torch.randn(2, 4))
        assert ck.bias_gelu(torch.randn(2, 4)).shape == (2, 4)
    finally:
        backends.triton_reason.cache_clear()


def test_the_package_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, convnext_kernels as ck\n"
        "print(ck.FusedConvNeXtBlock(8)(torch.randn(1, 8, 3, 3)).shape)\n"
    )
    assert python(code).stdout == "torch.Size([1, 8, 3, 3])\n"


# --- what auto prefers; the choice needs no tensors, so a GPU is imagined


class Gpu:
    """A machine with a GPU, as far as choosing goes."""

    def __init__(self, monkeypatch):
        self.capability, self.cuda, self.triton_operators = (9, 0), set(backends.OPERATORS), set(backends.OPERATORS)
        self.refused, self.architectures = {}, ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120+PTX")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        self.driver = (13, 0)
        build = {"cuda_version": "13.0"}
        monkeypatch.setattr(native, "build_info", lambda: {**build, "cuda_architectures": self.architectures})
        monkeypatch.setattr(native, "cuda_driver_version", lambda: self.driver)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: self.capability)
        monkeypatch.setattr(backends, "_has_kernel", lambda operator, device_type: operator in self.cuda)
        monkeypatch.setattr(backends, "_triton_kernels", lambda: self)
        self.launch = self

    @property
    def OPERATORS(self):
        return self.triton_operators

    def why_not_device(self, device):
        return None

    def why_not(self, operator, *arguments):
        return self.refused.get(operator)

    def __call__(self, operator, *arguments, forced="auto"):
        forget()
        return backends._choose(operator, forced, torch.device("cuda", 0), arguments)


def forget():
    backends.triton_reason.cache_clear()
    backends.cuda_reason.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    yield Gpu(monkeypatch)
    forget()


MLP = ("layer_norm_mlp", "layer_norm_mlp_backward")


def test_auto_prefers_triton_for_the_mlp_and_compiled_kernels_for_the_rest(gpu):
    for operator in backends.OPERATORS:
        expected = "triton" if operator in MLP else "cuda"
        assert gpu(operator).backend == expected, operator
        assert gpu(operator).reason == ("Triton kernel" if operator in MLP else "compiled kernel")


def test_auto_without_the_cuda_library_takes_triton(gpu):
    gpu.cuda = set()
    assert all(gpu(operator).backend == "triton" for operator in backends.OPERATORS)
    gpu.triton_operators = set()
    assert all(gpu(operator).backend == "reference" for operator in backends.OPERATORS)
    assert "there is no Triton kernel for bias_gelu" in gpu("bias_gelu").reason


def test_fp16_products_with_fp16_sums(gpu, monkeypatch):
    """PyTorch's setting takes from the CUDA library's backward the products that it needs, in fp16 alone."""
    monkeypatch.setattr(torch._C, "_get_cublas_allow_fp16_accumulation", lambda: True)
    gpu.triton_operators = set()
    for dtype, expected in ((torch.float16, "reference"), (torch.bfloat16, "cuda")):
        grad, z = torch.zeros(2, 8), torch.zeros(2, 8, dtype=dtype)
        assert gpu("layer_norm_mlp_backward", grad, z).backend == expected
        assert gpu("layer_norm_mlp", z, None).backend == "cuda"
    with pytest.raises(RuntimeError, match="'cuda' is forced, but PyTorch has no fp16 products with fp32 res"):
        gpu("layer_norm_mlp_backward", grad, z.half(), forced="cuda")


def test_auto_on_an_old_gpu_is_pytorchs_own(gpu):
    gpu.capability = (7, 5)
    compiled = "the CUDA library was compiled for sm_80, sm_86, sm_89, sm_90, sm_100, sm_120+PTX, and this GPU is sm_75"
    triton = "Triton kernels need compute capability 8.0, and this GPU has 7.5"
    for operator in backends.OPERATORS:
        reasons = (triton, compiled) if operator in MLP else (compiled, triton)
        assert gpu(operator) == (operator, "reference", "; ".join(reasons))
    with pytest.raises(RuntimeError, match=r"'triton' is forced, but Triton kernels need compute capability 8\.0"):
        gpu("layer_norm_mlp", forced="triton")
    with pytest.raises(RuntimeError, match=r"'cuda' is forced, but the CUDA library was compiled for sm_80"):
        gpu("layer_norm", forced="cuda")


def test_auto_leaves_out_a_cuda_library_that_was_compiled_for_other_gpus(gpu):
    gpu.architectures = ("sm_90",)
    assert gpu("layer_norm").backend == "cuda"
    gpu.capability = (8, 0)
    assert gpu("layer_norm").backend == "triton"
    assert gpu("layer_norm").reason == "the CUDA library was compiled for sm_90, and this GPU is sm_80"


def test_auto_leaves_out_a_cuda_library_that_is_too_new_for_the_driver(gpu):
    for driver in ((13, 0), (13, 2), (14, 0), None):
        gpu.driver = driver
        assert gpu("layer_norm").backend == "cuda"
    gpu.driver = (12, 8)
    reason = "the CUDA library was compiled with CUDA 13.0, and the driver is for 12.8"
    assert gpu("layer_norm") == ("layer_norm", "triton", reason)
    with pytest.raises(RuntimeError, match="'cuda' is forced, but " + reason):
        gpu("layer_norm", forced="cuda")


@pytest.mark.parametrize(
    ("architectures", "runs", "fails"),
    [
        (["sm_80"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (8, 7), (9, 0), (12, 0)]),
        (["sm_86", "sm_90"], [(8, 6), (8, 9), (9, 0)], [(8, 0), (10, 0)]),
        (["sm_87"], [(8, 7)], [(8, 6), (8, 9)]),
        (["sm_80+PTX"], [(8, 0), (8, 7), (9, 0), (12, 1)], [(7, 5)]),
        (["sm_90a"], [(9, 0)], [(10, 0)]),
        (["sm_90a+PTX"], [(9, 0)], [(10, 0)]),
        (["sm_100f+PTX"], [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        (["sm_100", "sm_120+PTX"], [(10, 3), (12, 0), (12, 1)], [(9, 0), (11, 0)]),
        ([], [], [(9, 0)]),
    ],
)
def test_which_gpus_run_what_was_compiled(architectures, runs, fails):
    for capability in runs:
        assert native.has_code_for(architectures, capability), capability
    for capability in fails:
        assert not native.has_code_for(architectures, capability), capability


def test_arguments_that_triton_refuses_go_to_the_next(gpu):
    gpu.refused = {"layer_norm_mlp": "C = 100 is no multiple of 8"}
    z = torch.empty(2, 100)
    assert gpu("layer_norm_mlp", z) == ("layer_norm_mlp", "cuda", "C = 100 is no multiple of 8")
    gpu.cuda = set()
    choice = gpu("layer_norm_mlp", z)
    assert choice.backend == "reference" and choice.reason.startswith("C = 100 is no multiple of 8; ")
    message = (
        r"layer_norm_mlp: backend 'triton' is forced, but C = 100 .*; argument 'z' is torch.float32 of shape \(2, 100\)"
    )
    with pytest.raises(RuntimeError, match=message):
        gpu("layer_norm_mlp", z, forced="triton")


def test_a_fallback_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_has_kernel", lambda operator, device_type: False)
    monkeypatch.setattr(backends, "_decided", {})
    backends._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger="convnext_kernels"):
        for dtype in (torch.float32, torch.float64, torch.float32):
            ck.bias_gelu(torch.randn(2, 4, dtype=dtype))
    assert [record.getMessage() for record in caplog.records] == [
        "convnext_kernels::bias_gelu runs on 'cpu' through PyTorch's own kernels: the CPU library has no kernel for "
        "bias_gelu"
    ]
    backends._log_fallback.cache_clear()
