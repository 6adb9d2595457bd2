"""Writes build.ninja for the three compiled files of the package and runs ninja.

    libconvnext_kernels_cpu.so    csrc/operators.cpp (the schemas), every csrc/*/cpu.cpp once, and every
                                  csrc/*/cpu_kernels.cpp once for each CPU capability
    libconvnext_kernels_cuda.so   every csrc/*/cuda*.cu; a library of its own, so that a CPU build of PyTorch, which has
                                  no CUDA stream to ask for, never loads it
    _C                            csrc/bindings.cpp: build facts, through pybind11; one for each Python version

The two libraries use PyTorch's stable ABI only: built once, they run on every PyTorch from 2.11 on.
The build folder stays (build/ in the tree), so that a second build compiles what has changed.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from build_tools import toolchain
from build_tools.toolchain import ToolchainError

TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: the oldest PyTorch whose stable ABI the sources use
CPU_LIBRARY = "libconvnext_kernels_cpu.so"
CUDA_LIBRARY = "libconvnext_kernels_cuda.so"
SOURCE_SUFFIXES = {".cpp", ".cu", ".cuh", ".h"}
BINDINGS = "_C" + sysconfig.get_config_var("EXT_SUFFIX")

WARNINGS = ["-Wall", "-Wextra", "-Wno-uninitialized"]  # the last: false alarms in g++'s own vector intrinsics
# Contraction to fused multiply-add is accurate; -ffast-math is not, and would set flush-to-zero in the whole process.
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-math-errno"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86_CAPABILITIES = {
    "portable": [],
    "avx2": _AVX2,
    "avx512": _AVX2 + _AVX512,
    "avx512_bf16": [*_AVX2, *_AVX512, "-mavx512bf16"],
}


@dataclass
class Plan:
    """Everything the build depends on, and the words in which it is announced."""

    root: Path
    folder: Path  # where objects and libraries go
    torch: Path  # PyTorch's package folder
    torch_version: str
    cxx: list[str]
    compiler: str
    capabilities: dict[str, list[str]]
    toolkit: toolchain.Toolkit | None
    architectures: list[toolchain.Architecture]
    cuda_sources: list[Path]
    announcement: str

    @property
    def outputs(self):
        cuda = [CUDA_LIBRARY] if self.toolkit and self.cuda_sources else []
        return [CPU_LIBRARY, *cuda, BINDINGS]


def make_plan(root, environ=os.environ, search_path=None):
    """Looks at the machine and decides. Raises ToolchainError where what is asked for cannot be built."""
    root = Path(root).resolve()
    torch, torch_version, torch_cuda = _find_torch()
    cxx, compiler = _find_compiler(environ)
    setting = toolchain.cuda_setting(environ)
    toolkit, rejected = (None, []) if setting is False else toolchain.find_toolkit(environ, search_path)
    architectures = []
    if toolkit:
        architectures, why = toolchain.choose_architectures(environ, toolchain.supported_architectures(toolkit))
        cuda = [
            f"CUDA: {toolkit.version_text}, {toolkit.nvcc} (found in {toolkit.found_in})",
            f"      for {', '.join(map(str, architectures))} ({why})",
        ]
        # The library's own CUDA runtime needs a driver of its major version; PyTorch's runs on an older one too.
        if torch_cuda and torch_cuda[0] < toolkit.version[0]:
            cuda.append(
                f"      note: PyTorch is for CUDA {torch_cuda[0]}.{torch_cuda[1]}. These kernels need a driver for "
                f"CUDA {toolkit.version[0]}; on an older one Triton's run instead. CUDA_HOME chooses the toolkit"
            )
    elif setting is False:
        cuda = ["CUDA: skipped (CONVNEXT_KERNELS_CUDA=0)"]
    else:
        tried = "".join(f"; {reason}" for reason in rejected)
        missing = (
            f"no CUDA toolkit found in CUDA_HOME, on PATH, in /usr/local/cuda or in NVIDIA's compiler wheels{tried}"
        )
        if setting:
            raise ToolchainError(
                f"CONVNEXT_KERNELS_CUDA=1, but {missing}. Set CUDA_HOME, or install the wheels: pip install "
                + " ".join(f"'{wheel}'" for wheel in toolchain.compiler_wheels())
            )
        cuda = [f"CUDA: not built ({missing})"]
    capabilities = X86_CAPABILITIES if platform.machine() in ("x86_64", "AMD64") else {"portable": []}
    lines = [
        f"CPU:  {compiler}; {', '.join(capabilities)}",
        *cuda,
        f"PyTorch {torch_version} in {torch}; the libraries run on 2.11 and newer",
    ]
    return Plan(
        root=root,
        folder=root / "build" / f"{sys.implementation.cache_tag}-torch{torch_version}",
        torch=torch,
        torch_version=torch_version,
        cxx=cxx,
        compiler=compiler,
        capabilities=capabilities,
        toolkit=toolkit,
        architectures=architectures,
        cuda_sources=sorted(root.glob("csrc/*/cuda*.cu")),
        announcement="\n".join(lines),
    )


def build(plan, version):
    """Compiles what has changed. Returns the folder that holds plan.outputs."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    # By this name PyTorch lies in the same place for every build, so that the next isolated one, with a PyTorch of its
    # own in a new folder, compiles nothing again.
    (plan.folder / "torch").unlink(missing_ok=True)
    (plan.folder / "torch").symlink_to(plan.torch)
    _write_if_changed(plan.folder / "build_facts.h", facts_header(plan, version))
    _write_if_changed(plan.folder / "build.ninja", ninja_file(plan))
    print(f"convnext_kernels {version}: building in {plan.folder}", *plan.announcement.splitlines(), sep="\n  ")
    command = [*_find_ninja(), "-C", str(plan.folder)]
    jobs = os.environ.get("MAX_JOBS")
    if jobs:
        if not re.fullmatch(r"[1-9]\d*", jobs):
            raise ToolchainError(f"MAX_JOBS: expected a positive integer, got {jobs!r}")
        command += ["-j", jobs]
    sys.stdout.flush()  # ninja writes to the same file, and the plan comes first
    if subprocess.run(command).returncode:
        raise ToolchainError("compilation failed; the compiler's messages are above")
    return plan.folder


