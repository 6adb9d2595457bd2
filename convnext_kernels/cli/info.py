"""``convnext-kernels info``: versions, what was compiled, and which backend runs what here and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .environment import describe_backends, describe_environment, describe_triton
from .terminal import show, table

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="versions, what was compiled, and which backend runs what here",
        description="Versions, what was compiled, and for every operator which backend runs it on which device, and "
        "why. CONVNEXT_KERNELS_BACKEND forces a backend; CONVNEXT_KERNELS_CPU_CAPABILITY the CPU kernels.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=_run)


def _lines(environment: dict[str, Any]) -> list[tuple[str, str]]:
    build = environment["build"] or {}
    libraries = environment["libraries"]

    def listed(key: str) -> str:
        return " ".join(build.get(key) or ()) or "none"

    if build.get("cuda_version"):
        cuda = f"{build['cuda_version']} for {listed('cuda_architectures')}"
    else:
        cuda = "none"
    cuda += "; loaded" if libraries["cuda_loaded"] else f"; not loaded: {libraries['cuda_reason']}"
    gpus = [
        f"{index}: {gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"
        for index, gpu in enumerate(environment["gpus"])
    ]
    return [
        ("convnext_kernels", f"{environment['convnext_kernels']}, commit {build.get('commit', 'unknown')}"),
        ("python", f"{environment['python']} on {environment['platform']}"),
        ("torch", f"{environment['torch']}, CUDA {environment['torch_cuda'] or 'none'}"),
        ("triton", environment["triton"] or "not installed"),
        ("libraries", f"{libraries['folder']} ({libraries['found_in']})"),
        ("built with", f"{build.get('compiler', 'unknown')}, torch {build.get('torch_version', 'unknown')}"),
        ("CUDA kernels", cuda),
        ("Triton kernels", describe_triton()),
        ("CPU kernels", f"{environment['cpu_capability'] or 'unknown'}, of {listed('cpu_capabilities')}"),
        ("CPU products", environment["cpu_matrix_products"]),
        ("processor", f"{environment['processor']}, {environment['threads']} threads"),
        *(("GPU", gpu) for gpu in gpus or ["none"]),
        *(("the build said", line) for line in build.get("plan", "").splitlines()),
    ]


def _run(options: argparse.Namespace) -> int:
    environment, backends = describe_environment(paths=True), describe_backends()
    if options.json:
        show(json.dumps({"environment": environment, "backends": backends}, indent=1))
        return 0
    facts = [f"{name:18}{value}" for name, value in _lines(environment)]
    rows = [(row["operator"], row["device"], row["backend"] or "-", row["reason"]) for row in backends]
    show("\n".join([*facts, "", table(("operator", "device", "backend", "why"), rows)]))
    return 0
