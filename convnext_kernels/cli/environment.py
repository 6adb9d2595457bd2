"""What this machine and this installation are: for ``info``, and for the head of every result file."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from .. import backends, native
from .._version import __version__

__all__ = ["describe_backends", "describe_environment", "describe_triton"]


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the portable answer below
    return platform.processor() or platform.machine()


def _cpu_matrix_products(bindings: Any) -> str:
    """What multiplies the MLP's matrices on the CPU: csrc/mlp/cpu_gemm.h."""
    if bindings is None:
        return "unknown"
    if not bindings.cpu_capability().startswith("avx512"):
        return "PyTorch's default, as there is no AVX-512"
    if not torch.backends.mkldnn.is_available():
        return "PyTorch's default, as this PyTorch is without oneDNN"
    return "PyTorch's oneDNN for fp32 and bf16, else its default"


def _gpus() -> list[dict[str, Any]]:
    out = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        out.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
            }
        )
    return out


def describe_environment(paths: bool = False) -> dict[str, Any]:
    """Versions, the build, the processor and the GPUs, ready for JSON. What is not known is None.

    `paths` adds where the libraries lie and what the build said, which names folders too. Results that are passed on
    go without.
    """
    status = native.status()
    bindings = status.bindings
    build = native.build_info()
    if build and not paths:
        del build["plan"]
    return {
        "convnext_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version_of("triton"),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": None if bindings is None else bindings.cpu_capability(),
        "cpu_matrix_products": _cpu_matrix_products(bindings),
        "gpus": _gpus(),
        "libraries": {
            **({"folder": str(status.folder)} if paths else {}),
            "found_in": status.found_in,
            "cuda_loaded": status.cuda_loaded,
            "cuda_reason": status.cuda_reason,
        },
        "build": build,
    }


def describe_triton() -> str:
    """Where the Triton kernels run here, and with whose configurations; or why they do not."""
    if not backends.triton_reason(torch.device("cpu")):
        return "on CPU tensors, interpreted (TRITON_INTERPRET=1)"
    reasons = [backends.triton_reason(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    if not reasons:
        missing = backends.triton_reason(torch.device("cuda"))
        return f"none: {missing or 'PyTorch sees no GPU'}"
    if all(reasons):
        return f"none: {reasons[0]}"
    from ..triton_kernels import config

    device = torch.device("cuda", reasons.index(""))
    path = config.cache_file(config.chip_name(device))
    return f"on the GPU, {'tuned: ' + str(path) if path.exists() else 'not tuned here (`convnext-kernels tune`)'}"


def describe_backends() -> list[dict[str, str]]:
    """For each device type and operator: the backend that runs it here, None where the device is missing, and why."""
    out = []
    for device_type in ("cpu", "cuda"):
        present = device_type == "cpu" or torch.cuda.device_count() > 0
        for operator, backend, reason in backends.describe(device_type):
            if backend == "none":
                backend = None
            if not present:
                library = native.status().cuda_reason
                backend, reason = None, "PyTorch sees no GPU" + (f"; {library}" if library else "")
            out.append({"device": device_type, "operator": operator, "backend": backend, "reason": reason})
    return out
