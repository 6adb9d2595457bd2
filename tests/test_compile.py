"""torch.compile, torch.export and ONNX export of blocks and of fused models."""

import pytest
import torch

import convnext_kernels as ck
from numerics import device_type
from test_block import image, pair

on_every_device = pytest.mark.usefixtures("device")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """All these blocks share one code object: without this the compiler's limit of recompilations would be hit."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def gradients(module, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    module(x).float().square().mean().backward()
    return [x.grad, *[p.grad.clone() for p in module.parameters()]]


@on_every_device
@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_fullgraph_training_and_inference(use_grn, autocast):
    _, block = pair(16, use_grn=use_grn)
    compiled = torch.compile(block, fullgraph=True)
    x = image(2, 16, 7, 7)
    with torch.autocast(device_type(), torch.bfloat16, enabled=autocast):
        for got, expected in zip(gradients(compiled, x), gradients(block, x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)


@on_every_device
def test_fullgraph_drop_path():
    _, block = pair(8, drop_path=0.5)
    compiled = torch.compile(block, fullgraph=True)
    y = compiled(image(64, 8, 3, 3)) - image(64, 8, 3, 3)
    assert y.shape == (64, 8, 3, 3)
    x = image(64, 8, 3, 3)
    dropped = (compiled(x) == x).flatten(1).all(1).sum()
    assert 10 < dropped < 54


@on_every_device
def test_dynamic_shapes_compile_once():
    _, block = pair(8)
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for n, h, w in ((2, 7, 7), (3, 9, 8), (5, 14, 14)):
        x = image(n, 8, h, w)
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@on_every_device
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_fused_timm_model_compiles_without_graph_break(mode):
    timm = pytest.importorskip("timm")
    model = ck.fuse(timm.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=10))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 3, 64, 64)
    if mode == "inference":
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    else:
        got, expected = gradients(compiled, x), gradients(model, x)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_export():
    _, block = pair(8, use_grn=True)
    block.eval()
    x = image(2, 8, 7, 7)
    program = torch.export.export(block, (x,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "convnext_kernels.convnext_block.default" in targets
    assert torch.equal(program.module()(x), block(x))


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_onnx_export_has_standard_operators_only(use_grn, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    _, block = pair(8, use_grn=use_grn)
    block.eval()
    x = image(1, 8, 5, 5)
    path = tmp_path / "block.onnx"
    torch.onnx.export(block, (x,), path, dynamo=True)
    model = onnx.load(path)
    assert {opset.domain for opset in model.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
    (y,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.contiguous().numpy()})
    torch.testing.assert_close(torch.from_numpy(y), block(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_fused_model_exports(tmp_path):
    """torch.export keeps our operators; ONNX gets PyTorch's, and the fused model goes on afterwards."""
    timm = pytest.importorskip("timm")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=4).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x).detach()
    ck.fuse(model)
    program = torch.export.export(model, (x,))
    assert "convnext_kernels.convnext_block.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True)
    nodes = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert {"Conv", "MatMul"} & nodes and not any("convnext" in name for name in nodes)
    assert len(ck.fusion_report(model)) and torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
