"""The CUDA sources compile for an old and a new architecture, and no tuned kernel spills registers or uses a stack."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from build_tools import toolchain

ROOT = Path(__file__).resolve().parent.parent
# A room may spread its kernels over several translation units, which then compile side by side.
SOURCES = {f"{source.parent.name}/{source.stem}": source for source in sorted(ROOT.glob("csrc/*/cuda*.cu"))}
# They launch kernels that other sources hold.
WITHOUT_KERNELS = {"mlp/cuda_mlp_forward"}
ARCHITECTURES = ["80", "120"]

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_\w+'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def toolkit():
    found, rejected = toolchain.find_toolkit()
    if not found:
        pytest.skip(
            f"no CUDA compiler: {'; '.join(rejected) or 'none in CUDA_HOME, on PATH or in site-packages/nvidia'}"
        )
    return found


@pytest.fixture(scope="module")
def reports(toolkit, tmp_path_factory):
    """(source, architecture) -> what the compiler said."""
    folder = tmp_path_factory.mktemp("cuda")
    include = Path(torch.__file__).parent / "include"

    def build(source, architecture):
        command = [
            toolkit.nvcc,
            "-std=c++20",
            "-O3",
            "--expt-relaxed-constexpr",
            "-Xptxas",
            "-v",
            "-Xcompiler",
            "-fPIC",
        ]
        command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]
        command += [f"-I{ROOT / 'csrc'}", "-isystem", include]
        for folder_of_headers in toolkit.includes:
            command += ["-isystem", folder_of_headers]
        command += ["-c", source, "-o", folder / f"{source.parent.name}.{source.stem}.{architecture}.o"]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        jobs = {(n, a): pool.submit(build, s, a) for n, s in SOURCES.items() for a in ARCHITECTURES}
        return {key: job.result() for key, job in jobs.items()}


def test_there_are_sources():
    assert SOURCES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills(reports, source, architecture):
    report = reports[source, architecture]
    assert "warning" not in report, report
    kernels = [match.groupdict() for match in KERNEL.finditer(report)]
    assert len(kernels) == report.count("Compiling entry function")
    assert bool(kernels) == (source not in WITHOUT_KERNELS)
    # The plain kernels of unusual shapes divide 64-bit numbers before their loops: a call, which saves a few registers.
    spilling = [
        k for k in kernels if max(int(k[n]) for n in ("stack", "stores", "loads")) > 64 * ("simple_" in k["name"])
    ]
    assert not spilling
    assert not kernels or any("simple_" not in k["name"] for k in kernels)
