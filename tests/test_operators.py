"""Registration, derivatives, autocast and errors of the operators, on the CPU and on a GPU."""

import itertools

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels import backends, reference, reference_backend
from numerics import assert_close, device_type

ops = torch.ops.convnext_kernels
pytestmark = pytest.mark.usefixtures("device")


def images(n, c, h, w, dtype=torch.float32, requires_grad=False):
    x = torch.randn(n, c, h, w, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(requires_grad)


def values(*shape, dtype=torch.float32, requires_grad=False, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype).requires_grad_(requires_grad)


def mlp_parameters(c, k, dtype=torch.float32, grn=False, layer_scale=True, requires_grad=False):
    """The operator's parameters from norm_weight to layer_scale, of order 1 so that every gradient matters."""

    def make(*shape, scale=1.0):
        return values(*shape, dtype=dtype, requires_grad=requires_grad, scale=scale)

    return [
        make(c),
        make(c),
        make(k, c, scale=c**-0.5),
        make(k),
        make(k) if grn else None,
        make(k) if grn else None,
        make(c, k, scale=k**-0.5),
        make(c),
        make(c) if layer_scale else None,
    ]


def drop(n, dtype=torch.float32):
    """A drop-path vector with a dropped sample."""
    scale = torch.full((n,), 1.25, dtype=dtype)
    scale[n // 2] = 0
    return scale


# --- opcheck, gradcheck


def raw_samples(dtype, requires_grad):
    """(operator, arguments) for every raw operator."""
    r = {"dtype": dtype, "requires_grad": requires_grad}
    d = {"dtype": dtype}
    x, weight, bias = images(3, 8, 5, 6, **r), values(8, 1, 3, 3, **r), values(8, **r)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    s = drop(3, accumulation)
    yield ops.depthwise_conv2d, (x, weight, bias, 1, None)
    yield ops.depthwise_conv2d, (x, weight, None, 2, s)
    # A cast with a rounding, then one without: of that any two backends give the same to fp64's precision.
    other = {torch.float64: torch.float64, torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype]
    narrow = images(3, 8, 5, 6, dtype=torch.float32 if dtype == torch.float64 else dtype, requires_grad=requires_grad)
    yield ops.depthwise_conv2d_cast, (narrow, weight, bias, other, drop(3, reference_backend.accumulation_dtype(other)))
    yield ops.depthwise_conv2d_cast, (narrow, weight, None, torch.float64, None)
    yield ops.depthwise_conv2d_input_grad, (images(3, 8, 3, 3, **r), weight, None, 2, [0, 1], None)
    yield ops.depthwise_conv2d_input_grad, (images(3, 8, 5, 6, **r), weight, x, 1, [0, 0], s)
    yield ops.depthwise_conv2d_weight_grad, (images(3, 8, 3, 3, **r), x, 3, 2, s)
    rows = values(3, 4, 8, **r)
    yield ops.layer_norm, (rows, values(8, **r), values(8, **r), 1e-6, dtype)
    yield ops.layer_norm, (rows, None, None, 1e-6, accumulation)
    mean, rstd = values(3, 4, dtype=accumulation), values(3, 4, dtype=accumulation).abs()
    yield ops.layer_norm_backward, (values(3, 4, 8, **r), rows, mean, rstd, values(8, **r), True, True, True)
    yield ops.layer_norm_backward, (values(3, 4, 8, **r), rows, mean, rstd, None, True, False, False)
    yield ops.bias_gelu, (rows, values(8, **r), "none")
    yield ops.bias_gelu, (rows, None, "tanh")
    yield ops.bias_gelu_backward, (values(3, 4, 8, **r), rows, values(8, **r), "none")
    yield ops.bias_gelu_backward, (values(3, 4, 8, **r), rows, None, "tanh")
    for grn, keep in itertools.product((False, True), (False, True)):
        parameters = mlp_parameters(8, 16, grn=grn, layer_scale=not grn, **r)
        scale = s if keep else None
        yield ops.layer_norm_mlp, (rows, rows.detach() * 2, *parameters, scale, 1e-6, "none", dtype, keep)
        hidden = values(3, 4, 16, **d) if keep else rows.new_empty((0,))
        arguments = (values(3, 4, 8, **r), rows, mean, rstd, hidden.detach(), *parameters, scale, "none")
        yield ops.layer_norm_mlp_backward, (*arguments, 0b1111001111 if not grn else 0b0111111111)
        block = (weight, bias, *parameters, scale, 1e-6, "tanh")
        yield ops.convnext_block, (x, *block, dtype, dtype, not keep)
        z = images(3, 8, 5, 6, **d)
        statistics = values(3, 5, 6, dtype=accumulation), values(3, 5, 6, dtype=accumulation).abs()
        hidden = values(3, 5, 6, 16, **d) if keep else z.new_empty((0,))
        arguments = (images(3, 8, 5, 6, **r), x, z, *statistics, hidden, weight, *parameters, scale, "tanh", dtype)
        yield ops.convnext_block_backward, (*arguments, 0b111111001111 if not grn else 0b011111111111)


def sample_ids(dtype, requires_grad):
    return [f"{op}".split(".")[-1] + f"-{i}" for i, (op, _) in enumerate(raw_samples(dtype, requires_grad))]


@pytest.mark.parametrize("index", range(len(sample_ids(torch.float32, False))), ids=sample_ids(torch.float32, False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(index, dtype):
    operator, arguments = list(raw_samples(dtype, requires_grad=False))[index]
    torch.library.opcheck(operator.default, arguments)


FORWARD = ["depthwise_conv2d", "depthwise_conv2d_cast", "layer_norm", "bias_gelu", "layer_norm_mlp", "convnext_block"]


@pytest.mark.parametrize("name", FORWARD)
def test_opcheck_with_gradients(name):
    for operator, arguments in raw_samples(torch.float32, requires_grad=True):
        if str(operator).endswith(name):
            torch.library.opcheck(operator.default, arguments)


def every_operator():
    return {str(operator).split(".")[-1] for operator, _ in raw_samples(torch.float32, False)}


def test_samples_cover_every_operator():
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("convnext_kernels::")}
    assert every_operator() == names
    assert set(backends.OPERATORS) | {"convnext_block", "convnext_block_backward"} == names


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_gradcheck_depthwise_conv2d(kernel_size, stride):
    f64 = {"dtype": torch.float64, "requires_grad": True}
    arguments = images(2, 3, 5, 4, **f64), values(3, 1, kernel_size, kernel_size, **f64), values(3, **f64)
    assert torch.autograd.gradcheck(lambda *a: ck.depthwise_conv2d(*a, stride=stride), arguments)


@pytest.mark.parametrize("channels_first", [False, True])
def test_gradcheck_layer_norm(channels_first):
    f64 = {"dtype": torch.float64, "requires_grad": True}
    x = images(2, 5, 2, 3, **f64) if channels_first else values(2, 3, 5, **f64)
    arguments = x, values(5, **f64), values(5, **f64)
    assert torch.autograd.gradcheck(lambda *a: ck.layer_norm(*a, channels_first=channels_first), arguments)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck_bias_gelu(approximate):
    f64 = {"dtype": torch.float64, "requires_grad": True}
    assert torch.autograd.gradcheck(lambda *a: ck.bias_gelu(*a, approximate), (values(3, 7, **f64), values(7, **f64)))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("grn", [False, True])
def test_gradcheck_layer_norm_mlp(grn, recompute):
    f64 = {"dtype": torch.float64, "requires_grad": True}
    parameters = mlp_parameters(3, 6, grn=grn, **f64)
    given = [p for p in parameters if p is not None]
    scale = drop(3, torch.float64)

    def run(z, residual, *given):
        rest = iter(given)
        filled = [None if p is None else next(rest) for p in parameters]
        return ck.layer_norm_mlp(z, residual, *filled, scale, recompute=recompute)

    assert torch.autograd.gradcheck(run, (values(3, 4, 3, **f64), values(3, 4, 3, **f64), *given))


@pytest.mark.parametrize("grn", [False, True])
def test_gradcheck_convnext_block(grn):
    f64 = {"dtype": torch.float64, "requires_grad": True}
    parameters = mlp_parameters(3, 6, grn=grn, **f64)
    given = [p for p in parameters if p is not None]

    def run(x, weight, bias, *given):
        rest = iter(given)
        return ck.convnext_block(x, weight, bias, *[None if p is None else next(rest) for p in parameters])

    arguments = images(2, 3, 3, 4, **f64), values(3, 1, 3, 3, **f64), values(3, **f64), *given
    assert torch.autograd.gradcheck(run, arguments)


# --- raw operators differentiate or raise; double backward raises


def test_raw_operators_differentiate():
    x, weight = images(2, 3, 5, 4, torch.float64, True), values(3, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(reference.depthwise_conv2d(x, weight).square().sum(), (x, weight))
    got = torch.autograd.grad(ops.depthwise_conv2d(x, weight, None, 1, None).square().sum(), (x, weight))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 24, 15, 13, 7), (2, 5, 6, 4, 7), (3, 8, 9, 8, 5), (0, 8, 7, 7, 7)], ids=str)
def test_a_cast_and_a_convolution_are_two_operators_in_one(shape, dtype):
    """The same bits, gradients too, as `to` and then the convolution; the copy of a dropped sample is one as well."""
    n, c, h, w, size = shape
    x, weight, bias = images(n, c, h, w), values(c, 1, size, size), values(c)
    scale = drop(n, reference_backend.accumulation_dtype(dtype)) if n else None
    y, x_copy = ops.depthwise_conv2d_cast(x, weight, bias, dtype, scale)
    assert torch.equal(x_copy, x.to(dtype)) and x_copy.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, ops.depthwise_conv2d(x.to(dtype), weight, bias, 1, scale))
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)

    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    grads = torch.randn_like(y), torch.randn_like(y)
    ours = torch.autograd.grad(ops.depthwise_conv2d_cast(*inputs, dtype, scale), inputs, grads)
    rounded = x.to(dtype)
    theirs = torch.autograd.grad((ops.depthwise_conv2d(rounded, weight, bias, 1, scale), rounded), inputs, grads)
    assert [g.dtype for g in ours] == [torch.float32] * 3
    # Autograd adds the two gradients of the copy in its dtype, we in x's.
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=8 * tolerance)
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])