# --- tools


def _find_torch():
    """PyTorch's folder, its version, and the (major, minor) of its CUDA, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise ToolchainError("PyTorch is not installed: install torch>=2.11, or build without --no-build-isolation")
    folder = Path(spec.submodule_search_locations[0])
    # Read, not imported: it takes seconds.
    facts = (folder / "version.py").read_text()
    version = re.search(r"__version__\s*=\s*'([^']+)'", facts)[1]
    cuda = re.search(r"^cuda\b.*=\s*'(\d+)\.(\d+)", facts, re.MULTILINE)
    if tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups())) < (2, 11):
        raise ToolchainError(f"PyTorch {version} in {folder} is too old: torch>=2.11 is needed")
    return folder, version, tuple(map(int, cuda.groups())) if cuda else None


def _find_compiler(environ):
    cxx = shlex.split(environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or "g++"]
    try:
        run = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ToolchainError(f"no C++ compiler: {shlex.join(cxx)} does not run; install g++ 11 or set CXX") from error
    return cxx, run.stdout.splitlines()[0]


def _find_ninja():
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if shutil.which("ninja"):
        return [shutil.which("ninja")]
    raise ToolchainError("ninja is not installed: pip install ninja")


def _pybind11_include(torch):
    spec = importlib.util.find_spec("pybind11")
    folder = Path(spec.submodule_search_locations[0]) / "include" if spec else torch / "include"
    if not (folder / "pybind11" / "pybind11.h").is_file():
        raise ToolchainError("pybind11 is not installed: pip install pybind11")
    return folder


# --- build facts


def facts_header(plan, version):
    """A C++ header of constants for bindings.cpp; a header, so that a new commit recompiles nothing else."""
    facts = {
        "version": version,
        "commit": commit(plan.root),
        "source_digest": source_digest(plan.root),
        "compiler": plan.compiler,
        "cuda_version": plan.toolkit.version_text if CUDA_LIBRARY in plan.outputs else "",
        "torch_version": plan.torch_version,
        "plan": plan.announcement,
    }
    architectures = plan.architectures if CUDA_LIBRARY in plan.outputs else []
    lines = ["#pragma once", "namespace convnext_kernels::build_facts {"]
    lines += [f"constexpr const char* {name} = {_c_string(value)};" for name, value in facts.items()]
    for name, values in {"architectures": architectures, "cpu_capabilities": plan.capabilities}.items():
        # The closing nullptr keeps an empty list legal C++.
        lines.append(f"constexpr const char* {name}[] = {{{''.join(_c_string(v) + ', ' for v in values)}nullptr}};")
    return "\n".join([*lines, "}  // namespace convnext_kernels::build_facts", ""])


def _c_string(value):
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def commit(root):
    """The commit being built, '-dirty' where tracked files differ from it; a source distribution has it in COMMIT."""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            run = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            return "unknown"
        return run.stdout.strip() if run.returncode == 0 else "unknown"
    recorded = root / "COMMIT"
    return recorded.read_text().strip() if recorded.is_file() else "unknown"


def source_digest(root):
    """Names the state of csrc/, committed or not: equal digests, equal libraries."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (root / "csrc").rglob("*") if path.suffix in SOURCE_SUFFIXES):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# --- build.ninja


