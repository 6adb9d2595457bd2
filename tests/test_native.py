"""The compiled libraries: what they tell about themselves, and how they are found."""

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convnext_kernels import __version__, native

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from build_tools import ninja_build  # noqa: E402

sys.path.remove(str(ROOT))


def test_build_facts():
    facts = native.build_info()
    if facts is None:
        pytest.skip("CONVNEXT_KERNELS_LIBRARY_DIR names a folder without _C")
    assert facts["version"] == __version__
    assert facts["commit"]
    assert facts["cpu_capabilities"][0] == "portable"
    assert bool(facts["cuda_version"]) == bool(facts["cuda_architectures"])
    assert tuple(map(int, facts["torch_version"].split(".")[:2])) >= (2, 11)
    assert "CUDA: " in facts["plan"]
    assert native.status().bindings.cpu_capability() in facts["cpu_capabilities"]


def test_libraries_are_built_from_this_checkout():
    facts = native.build_info()
    if facts is None:
        pytest.skip("CONVNEXT_KERNELS_LIBRARY_DIR names a folder without _C")
    assert facts["source_digest"] == ninja_build.source_digest(ROOT), (
        "csrc/ has changed since: run `pip install .` again"
    )


def test_kernels_share_no_code_across_capabilities():
    """The linker keeps one copy of a weak symbol: AVX-512's could then run on a processor that has none."""
    objects = sorted(ROOT.glob("build/*/*_cpu_kernels.cpp.*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("the libraries were not built in this checkout, or there is no nm")
    for path in objects:
        listing = subprocess.run(["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
        symbols = [line.split()[-2:] for line in listing.splitlines()]
        assert symbols
        assert not [name for kind, name in symbols if kind in "WVu"], path.name


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="csrc/common/cpu.cpp is about glibc's malloc")
def test_freed_memory_stays_unless_the_user_says_otherwise():
    # MiB that 24 MiB in blocks of 3 leave in the process after they were freed.
    code = """
import mmap, torch, convnext_kernels
def resident(): return int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE >> 20
before = resident()
blocks = [torch.ones(3 << 20, dtype=torch.uint8) for _ in range(8)]
del blocks
print(resident() - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def left(**extra):
        command = [sys.executable, "-c", code]
        return int(subprocess.run(command, env={**environment, **extra}, stdout=subprocess.PIPE, check=True).stdout)

    assert left() > 16
    assert left(MALLOC_TRIM_THRESHOLD_="131072") < 8


def test_cpu_capability_can_be_forced_down_only():
    if native.status().bindings is None:
        pytest.skip("CONVNEXT_KERNELS_LIBRARY_DIR names a folder without _C")
    code = "from convnext_kernels import native; print(native.status().bindings.cpu_capability())"

    def run(capability):
        environ = {**os.environ, "CONVNEXT_KERNELS_CPU_CAPABILITY": capability}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)

    assert run("portable").stdout.strip() == "portable"
    assert "expected portable, avx2, avx512 or avx512_bf16, got 'sse2'" in run("sse2").stderr


def test_status():
    status = native.status()
    assert status is native.load()  # once
    assert status.cpu_library.is_file()
    assert status.cuda_loaded == (not status.cuda_reason)
    if torch.version.cuda is None:
        assert not status.cuda_loaded
    elif status.cuda_library:
        assert status.cuda_loaded  # with or without a GPU


@pytest.fixture
def uncompiled_checkout(monkeypatch, tmp_path):
    """native.py as it runs in an uncompiled tree beside which `installed(version)` puts a distribution."""
    site = tmp_path / "site-packages"
    discover = functools.partial(importlib.metadata.Distribution.discover, path=[str(site)])
    monkeypatch.delenv("CONVNEXT_KERNELS_LIBRARY_DIR", raising=False)
    monkeypatch.setattr(native, "_PACKAGE", tmp_path / "checkout" / "convnext_kernels")
    monkeypatch.setattr(importlib.metadata, "distributions", discover)

    def installed(version, compiled=True):
        metadata = site / f"convnext_kernels-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: convnext_kernels\nVersion: {version}\n")
        package = site / "convnext_kernels"
        package.mkdir(exist_ok=True)
        if compiled:
            (package / native.CPU_LIBRARY).touch()
        return package

    return installed


def test_uncompiled_checkout_says_what_to_do_in_one_line(uncompiled_checkout):
    with pytest.raises(
        native.NotBuiltError, match=r"not compiled and not installed: run `pip install \.` there$"
    ) as error:
        native._find()
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ImportError)


def test_uncompiled_checkout_finds_the_installed_libraries(uncompiled_checkout):
    package = uncompiled_checkout(__version__)
    assert native._find() == (package, "installed distribution")


def test_uncompiled_checkout_refuses_another_version(uncompiled_checkout):
    uncompiled_checkout("99.0")
    with pytest.raises(
        native.NotBuiltError, match=rf"checkout of convnext_kernels {__version__}, .* version is 99\.0: run"
    ):
        native._find()


def test_distribution_without_libraries_is_passed_over(uncompiled_checkout):
    uncompiled_checkout(__version__, compiled=False)
    with pytest.raises(native.NotBuiltError, match="not compiled and not installed"):
        native._find()


def test_named_library_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("CONVNEXT_KERNELS_LIBRARY_DIR", str(tmp_path))
    with pytest.raises(native.NotBuiltError, match=f"expected a folder with {native.CPU_LIBRARY}, got '{tmp_path}'"):
        native._find()
    (tmp_path / native.CPU_LIBRARY).touch()
    assert native._find() == (tmp_path, "CONVNEXT_KERNELS_LIBRARY_DIR")


def test_libraries_of_another_version_are_refused(tmp_path):
    class Bindings:
        @staticmethod
        def build_info():
            return {"version": "99.0"}

    with pytest.raises(native.NotBuiltError, match=rf"are of convnext_kernels 99\.0, and this is {__version__}"):
        native._check_version(Bindings, tmp_path)


@pytest.mark.parametrize("version", ["2.10.0", "2.9.1+cu128", "1.13.1"])
def test_old_pytorch_is_refused(version):
    with pytest.raises(
        native.NotBuiltError, match=r"needs torch>=2\.11, and this is torch " + version.replace("+", r"\+")
    ):
        native._check_torch(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.15.0+cu130", "3.0.0a0+git123"])
def test_new_pytorch_is_taken(version):
    native._check_torch(version)