def test_results_kept_for_the_backward_of_the_block_are_differentiable():
    """x_copy and z of the raw operator: by hand what the two operators before the MLP give."""
    arguments = block_arguments()
    x, weight, bias = (t.requires_grad_() for t in arguments[:3])
    y, x_copy, z, *_ = ops.convnext_block(*arguments, None, 1e-6, "none", torch.bfloat16, torch.float32, True)
    (y.sum() + x_copy.float().sum() + z.float().square().sum()).backward()
    got = [t.grad.clone() for t in (x, weight, bias)]
    for t in (x, weight, bias):
        t.grad = None
    x_copy = x.bfloat16()
    z = ck.depthwise_conv2d(x_copy, weight.bfloat16(), bias.bfloat16())
    y = ops.convnext_block(*arguments, None, 1e-6, "none", torch.bfloat16, torch.float32, True)[0]
    (y.sum() + x_copy.float().sum() + z.float().square().sum()).backward()
    for t, ours in zip((x, weight, bias), got, strict=True):
        torch.testing.assert_close(ours, t.grad, rtol=2e-2, atol=2e-2 * t.grad.abs().max().item())


def test_statistics_are_not_differentiable():
    _, mean, rstd = ops.layer_norm(values(3, 5, requires_grad=True), None, None, 1e-6, torch.float32)
    assert not mean.requires_grad and not rstd.requires_grad