def ninja_file(plan):
    csrc = plan.root / "csrc"
    stable_abi = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DTORCH_STABLE_ONLY", f"-I{csrc}"]
    # Error messages and registrations name a source relative to the tree, wherever it was built.
    relative = f"-ffile-prefix-map={plan.root}/="
    relative_quoted = f'-ffile-prefix-map="{plan.root}/="'  # nvcc hands it to a shell as it is
    cxx_flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *WARNINGS, relative]
    operator_flags = [*cxx_flags, *stable_abi, "-isystemtorch/include"]
    operator_flags.append(f"-DCONVNEXT_KERNELS_X86={int('avx512' in plan.capabilities)}")
    # libtorch needs nothing itself but names the rest: a CUDA PyTorch's brings in libtorch_cuda, which a CPU PyTorch,
    # perhaps the one built with, does not have.
    link_torch = ["-Ltorch/lib", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"]
    python_include = sysconfig.get_path("include")

    out = ["ninja_required_version = 1.5"]
    _rule(out, "cxx", plan.cxx, "$flags -MMD -MF $out.d -c $in -o $out", depfile=True)
    _rule(out, "link", plan.cxx, "-shared $in -o $out $flags")
    if CUDA_LIBRARY in plan.outputs:
        _rule(out, "nvcc", [str(plan.toolkit.nvcc)], "$flags -MMD -MF $out.d -c $in -o $out", depfile=True)

    objects = []
    for source in [csrc / "operators.cpp", *sorted(csrc.glob("*/cpu.cpp"))]:
        objects.append(_compile(out, "cxx", csrc, source, operator_flags))
    for source in sorted(csrc.glob("*/cpu_kernels.cpp")):
        for capability, flags in plan.capabilities.items():
            flags = [*operator_flags, *KERNEL_FLAGS, f"-DCPU_CAPABILITY={capability}", *flags]
            objects.append(_compile(out, "cxx", csrc, source, flags, "." + capability))
    _build(out, CPU_LIBRARY, "link", objects, [*link_torch, "-Wl,-z,defs"])  # what is missing, is missing now

    if CUDA_LIBRARY in plan.outputs:
        host_flags = ["-Xcompiler=-fPIC,-fvisibility=hidden", f"-Xcompiler={relative_quoted}"]
        flags = ["-std=c++20", "-O3", "-lineinfo", "-DUSE_CUDA", *stable_abi, "-isystem=torch/include", *host_flags]
        flags.append("--expt-relaxed-constexpr")  # plan.h is plain C++, and kernels take their tile sizes from it
        flags += [f"-I{folder}" for folder in plan.toolkit.includes]
        # Device code an eighth of the size. The drivers of CUDA 12 read the older compression only, up to 12.3.
        flags.append("--compress-mode=size" if plan.toolkit.version >= (13, 0) else "-Xfatbin=-compress-all")
        for architecture in plan.architectures:
            flags += architecture.nvcc_flags
        objects = [_compile(out, "nvcc", csrc, source, flags) for source in plan.cuda_sources]
        # Its own CUDA runtime, hidden: no call may be bound to another runtime that PyTorch has loaded.
        cudart = [str(plan.toolkit.cudart), "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        _build(out, CUDA_LIBRARY, "link", objects, [*cudart, *link_torch])

    flags = [*cxx_flags, f"-I{csrc}", f"-I{plan.folder}", f"-isystem{_pybind11_include(plan.torch)}"]
    flags.append(f"-isystem{python_include}")
    _build(out, BINDINGS, "link", [_compile(out, "cxx", csrc, csrc / "bindings.cpp", flags)], [])
    return "\n".join(out) + "\n"


def _rule(out, name, command, arguments, depfile=False):
    out.append(f"rule {name}\n  command = {_shell(command)} {arguments}")
    out.append(f"  description = {name} $out")
    if depfile:
        out.append("  depfile = $out.d\n  deps = gcc")


def _compile(out, rule, csrc, source, flags, tag=""):
    target = source.relative_to(csrc).as_posix().replace("/", "_") + tag + ".o"
    _build(out, target, rule, [source], flags)
    return target


def _build(out, target, rule, inputs, flags):
    out.append(f"build {_path(target)}: {rule} {' '.join(map(_path, inputs))}\n  flags = {_shell(flags)}")


def _shell(words):
    return shlex.join(map(str, words)).replace("$", "$$")


def _path(path):
    return re.sub(r"([$: ])", r"$\1", str(path))


def _write_if_changed(path, text):
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
