"""Finds and loads the compiled libraries, or says why it cannot.

They are looked for in
    1. the folder that CONVNEXT_KERNELS_LIBRARY_DIR names,
    2. this package's own folder (an installed package, or an editable install's checkout),
    3. the installed distribution of the same version, where this package is an uncompiled checkout: `python -m pytest`
       and `python -m convnext_kernels` put the checkout before the installed package.

The CUDA library is loaded only into a PyTorch with CUDA; that needs no GPU and no driver.
"""

import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from convnext_kernels._version import __version__

CPU_LIBRARY = "libconvnext_kernels_cpu.so"
CUDA_LIBRARY = "libconvnext_kernels_cuda.so"
MINIMUM_TORCH = (2, 11)

_PACKAGE = Path(__file__).resolve().parent
_lock = threading.Lock()
_status = None


class NotBuiltError(ImportError):
    """There are no compiled libraries for this package and this PyTorch; the message says what to do."""


@dataclass(frozen=True)
class NativeStatus:
    """What was loaded, and why the rest was not."""

    folder: Path
    found_in: str
    cpu_library: Path
    cuda_library: Path | None
    cuda_loaded: bool
    cuda_reason: str  # why the CUDA library is not loaded; empty if it is
    bindings: ModuleType | None  # `_C`; None where CONVNEXT_KERNELS_LIBRARY_DIR has none for this Python


def load():
    """Loads the libraries into PyTorch, once a process, and returns the NativeStatus.

    Raises:
        NotBuiltError: no libraries, libraries of another version, or a PyTorch older than 2.11.
        OSError: a library is there but cannot be loaded.
    """
    global _status
    with _lock:
        if _status is None:
            _check_torch(torch.__version__)
            folder, found_in = _find()
            bindings = _load_bindings(folder)
            _check_version(bindings, folder)
            _status = _load_libraries(folder, found_in, bindings)
    return _status


def status():
    """The NativeStatus of the loaded libraries; loads them if need be."""
    return load()


def build_info():
    """How the loaded libraries were built: a dict (its keys are in csrc/bindings.cpp), or None without `_C`."""
    bindings = load().bindings
    return bindings.build_info() if bindings else None


def has_code_for(architectures, capability):
    """Whether a GPU of a compute capability, say (9, 0), runs what was compiled for `architectures` (of build_info).

    Machine code runs on its own architecture and on later ones of the same generation, except that a Tegra shares none
    with others; PTX on everything later; either on one architecture only with an 'a' at its end, and in one generation
    only with an 'f' (CUDA C++ Programming Guide, compute capabilities; CUDA Compiler Driver NVCC, GPU compilation).
    """
    for architecture in architectures:
        digits, suffix, ptx = re.fullmatch(r"sm_(\d+)([af]?)(\+PTX)?", architecture).groups()
        compiled_for = int(digits[:-1]), int(digits[-1])
        if compiled_for == capability:
            return True
        later = compiled_for < capability and suffix != "a"
        same_generation = compiled_for[0] == capability[0]
        if later and same_generation and not {compiled_for, capability} & _TEGRA:
            return True
        if later and ptx and (same_generation or not suffix):
            return True
    return False


_TEGRA = {(8, 7)}


def cuda_driver_version():
    """The newest CUDA that the installed driver runs, as (13, 0); None where there is no driver to ask."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _check_torch(version):
    if tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups())) < MINIMUM_TORCH:
        raise NotBuiltError(
            f"convnext_kernels needs torch>=2.11, and this is torch {version}: pip install 'torch>=2.11'"
        )


def _find():
    """The folder with the libraries, and how it was found."""
    named = os.environ.get("CONVNEXT_KERNELS_LIBRARY_DIR")
    if named:
        folder = Path(named).resolve()
        if not (folder / CPU_LIBRARY).is_file():
            raise NotBuiltError(f"CONVNEXT_KERNELS_LIBRARY_DIR: expected a folder with {CPU_LIBRARY}, got {named!r}")
        return folder, "CONVNEXT_KERNELS_LIBRARY_DIR"
    if (_PACKAGE / CPU_LIBRARY).is_file():
        return _PACKAGE, "package"
    other_versions = []
    for distribution in importlib.metadata.distributions(name="convnext_kernels"):
        folder = Path(distribution.locate_file("convnext_kernels")).resolve()
        if not (folder / CPU_LIBRARY).is_file():
            continue  # the checkout's own .egg-info, or an editable install of another checkout
        if distribution.version == __version__:
            return folder, "installed distribution"
        other_versions.append(distribution.version)
    if other_versions:
        raise NotBuiltError(
            f"this is an uncompiled checkout of convnext_kernels {__version__}, and the installed version is "
            f"{', '.join(other_versions)}: run `pip install .` in {_PACKAGE.parent}"
        )
    raise NotBuiltError(
        f"convnext_kernels in {_PACKAGE.parent} is not compiled and not installed: run `pip install .` there"
    )


def _load_bindings(folder):
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_C{suffix}"
        if path.is_file():
            loader = importlib.machinery.ExtensionFileLoader("convnext_kernels._C", str(path))
            bindings = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
            loader.exec_module(bindings)
            return bindings
    return None


def _check_version(bindings, folder):
    built = bindings.build_info()["version"] if bindings else __version__
    if built != __version__:
        raise NotBuiltError(
            f"the compiled libraries in {folder} are of convnext_kernels {built}, and this is {__version__}: "
            "run `pip install` again"
        )


def _load_libraries(folder, found_in, bindings):
    cpu_library, cuda_library = folder / CPU_LIBRARY, folder / CUDA_LIBRARY
    torch.ops.load_library(cpu_library)
    if not cuda_library.is_file():
        cuda_library, reason = None, "the libraries were built without CUDA"
    elif torch.version.cuda is None:
        reason = f"this PyTorch ({torch.__version__}) was built without CUDA"
    else:
        torch.ops.load_library(cuda_library)
        reason = ""
    return NativeStatus(folder, found_in, cpu_library, cuda_library, not reason, reason, bindings)