def differentiable_calls():
    x, weight = images(2, 4, 3, 3, requires_grad=True), values(4, 1, 3, 3, requires_grad=True)
    rows = values(2, 3, 4, requires_grad=True)
    parameters = mlp_parameters(4, 8, requires_grad=True)
    # The convolution is linear in x: only the mixed derivative exists.
    yield "depthwise_conv2d", weight, lambda: ck.depthwise_conv2d(x * weight.sum(), weight)
    yield "layer_norm", rows, lambda: ck.layer_norm(rows, parameters[0], parameters[1])
    yield "bias_gelu", rows, lambda: ck.bias_gelu(rows)
    yield "layer_norm_mlp", rows, lambda: ck.layer_norm_mlp(rows, rows, *parameters)
    yield "convnext_block", x, lambda: ck.convnext_block(x, weight, None, *parameters)

    def under_autocast():
        with torch.autocast(device_type(), torch.bfloat16):
            return ck.convnext_block(x, weight, None, *parameters)

    yield "convnext_block under autocast", x, under_autocast


@pytest.mark.parametrize("index", range(6), ids=[name for name, _, _ in differentiable_calls()])
def test_double_backward_raises_in_every_form(index):
    _, x, call = list(differentiable_calls())[index]
    # A loss that is linear in the output: the incoming gradient does not require grad.
    (dx,) = torch.autograd.grad(call().float().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(dx.sum(), x)
    (dx,) = torch.autograd.grad(call().float().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad((dx + x).sum(), x, allow_unused=True)
    (dx,) = torch.autograd.grad(call().float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.square().sum().backward()


@pytest.mark.parametrize("operator", ["layer_norm_mlp", "convnext_block"])
@pytest.mark.parametrize("mixed", [False, True], ids=["bf16", "with an fp32 parameter"])
def test_gradients_are_in_the_parameters_dtypes(operator, mixed, monkeypatch):
    """What is not fp32 is cast in one launch, or, with create_graph, so that a double backward meets its error."""
    casts = []
    foreach_copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *lists: casts.append(len(lists[0])) or foreach_copy(*lists))
    x = images(2, 4, 3, 3, torch.bfloat16, True)
    parameters = mlp_parameters(4, 8, torch.bfloat16, grn=True, requires_grad=True)
    if mixed:
        parameters[0] = values(4, requires_grad=True)
    convolution = [values(4, 1, 3, 3, dtype=torch.bfloat16, requires_grad=True)] if operator == "convnext_block" else []

    def grads(**options):
        with torch.autocast(device_type(), torch.bfloat16, enabled=mixed):
            if convolution:
                y = ck.convnext_block(x, *convolution, None, *parameters)
            else:
                y = ck.layer_norm_mlp(x.permute(0, 2, 3, 1), None, *parameters)
        return torch.autograd.grad(y.float().square().sum(), [*convolution, *parameters], **options)

    at_once = grads()
    assert [g.dtype for g in at_once] == [p.dtype for p in [*convolution, *parameters]]
    if backends.are_plain((x,)):  # not in the rehearsal of the GPU's tests
        assert casts == [len(convolution) + len(parameters) - mixed]
    casts.clear()
    one_by_one = grads(create_graph=True)
    assert casts == []
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(one_by_one[-1].float().sum(), x)


# --- dtypes and autocast


def test_autocast_dtypes_are_eagers():
    block = ck.ReferenceConvNeXtBlock(8)
    fused = ck.FusedConvNeXtBlock(8)
    v2, fused_v2 = ck.ReferenceConvNeXtBlock(8, use_grn=True), ck.FusedConvNeXtBlock(8, use_grn=True)
    for eager, ours in ((block, fused), (v2, fused_v2)):
        for dtype in (torch.float32, torch.bfloat16):
            x, y = images(2, 8, 5, 5, dtype, True), images(2, 8, 5, 5, dtype, True)
            with torch.autocast(device_type(), torch.bfloat16):
                expected, got = eager(x), ours(y)
            assert got.dtype == expected.dtype
            got.float().sum().backward()
            assert y.grad.dtype == dtype
            assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


def test_layer_norm_autocast_dtype_is_eagers():
    weight = torch.ones(8)
    for dtype in (torch.float32, torch.bfloat16):
        x = values(3, 8, dtype=dtype)
        with torch.autocast(device_type(), torch.bfloat16):
            assert ck.layer_norm(x, weight, weight).dtype == reference.layer_norm(x, weight, weight).dtype


def test_depthwise_conv2d_under_autocast():
    x, weight, bias = images(2, 8, 5, 5), values(8, 1, 7, 7, requires_grad=True), values(8, requires_grad=True)
    truth = reference.depthwise_conv2d(x.double(), weight.double(), bias.double())
    with torch.autocast(device_type(), torch.bfloat16):
        theirs, ours = reference.depthwise_conv2d(x, weight, bias), ck.depthwise_conv2d(x, weight, bias)
    assert_close(ours, theirs, truth)
    ours.float().sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


def test_fp64_under_autocast_stays_fp64():
    x = images(2, 8, 5, 5, torch.float64)
    with torch.autocast(device_type(), torch.bfloat16):
        assert ck.depthwise_conv2d(x, values(8, 1, 3, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_layout_in_channels_last_out(layout):
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=layout)
    y = ck.depthwise_conv2d(x, values(6, 1, 3, 3))
    assert y.is_contiguous(memory_format=torch.channels_last)
    strided = torch.randn(2, 12, 10, 4)[:, ::2, ::2]
    weight = values(6, 1, 3, 3)
    torch.testing.assert_close(ck.depthwise_conv2d(strided, weight), reference.depthwise_conv2d(strided, weight))


@pytest.mark.parametrize("name", backends.OPERATORS)
def test_reference_backend_agrees_with_the_compiled_one(name):
    for operator, arguments in raw_samples(torch.float64, requires_grad=False):
        if str(operator).split(".")[-1] != name:
            continue
        with ck.use_backend(device_type()):
            ours = operator(*arguments)
        with ck.use_backend("reference"):
            theirs = operator(*arguments)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


# --- errors: operator, argument, expected, got


def block_arguments(c=4, k=8, dtype=torch.float32):
    return [images(2, c, 5, 5, dtype), values(c, 1, 7, 7, dtype=dtype), values(c, dtype=dtype)] + mlp_parameters(
        c, k, dtype
    )


def replaced(index, value):
    arguments = block_arguments()
    arguments[index] = value
    return arguments


BAD_BLOCKS = {
    "rank": (lambda: replaced(0, torch.randn(4, 5, 5)), ValueError, "'x': expected a tensor of rank 4"),
    "no tensor": (lambda: replaced(0, [1.0]), TypeError, "'x': expected a torch.Tensor, got list"),
    "integers": (lambda: replaced(0, torch.zeros(2, 4, 5, 5, dtype=torch.int64)), TypeError, "'x': expected dtype"),
    "dtype mix": (lambda: replaced(0, images(2, 4, 5, 5, torch.bfloat16)), TypeError, "'conv_weight': expected dtype"),
    "channels": (lambda: replaced(1, values(5, 1, 7, 7)), ValueError, r"'conv_weight': expected shape \(4, 1, 7, 7\)"),
    "even kernel": (lambda: replaced(1, values(4, 1, 6, 6)), ValueError, "'conv_weight': expected a kernel size"),
    "kernel 13": (lambda: replaced(1, values(4, 1, 13, 13)), ValueError, "'conv_weight': expected a kernel size"),
    "not depthwise": (
        lambda: replaced(1, values(4, 4, 7, 7)),
        ValueError,
        r"'conv_weight': expected shape \(4, 1, 7, 7\)",
    ),
    "empty height": (
        lambda: replaced(0, torch.zeros(2, 4, 0, 5)),
        ValueError,
        "'x': expected C, H and W of at least 1",
    ),
    "empty width": (lambda: replaced(0, torch.zeros(2, 4, 5, 0)), ValueError, "'x': expected C, H and W of at least 1"),
    "no channels": (lambda: replaced(0, torch.zeros(2, 0, 5, 5)), ValueError, "'x': expected C, H and W of at least 1"),
    "fc1": (lambda: replaced(5, values(8, 5)), ValueError, r"'fc1_weight': expected shape \(8, 4\)"),
    "fc2": (lambda: replaced(9, values(4, 9)), ValueError, r"'fc2_weight': expected shape \(4, 8\)"),
    "half a GRN": (lambda: replaced(7, values(8)), ValueError, "'grn_bias': expected both"),
    "layer scale": (lambda: replaced(11, values(3)), ValueError, r"'layer_scale': expected shape \(4,\)"),
    "layer scale, a number": (
        lambda: replaced(11, 0.5),
        TypeError,
        "'layer_scale': expected a torch.Tensor, got float",
    ),
    "no fc2": (lambda: replaced(9, None), TypeError, "'fc2_weight': expected a torch.Tensor, got NoneType"),
    "sparse": (lambda: replaced(0, images(2, 4, 5, 5).to_sparse()), TypeError, "'x': expected a dense tensor"),
    "device mix": (
        lambda: replaced(5, torch.zeros(8, 4, device="meta")),
        ValueError,
        "'fc1_weight': expected a tensor on (cpu|cuda)",
    ),
}


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_block_errors(name):
    arguments, error, message = BAD_BLOCKS[name]
    with pytest.raises(error, match="convnext_block: argument " + message):
        ck.convnext_block(*arguments())


def test_other_errors():
    x, weight = images(2, 4, 5, 5), values(4, 1, 7, 7)
    with pytest.raises(ValueError, match="depthwise_conv2d: argument 'stride': expected 1 or 2, got 3"):
        ck.depthwise_conv2d(x, weight, stride=3)
    with pytest.raises(TypeError, match="depthwise_conv2d: argument 'bias': expected dtype"):
        ck.depthwise_conv2d(x, weight, values(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="layer_norm: argument 'eps': expected a number of at least 0, got -1"):
        ck.layer_norm(torch.randn(2, 4), eps=-1.0)
    with pytest.raises(ValueError, match="layer_norm: argument 'eps'"):
        ck.layer_norm(torch.randn(2, 4), eps=float("nan"))
    with pytest.raises(ValueError, match="layer_norm: argument 'x': expected at least one channel"):
        ck.layer_norm(torch.randn(2, 0))
    with pytest.raises(ValueError, match="convnext_block: argument 'eps'"):
        ck.convnext_block(*block_arguments(), eps=-1e-6)
    with pytest.raises(ValueError, match="convnext_block: argument 'approximate': expected 'none' or 'tanh'"):
        ck.convnext_block(*block_arguments(), approximate="sigmoid")
    with pytest.raises(ValueError, match="bias_gelu: argument 'approximate'"):
        ck.bias_gelu(torch.randn(2, 4), approximate="exact")
    with pytest.raises(ValueError, match=r"convnext_block: argument 'sample_scale': expected shape \(2,\)"):
        ck.convnext_block(*block_arguments(), torch.ones(3))
    with pytest.raises(ValueError, match=r"layer_norm_mlp: argument 'residual': expected shape \(2, 4\)"):
        ck.layer_norm_mlp(torch.randn(2, 4), torch.randn(2, 3), *mlp_parameters(4, 8))


def test_arguments_of_a_wrong_type():
    x, z = images(2, 4, 5, 5), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"depthwise_conv2d: argument 'stride': expected 1 or 2, got 1.0"):
        ck.depthwise_conv2d(x, values(4, 1, 7, 7), stride=1.0)
    with pytest.raises(TypeError, match=r"layer_norm: argument 'eps': expected a number, got NoneType"):
        ck.layer_norm(z, eps=None)
    with pytest.raises(TypeError, match=r"layer_norm: argument 'out_dtype': expected float32, .* got torch.int32"):
        ck.layer_norm(z, out_dtype=torch.int32)
    with pytest.raises(TypeError, match=r"layer_norm: argument 'weight': expected dtype torch.float64, got"):
        ck.layer_norm(z.double(), torch.ones(4))
    with pytest.raises(TypeError, match=r"bias_gelu: argument 'bias': expected dtype torch.bfloat16 or torch.float32"):
        ck.bias_gelu(z.bfloat16(), torch.ones(4).half())
    with pytest.raises(
        TypeError, match=r"layer_norm_mlp: argument 'fc2_weight': expected a torch.Tensor, got NoneType"
    ):
        ck.layer_norm_mlp(z, None, *[None if i == 6 else p for i, p in enumerate(mlp_parameters(4, 8))])
    with pytest.raises(TypeError, match=r"convnext_block: argument 'recompute': expected a bool, got str"):
        ck.convnext_block(*block_arguments(), recompute="no")
    with pytest.raises(
        TypeError, match=r"convnext_block: argument 'visible': expected VisiblePatches or None, got list"
    ):
        ck.FusedConvNeXtBlock(4)(x, [0])


def test_grn_of_two_dimensions():
    """Nothing lies between N and K: a norm is the value's own."""
    z, parameters = values(3, 4, dtype=torch.float64), mlp_parameters(4, 8, torch.float64, grn=True)
    expected = reference.layer_norm_mlp(z[:, None], None, *parameters)[:, 0]
    torch.testing.assert_close(reference.layer_norm_mlp(z, None, *parameters), expected)
    torch.testing.assert_close(ck.layer_norm_mlp(z, None, *parameters), expected)


@pytest.mark.parametrize("derive", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_derivatives_by_torch_func_raise(derive):
    with pytest.raises(RuntimeError, match=r"derivatives by torch.func \(grad, vjp, ...\) are not supported; unfuse"):
        derive(lambda x: ck.bias_gelu(x).sum())(torch.randn(2, 4))


def test_unknown_backend():
    message = "'backend': expected one of auto, cpu, cuda, triton, reference, got 'tpu'"
    with pytest.raises(ValueError, match=message), ck.use_backend("tpu"):
        pass
    assert backends.current() == "auto"


def test_a_forced_backend_that_cannot_run_raises():
    with ck.use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' is forced, but the tensors are on"):
        ck.bias_gelu(torch.randn(2, 4, device="cpu"))
