"""The numerics rule: our error may be twice PyTorch's own in the same mode, both measured against fp64."""

import torch

# What rounding the result, and a handful of roundings on the way, may cost where PyTorch happens to be exact.
FLOOR_ULPS = 4


def device_type():
    """Of the device that the test at hand makes its tensors on."""
    return torch.get_default_device().type


def rms(tensor):
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0


def peak(tensor):
    return tensor.double().abs().max().item() if tensor.numel() else 0.0


def assert_close(ours, theirs, truth, name="", unit=None):
    """Fails unless RMS(ours - truth) <= 2 RMS(theirs - truth) + floor, and likewise for the maximum.

    `truth` is fp64. `unit` is the rounding unit of the floor; by default that of our dtype.
    """
    assert ours.shape == truth.shape == theirs.shape, f"{name}: {ours.shape}, {theirs.shape}, {truth.shape}"
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype} instead of {theirs.dtype}"
    assert truth.dtype == torch.float64
    if unit is None:
        unit = torch.finfo(ours.dtype).eps / 2
    floor = FLOOR_ULPS * unit
    ours_error, theirs_error = ours.double() - truth, theirs.double() - truth
    measures = [("RMS", rms)] + ([("maximum", peak)] if truth.numel() > 100 else [])
    for kind, measure in measures:
        got, allowed = measure(ours_error), 2 * measure(theirs_error) + floor * measure(truth)
        # "not <=" so that a NaN fails.
        assert got <= allowed, (
            f"{name}: {kind} error {got:.2e}, allowed {allowed:.2e} (PyTorch {measure(theirs_error):.2e})"
        )


class _ScaledGradient(torch.autograd.Function):
    """Scales the gradient and leaves the value alone."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def scale_gradient(y, factor):
    """`y`, with a gradient that is wrong by a factor: a planted bug."""
    return _ScaledGradient.apply(y, factor)
