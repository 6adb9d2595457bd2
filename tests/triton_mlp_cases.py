"""layer_norm_mlp's arguments in a mode, its meaning in fp64, and PyTorch's own computation in that mode."""

import contextlib

import torch
import torch.nn.functional as F

from convnext_kernels import reference
from convnext_kernels.triton_kernels import config, launch
from numerics import assert_close

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICE = "cpu" if launch.INTERPRETED else "cuda"

MODES = [*DTYPES, "mixed-fp16", "mixed-bf16"]
FORMS = {"fused": 1, "two": 0}


def guarded(tensor):
    """The tensor with NaN before and behind it, for reads outside that a kernel would multiply with 0."""
    if tensor is None:
        return None
    memory = torch.full((tensor.numel() + 2 * 8192,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return memory[8192:-8192].copy_(tensor.flatten()).view(tensor.shape)


class Case:
    """Random arguments. 'mixed-bf16', 'mixed-fp16' are autocast's mixture: z in 16 bits, everything else fp32.

    With `drop` every third sample from the second on is dropped, and holds NaN where the operator must not look.
    """

    def __init__(self, mode, shape, grn=False, drop=False, hidden=None, residual=True):
        self.autocast = DTYPES[mode[6:]] if mode.startswith("mixed-") else None
        self.dtype = torch.float32 if self.autocast else DTYPES[mode]
        self.z_dtype = self.autocast or self.dtype
        self.unit = torch.finfo(self.z_dtype).eps / 2
        self.channels, self.hidden = shape[-1], hidden or 4 * shape[-1]
        c, k = self.channels, self.hidden
        self.z = torch.randn(shape, device=DEVICE).to(self.z_dtype)
        self.residual = torch.randn(shape, device=DEVICE).to(self.dtype) if residual else None
        shapes = [(c,), (c,), (k, c), (k,), (k,) if grn else None, (k,) if grn else None, (c, k), (c,)]
        shapes.append(None if grn else (c,))
        self.p = [
            None if s is None else (torch.randn(s, device=DEVICE) * (s[-1] ** -0.5 if s[1:] else 1)).to(self.dtype)
            for s in shapes
        ]
        self.p[0] += 1
        self.z, self.residual, *self.p = map(guarded, (self.z, self.residual, *self.p))
        self.sample_scale = self.dropped = None
        if drop:
            self.dropped = torch.arange(shape[0], device=DEVICE) % 3 == 1
            self.sample_scale = torch.where(self.dropped, 0.0, 1.25)

    def poisoned(self, tensor):
        if self.dropped is None:
            return tensor
        return tensor.masked_fill(self.dropped.view(-1, *[1] * (tensor.dim() - 1)), float("nan"))

    def arguments(self, approximate="none", keep_hidden=False):
        """Those of the raw operator."""
        z = guarded(self.poisoned(self.z))
        return z, self.residual, *self.p, self.sample_scale, 1e-6, approximate, self.dtype, keep_hidden

    def expected(self, approximate="none", wide=False):
        """y and the hidden tensor by PyTorch's functions: in fp64 where `wide`, else in the case's mode."""
        z, residual, *p = (t if t is None or not wide else t.double() for t in (self.z, self.residual, *self.p))
        autocast = self.autocast is not None and not wide
        with torch.autocast(DEVICE, dtype=self.autocast) if autocast else contextlib.nullcontext():
            hidden = F.linear(reference.layer_norm(z, *p[:2]), p[2], p[3])
            y = reference.layer_norm_mlp(z, residual, *p, self.sample_scale, approximate=approximate)
        if self.dropped is not None:
            hidden = hidden.masked_fill(self.dropped.view(-1, *[1] * (hidden.dim() - 1)), 0)
        return y, hidden

    def check(self, run, approximate="none", keep_hidden=False):
        """`run` is the operator; by the numerics rule, and exact where samples are dropped."""
        y, mean, rstd, hidden = run(*self.arguments(approximate, keep_hidden))
        truth, true_hidden = self.expected(approximate, wide=True)
        theirs, their_hidden = self.expected(approximate)
        assert y.dtype == self.dtype and y.shape == self.z.shape and y.is_contiguous()
        assert_close(y, theirs.to(y.dtype), truth, "y", self.unit)
        z = self.z.double()
        variance, average = torch.var_mean(z, -1, correction=0)
        statistics = [("mean", mean, average), ("rstd", rstd, (variance + 1e-6).rsqrt())]
        for name, ours, true in statistics:
            assert ours.dtype == torch.float32 and ours.shape == self.z.shape[:-1]
            if self.dropped is not None:
                true = true.masked_fill(self.dropped.view(-1, *[1] * (true.dim() - 1)), 0)
            scale = true.abs().max() if name == "rstd" else z.abs().max()
            assert (ours - true).abs().max() <= 2e-6 * scale, name
        if keep_hidden:
            assert hidden.dtype == self.z_dtype
            assert_close(hidden, their_hidden, true_hidden, "hidden", self.unit)
        else:
            assert hidden.shape == (0,) and hidden.dtype == self.z_dtype
        if self.dropped is not None:
            residual = torch.zeros_like(y) if self.residual is None else self.residual
            assert torch.equal(y[self.dropped], residual[self.dropped])
            assert all(t[self.dropped].eq(0).all() for t in (mean, rstd))
            assert not keep_hidden or hidden[self.dropped].eq(0).all()
        return y


@contextlib.contextmanager
def form(name, tma=None, tiles=launch.INTERPRETED):
    """Forces 'fused' or 'two'. `tiles`: small ones, so that a few rows make several tiles."""
    with contextlib.ExitStack() as stack:

        def override(kernel, blocks, **options):
            stack.enter_context(config.override(kernel, config.Config(blocks, **options)))

        for kernel in ("mlp_form", "mlp_grn_form"):
            override(kernel, {"FUSED": FORMS[name]})
        if tiles:
            for kernel in ("mlp_fused", "mlp_grn_fused"):
                override(kernel, {"BLOCK_M": 16, "BLOCK_K": 128, "PROGRAMS": 1})
            override("mlp_squares", {"BLOCK_M": 32, "BLOCK_K": 128, "PROGRAMS": 1})
            tile = {"BLOCK_K": 128, "GROUP": 2, "PROGRAMS": 1, "TMA": int(bool(tma))}
            override("mlp_fc1", {"BLOCK_M": 32, "BLOCK_N": 128, **tile})
            override("mlp_fc2", {"BLOCK_M": 16, "BLOCK_N": 128, **tile})
        yield
