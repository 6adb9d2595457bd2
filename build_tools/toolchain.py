"""What this machine can build: the CUDA toolkit, the GPU architectures, and what the environment variables ask for.

    CONVNEXT_KERNELS_CUDA   unset: CUDA kernels where there is a toolkit; 1: a missing toolkit is an error; 0: none
    CUDA_HOME, CUDA_PATH    the toolkit to use
    TORCH_CUDA_ARCH_LIST    the GPU architectures to compile for, e.g. "8.0;9.0a+PTX"

A toolkit is looked for in CUDA_HOME and CUDA_PATH, on PATH, in /usr/local/cuda, and in NVIDIA's compiler wheels
(site-packages/nvidia/cu13). One that is too old for a GPU of this machine is taken where no other is found, or where
these variables ask for it. Nothing here imports PyTorch or initialises CUDA.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
MINIMUM_CAPABILITY = (8, 0)  # bf16 arithmetic and cp.async
MINIMUM_CUDA = (12, 0)  # C++20 in device code
TOOLKIT_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")  # where NVIDIA's installers put it, without touching PATH
COMPILER_WHEELS = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
DEFAULT_COMPILER_VERSION = "13.0"


class ToolchainError(Exception):
    """What was asked for cannot be built here; the message says why and what to do."""


# --- what is asked for


def cuda_setting(environ=os.environ):
    """CONVNEXT_KERNELS_CUDA as True (required), False (skipped) or None (wherever it can be built)."""
    value = environ.get("CONVNEXT_KERNELS_CUDA", "").strip()
    if value not in ("", "0", "1"):
        raise ToolchainError(f"CONVNEXT_KERNELS_CUDA: expected 1, 0 or nothing, got {value!r}")
    return {"": None, "0": False, "1": True}[value]


# --- the toolkit


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    version: tuple[int, int]
    cudart: Path  # libcudart_static.a
    includes: tuple[Path, ...]  # header folders that nvcc does not know by itself
    found_in: str

    @property
    def version_text(self):
        return ".".join(map(str, self.version))


def find_toolkit(environ=os.environ, search_path=None):
    """The first usable toolkit that knows the GPUs present, else the first usable one, or None; and why not others."""
    rejected, first = [], None
    for nvcc, found_in, roots in _candidates(environ, sys.path if search_path is None else search_path):
        try:
            toolkit = inspect_toolkit(nvcc, found_in, roots)
        except ToolchainError as error:
            rejected.append(f"{found_in}: {error}")
            continue
        unknown = unknown_gpus(toolkit, environ)
        if not unknown:
            return toolkit, rejected
        names = ", ".join(f"sm_{gpu.number}" for gpu in unknown)
        rejected.append(f"{found_in}: {nvcc} is CUDA {toolkit.version_text}, which does not know {names}")
        first = first or toolkit
    return first, rejected


def _candidates(environ, search_path):
    """Every nvcc, where it was found, and the folders beside its own in which pieces of the toolkit may lie."""
    for variable in TOOLKIT_VARIABLES:
        if environ.get(variable):
            yield Path(environ[variable]) / "bin" / "nvcc", variable, []
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    if on_path:
        yield Path(on_path), "PATH", []
    if USUAL_NVCC.is_file():
        yield USUAL_NVCC, str(USUAL_NVCC.parent.parent), []
    # An isolated build has two site-packages: headers that PyTorch depends on are in the first, and the compiler,
    # which the backend asked for later, in the second.
    roots = [root for entry in search_path for root in sorted(Path(entry or ".").glob("nvidia/cu[1-9]*"))]
    for root in roots:
        if (root / "bin" / "nvcc").is_file():
            release = [other for other in roots if other.name == root.name]
            yield root / "bin" / "nvcc", "NVIDIA's compiler wheels", release


def inspect_toolkit(nvcc, found_in, roots=()):
    """Asks nvcc itself where its toolkit lies: `nvcc` may be a wrapper script or a link far away from it."""
    if not nvcc.is_file():
        raise ToolchainError(f"{nvcc} does not exist")
    command = [str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{nvcc} does not run ({error})") from error
    told = run.stdout + run.stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.M)
    version = [re.search(rf"__CUDACC_VER_{part}__=(\d+)", told) for part in ("MAJOR", "MINOR")]
    if run.returncode or not top or not all(version):
        last_line = (told.strip().splitlines() or ["no output"])[-1]
        raise ToolchainError(f"{nvcc} --dryrun failed: {last_line}")
    version = tuple(int(part[1]) for part in version)
    if version < MINIMUM_CUDA:
        raise ToolchainError(
            f"{nvcc} is CUDA {version[0]}.{version[1]}, older than {MINIMUM_CUDA[0]}.{MINIMUM_CUDA[1]}"
        )

    root = Path(top[1].strip()).resolve()
    device_compiler = re.search(r"^#\$ CICC_PATH=(.+)$", told, re.M)
    if device_compiler and not Path(device_compiler[1].strip(), "cicc").is_file():
        raise ToolchainError(f"{nvcc} has no cicc in {Path(device_compiler[1].strip()).resolve()}")
    includes = [other / "include" for other in roots if other.resolve() != root]
    _first_holding("cuda_runtime.h", [*includes, root / "include", *re.findall(r'"-I([^"]+)"', told)], nvcc)
    libraries = [other / "lib" for other in roots] + [root / "lib64", root / "lib", *re.findall(r'"-L([^"]+)"', told)]
    cudart = _first_holding("libcudart_static.a", libraries, nvcc)
    includes += [folder / "cccl" for folder in includes]
    return Toolkit(Path(nvcc), version, cudart, tuple(filter(Path.is_dir, includes)), found_in)


def _first_holding(name, folders, nvcc):
    for folder in folders:
        if Path(folder, name).is_file():
            return Path(folder, name).resolve()
    raise ToolchainError(f"{nvcc} has no {name} in {' or '.join(sorted({str(Path(f).resolve()) for f in folders}))}")


def compiler_requirements(environ=os.environ, search_path=None):
    """The wheels an isolated build needs besides pyproject.toml's to compile for CUDA.

    Rule: none if CONVNEXT_KERNELS_CUDA=0 or a toolkit is installed that knows the GPUs present; otherwise the compiler
    wheels (270 MB) if CONVNEXT_KERNELS_CUDA=1, or if it is unset and a GPU is present. A machine with neither builds
    for the CPU.
    """
    setting = cuda_setting(environ)
    if setting is False:
        return []
    toolkit, _ = find_toolkit(environ, search_path)
    if toolkit and not unknown_gpus(toolkit, environ):
        return []
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return []  # there are no such wheels
    if setting is None and not gpus_present():
        return []
    return compiler_wheels()


def compiler_wheels():
    """The requirements that make a CUDA compiler in this Python environment."""
    # PyTorch's own requirements pin some of these: another version would contradict them, and the compiler has to be
    # of the runtime's release.
    installed = {wheel: _installed_version(wheel) for wheel in COMPILER_WHEELS}
    release = installed["nvidia-cuda-runtime"] or DEFAULT_COMPILER_VERSION
    release = ".".join(release.split(".")[:2])
    return [wheel if installed[wheel] else f"{wheel}=={release}.*" for wheel in COMPILER_WHEELS]


def _installed_version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- the architectures


@dataclass(frozen=True)
class Architecture:
    number: str  # "80", "90a"
    ptx: bool = False

    @property
    def capability(self):
        digits = self.number.rstrip("af")
        return int(digits[:-1]), int(digits[-1])

    def __str__(self):
        return f"sm_{self.number}" + ("+PTX" if self.ptx else "")

    @property
    def nvcc_flags(self):
        kinds = ["sm", "compute"] if self.ptx else ["sm"]
        return [f"-gencode=arch=compute_{self.number},code={kind}_{self.number}" for kind in kinds]


def parse_architectures(text):
    """TORCH_CUDA_ARCH_LIST's syntax: '8.0', '9.0a', '9.0+PTX', separated by semicolons, commas or spaces."""
    architectures = {}
    for item in re.split(r"[;,\s]+", text.strip("; ,\t\n")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not match:
            raise ToolchainError(
                f"TORCH_CUDA_ARCH_LIST: expected compute capabilities such as '8.0;9.0a+PTX', got {item!r} in {text!r}"
            )
        major, minor, suffix, ptx = match.groups()
        number = major + minor + suffix
        asked_before = number in architectures and architectures[number].ptx
        architectures[number] = Architecture(number, bool(ptx) or asked_before)
    return list(architectures.values())


def gpus_present():
    """Compute capabilities of this machine's GPUs, e.g. ['9.0'], by nvidia-smi: starting CUDA here would be slow."""
    nvidia_smi = shutil.which("nvidia-smi")
    if not nvidia_smi:
        return []
    command = [nvidia_smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted({line.strip() for line in run.stdout.splitlines() if re.fullmatch(r"\d+\.\d", line.strip())})


def choose_architectures(environ=os.environ, supported=None):
    """The architectures to compile for and where the choice comes from. `supported`: what nvcc knows, e.g. {'80'}."""
    asked = _architectures_asked_for(environ)
    if asked:
        wanted, why = parse_architectures(asked), "TORCH_CUDA_ARCH_LIST"
        usable = [architecture for architecture in wanted if architecture.capability >= MINIMUM_CAPABILITY]
        if not usable:
            raise ToolchainError(f"TORCH_CUDA_ARCH_LIST: expected at least one architecture from 8.0 on, got {asked!r}")
        if len(usable) < len(wanted):
            why += ", without those below 8.0"
        return usable, why
    chosen, why = {}, "the GPUs present"
    for gpu in _usable_gpus():
        known = gpu if supported is None else _nearest(gpu, supported)
        if known is None:
            continue  # nvcc has dropped it
        if known.number != gpu.number:
            how = "whose PTX the driver compiles for it at first use" if known.ptx else "whose code it runs"
            why += f"; nvcc does not know sm_{gpu.number}: sm_{known.number}, {how}"
        if known.number not in chosen or known.ptx:
            chosen[known.number] = known
    if chosen:
        return list(chosen.values()), why
    usual = parse_architectures(";".join(DEFAULT_ARCHITECTURES))
    if supported is not None:
        usual = [architecture for architecture in usual if architecture.number in supported]
    why = "the default: no GPU of 8.0 or newer that nvcc knows is present"
    return usual[:-1] + [Architecture(usual[-1].number, ptx=True)], why


def _architectures_asked_for(environ):
    return environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,\t\n")


def _usable_gpus():
    """This machine's GPUs that the kernels run on, as architectures."""
    present = [Architecture(capability.replace(".", "")) for capability in gpus_present()]
    return [gpu for gpu in present if gpu.capability >= MINIMUM_CAPABILITY]


def _nearest(gpu, supported):
    """The last of the `supported` architectures up to a GPU's own; None where nvcc knows later ones only.

    Its machine code runs on the GPU where it is of the same generation; with an older one goes PTX.
    """
    before = [Architecture(number) for number in supported if number.isdecimal()]
    before = [known for known in before if MINIMUM_CAPABILITY <= known.capability <= gpu.capability]
    if not before:
        return None
    last = max(before, key=lambda known: known.capability)
    return Architecture(last.number, ptx=last.capability[0] < gpu.capability[0])


def unknown_gpus(toolkit, environ=os.environ):
    """The GPUs present that the toolkit has no machine code for. None count where the environment has chosen."""
    if toolkit.found_in in TOOLKIT_VARIABLES or _architectures_asked_for(environ):
        return []
    gpus = _usable_gpus()
    supported = supported_architectures(toolkit) if gpus else set()
    nearest = [(gpu, _nearest(gpu, supported)) for gpu in gpus]
    return [gpu for gpu, known in nearest if known is None or known.ptx]


def supported_architectures(toolkit):
    """The architecture numbers nvcc compiles for, e.g. {'80', '90', '90a'}."""
    run = subprocess.run([toolkit.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True, timeout=60)
    return set(re.findall(r"compute_(\w+)", run.stdout))
