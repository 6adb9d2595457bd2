"""The build: what it decides, and what it says where it cannot."""

import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from build_tools import ninja_build, toolchain  # noqa: E402
from build_tools.toolchain import ToolchainError  # noqa: E402

sys.path.remove(str(ROOT))

WHEELS = set(toolchain.COMPILER_WHEELS)


# --- environment variables


@pytest.mark.parametrize(("value", "setting"), [(None, None), ("", None), ("1", True), ("0", False), (" 1 ", True)])
def test_cuda_setting(value, setting):
    assert toolchain.cuda_setting({} if value is None else {"CONVNEXT_KERNELS_CUDA": value}) is setting


@pytest.mark.parametrize("value", ["2", "yes", "ON", "-1", "13.0"])
def test_cuda_setting_refuses_other_values(value):
    with pytest.raises(ToolchainError, match=f"CONVNEXT_KERNELS_CUDA: expected 1, 0 or nothing, got '{value}'"):
        toolchain.cuda_setting({"CONVNEXT_KERNELS_CUDA": value})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9.0", ["sm_90"]),
        ("8.0;9.0a+PTX", ["sm_80", "sm_90a+PTX"]),
        ("8.0 8.6  12.0+PTX", ["sm_80", "sm_86", "sm_120+PTX"]),
        ("8.0, 10.0f;", ["sm_80", "sm_100f"]),
        ("9.0;9.0+PTX;9.0", ["sm_90+PTX"]),
        ("10.3a", ["sm_103a"]),
    ],
)
def test_architecture_lists(text, expected):
    assert [str(architecture) for architecture in toolchain.parse_architectures(text)] == expected


@pytest.mark.parametrize("text", ["Hopper", "9", "90", "sm_90", "9.0b", "9.0+ptx", "9.0 + PTX", "8.0;;x", "-9.0"])
def test_bad_architecture_lists_name_the_item(text):
    with pytest.raises(ToolchainError, match="TORCH_CUDA_ARCH_LIST: expected compute capabilities such as"):
        toolchain.parse_architectures(text)


def test_nvcc_flags_of_an_architecture():
    (plain, with_ptx) = toolchain.parse_architectures("8.0;9.0a+PTX")
    assert plain.nvcc_flags == ["-gencode=arch=compute_80,code=sm_80"]
    assert with_ptx.nvcc_flags == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@pytest.mark.parametrize(
    ("asked", "gpus", "supported", "expected"),
    [
        ("8.6+PTX", ["9.0"], None, ["sm_86+PTX"]),
        ("7.5 8.0", [], None, ["sm_80"]),
        ("", ["8.9", "9.0"], None, ["sm_89", "sm_90"]),
        ("", ["7.5", "9.0"], None, ["sm_90"]),
        ("", ["7.5"], None, ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120+PTX"]),
        ("", [], None, ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120+PTX"]),
        ("", [], {"80", "86", "89", "90"}, ["sm_80", "sm_86", "sm_89", "sm_90+PTX"]),
        ("12.0", ["9.0"], {"80", "90"}, ["sm_120"]),  # what was asked for is nvcc's to refuse
        ("", ["10.3"], {"90", "100", "100a", "100f", "120"}, ["sm_100"]),
        ("", ["10.0", "10.3"], {"100"}, ["sm_100"]),
        ("", ["12.0"], {"75", "80", "90", "90a"}, ["sm_90+PTX"]),
        ("", ["9.0", "12.0"], {"80", "90"}, ["sm_90+PTX"]),
        ("", ["8.0", "9.0"], {"75", "90", "100"}, ["sm_90"]),
        ("", ["8.0"], {"75", "86", "90", "100"}, ["sm_86", "sm_90", "sm_100+PTX"]),
    ],
)
def test_choice_of_architectures(monkeypatch, asked, gpus, supported, expected):
    monkeypatch.setattr(toolchain, "gpus_present", lambda: gpus)
    chosen, why = toolchain.choose_architectures({"TORCH_CUDA_ARCH_LIST": asked}, supported)
    assert [str(architecture) for architecture in chosen] == expected
    assert why


@pytest.mark.parametrize(
    ("gpus", "why"),
    [
        (["9.0"], "the GPUs present"),
        (["10.3"], "the GPUs present; nvcc does not know sm_103: sm_100, whose code it runs"),
        (
            ["12.0"],
            "the GPUs present; nvcc does not know sm_120: sm_100, whose PTX the driver compiles for it at first use",
        ),
    ],
)
def test_what_stands_in_for_an_unknown_architecture_is_said(monkeypatch, gpus, why):
    monkeypatch.setattr(toolchain, "gpus_present", lambda: gpus)
    assert toolchain.choose_architectures({}, {"90", "90a", "100"})[1] == why


def test_only_too_old_architectures_is_an_error():
    with pytest.raises(ToolchainError, match=r"at least one architecture from 8.0 on, got '7.0;7.5'"):
        toolchain.choose_architectures({"TORCH_CUDA_ARCH_LIST": "7.0;7.5"})


def test_gpus_come_from_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.gpus_present() == []
    _script(tmp_path / "nvidia-smi", "echo 9.0; echo 8.9; echo 9.0; echo '[N/A]'")
    assert toolchain.gpus_present() == ["8.9", "9.0"]
    _script(tmp_path / "nvidia-smi", "echo No devices were found; exit 6")
    assert toolchain.gpus_present() == []


# --- the toolkit


def _script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def _fake_toolkit(
    root,
    version=(13, 0),
    lib="lib64",
    pieces=("cuda_runtime.h", "libcudart_static.a", "cicc"),
    knows=("75", "80", "90", "100", "120"),
):
    """A toolkit whose nvcc answers as NVIDIA's does: --dryrun with paths relative to where it really lies."""
    for piece, folder in {"cuda_runtime.h": "include", "libcudart_static.a": lib, "cicc": "nvvm/bin"}.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        if piece in pieces:
            (root / folder / piece).touch()
    lines = [
        "#$ _HERE_=$here",
        "#$ TOP=$here/..",
        "#$ CICC_PATH=$here/../nvvm/bin",
        '#$ INCLUDES=\\"-I$here/../include\\"  ',
        '#$ LIBRARIES=  \\"-L$here/../lib64/stubs\\"',
        f"#$ gcc -E -D__CUDACC_VER_MAJOR__={version[0]} -D__CUDACC_VER_MINOR__={version[1]} -x c++",
    ]
    listed = f"[ \"$1\" = --list-gpu-arch ] && exec printf 'compute_%s\\n' {' '.join(knows)}\n"
    body = (
        listed
        + 'here=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)\n'
        + "\n".join(f'echo "{line}" >&2' for line in lines)
    )
    return _script(root / "bin" / "nvcc", body)


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """No GPU, and no toolkit but those a test makes."""
    monkeypatch.setattr(toolchain, "USUAL_NVCC", tmp_path / "usual" / "bin" / "nvcc")
    monkeypatch.setattr(toolchain, "gpus_present", list)
    for variable in ("CUDA_HOME", "CUDA_PATH", "CONVNEXT_KERNELS_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    return {"PATH": "/usr/bin:/bin"}


@pytest.mark.parametrize("lib", ["lib64", "lib"])
def test_toolkit_of_cuda_home(bare_machine, tmp_path, lib):
    nvcc = _fake_toolkit(tmp_path / "cuda", lib=lib)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        toolkit, rejected = toolchain.find_toolkit({variable: str(tmp_path / "cuda"), **bare_machine}, [])
        assert (toolkit.nvcc, toolkit.version, toolkit.found_in, rejected) == (nvcc, (13, 0), variable, [])
        assert toolkit.cudart == tmp_path / "cuda" / lib / "libcudart_static.a"
        assert toolkit.includes == ()


@pytest.mark.parametrize("kind", ["wrapper script", "symbolic link"])
def test_toolkit_behind_an_nvcc_on_path(bare_machine, tmp_path, kind):
    real = _fake_toolkit(tmp_path / "far" / "away")
    front = tmp_path / "bin" / "nvcc"
    if kind == "wrapper script":
        _script(front, f'exec {real} "$@"')
    else:
        front.parent.mkdir()
        front.symlink_to(real)
    toolkit, _ = toolchain.find_toolkit({"PATH": f"{front.parent}:{bare_machine['PATH']}"}, [])
    assert toolkit.nvcc == front
    assert toolkit.found_in == "PATH"
    assert toolkit.cudart == tmp_path / "far" / "away" / "lib64" / "libcudart_static.a"


def test_toolkit_in_the_usual_place(bare_machine, tmp_path):
    _fake_toolkit(tmp_path / "usual")
    assert toolchain.find_toolkit(bare_machine, [])[0].nvcc == toolchain.USUAL_NVCC


def test_toolkit_of_the_compiler_wheels(bare_machine, tmp_path):
    nvcc = _fake_toolkit(tmp_path / "site" / "nvidia" / "cu13", lib="lib")
    toolkit, _ = toolchain.find_toolkit(bare_machine, [str(tmp_path / "none"), str(tmp_path / "site")])
    assert toolkit.nvcc == nvcc
    assert toolkit.found_in == "NVIDIA's compiler wheels"


def test_compiler_wheels_in_two_site_packages(bare_machine, tmp_path):
    """pip's isolated build: PyTorch's runtime headers in one folder, the compiler asked for later in another."""
    first, second = tmp_path / "overlay" / "nvidia" / "cu13", tmp_path / "normal" / "nvidia" / "cu13"
    for folder, name in (("include", "cuda_runtime.h"), ("include/cccl", "version"), ("lib", "libcudart_static.a")):
        (first / folder).mkdir(parents=True, exist_ok=True)
        (first / folder / name).touch()
    _fake_toolkit(second, pieces=("cicc",))
    toolkit, _ = toolchain.find_toolkit(bare_machine, [str(tmp_path / "overlay"), str(tmp_path / "normal")])
    assert toolkit.nvcc == second / "bin" / "nvcc"
    assert toolkit.includes == (first / "include", first / "include" / "cccl")
    assert toolkit.cudart == first / "lib" / "libcudart_static.a"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pieces": ("libcudart_static.a", "cicc")}, "has no cuda_runtime.h in"),
        ({"pieces": ("cuda_runtime.h", "cicc")}, "has no libcudart_static.a in"),
        ({"pieces": ("cuda_runtime.h", "libcudart_static.a")}, "has no cicc in"),
        ({"version": (11, 8)}, "is CUDA 11.8, older than 12.0"),
    ],
)
def test_unusable_toolkits_are_named_and_passed_over(bare_machine, tmp_path, options, reason):
    broken = _fake_toolkit(tmp_path / "broken", **options)
    good = _fake_toolkit(tmp_path / "good")
    environ = {"CUDA_HOME": str(tmp_path / "broken"), "PATH": f"{good.parent}:{bare_machine['PATH']}"}
    toolkit, (rejected,) = toolchain.find_toolkit(environ, [])
    assert toolkit.nvcc == good
    assert rejected.startswith(f"CUDA_HOME: {broken} {reason}")


def test_nvcc_that_fails_or_does_not_exist(bare_machine, tmp_path):
    _script(tmp_path / "nvcc", "echo it is broken >&2; exit 3")
    environ = {"CUDA_HOME": str(tmp_path / "nowhere"), "PATH": f"{tmp_path}:{bare_machine['PATH']}"}
    toolkit, rejected = toolchain.find_toolkit(environ, [])
    assert toolkit is None
    assert rejected == [
        f"CUDA_HOME: {tmp_path}/nowhere/bin/nvcc does not exist",
        f"PATH: {tmp_path}/nvcc --dryrun failed: it is broken",
    ]


def test_a_toolkit_that_does_not_know_the_gpu_is_passed_over(bare_machine, monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "gpus_present", lambda: ["7.5", "9.0", "12.0"])
    old = _fake_toolkit(tmp_path / "usual", version=(12, 4), knows=("80", "90", "90a"))
    new = _fake_toolkit(tmp_path / "site" / "nvidia" / "cu13", lib="lib")
    toolkit, rejected = toolchain.find_toolkit(bare_machine, [str(tmp_path / "site")])
    assert toolkit.nvcc == new
    assert rejected == [f"{tmp_path / 'usual'}: {old} is CUDA 12.4, which does not know sm_120"]
    assert toolchain.compiler_requirements(bare_machine, [str(tmp_path / "site")]) == []
    # What the environment names is taken as it is.
    for named in ({"CUDA_HOME": str(tmp_path / "usual")}, {"TORCH_CUDA_ARCH_LIST": "9.0+PTX"}):
        toolkit, rejected = toolchain.find_toolkit(bare_machine | named, [str(tmp_path / "site")])
        assert (toolkit.nvcc, rejected) == (old, [])
        assert toolchain.compiler_requirements(bare_machine | named, []) == []


# --- what an isolated build asks for


@pytest.mark.skipif(platform.system() != "Linux", reason="the wheels are for Linux")
@pytest.mark.parametrize(("gpu", "wanted"), [("9.0", False), ("9.2", False), ("10.0", True), ("12.0", True)])
def test_an_isolated_build_asks_for_a_compiler_that_knows_the_gpu(bare_machine, monkeypatch, tmp_path, gpu, wanted):
    monkeypatch.setattr(toolchain, "gpus_present", lambda: [gpu])
    _fake_toolkit(tmp_path / "usual", version=(12, 4), knows=("80", "90", "90a"))
    assert bool(toolchain.compiler_requirements(bare_machine, [])) == wanted
    assert toolchain.compiler_requirements({"CONVNEXT_KERNELS_CUDA": "0", **bare_machine}, []) == []


@pytest.mark.skipif(platform.system() != "Linux", reason="the wheels are for Linux")
@pytest.mark.parametrize(
    ("setting", "toolkit", "gpu", "wanted"),
    [
        ("", False, False, False),
        ("", False, True, True),
        ("", True, True, False),
        ("1", False, False, True),
        ("1", True, False, False),
        ("0", False, True, False),
    ],
)
def test_compiler_requirements(bare_machine, monkeypatch, tmp_path, setting, toolkit, gpu, wanted):
    monkeypatch.setattr(toolchain, "gpus_present", lambda: ["9.0"] if gpu else [])
    monkeypatch.setattr(toolchain, "_installed_version", lambda name: None)
    environ = {"CONVNEXT_KERNELS_CUDA": setting, **bare_machine}
    if toolkit:
        _fake_toolkit(tmp_path / "usual")
    requirements = toolchain.compiler_requirements(environ, [])
    assert requirements == ([f"{wheel}==13.0.*" for wheel in toolchain.COMPILER_WHEELS] if wanted else [])


def test_compiler_requirements_agree_with_pytorchs_own(monkeypatch):
    """pip refuses a requirement that contradicts what PyTorch has already brought into the build environment."""
    installed = {"nvidia-cuda-runtime": "13.2.86", "nvidia-cuda-cccl": "13.3.5.0.6"}
    monkeypatch.setattr(toolchain, "_installed_version", installed.get)
    assert toolchain.compiler_wheels() == [
        "nvidia-cuda-nvcc==13.2.*",
        "nvidia-nvvm==13.2.*",
        "nvidia-cuda-crt==13.2.*",
        "nvidia-cuda-cccl",
        "nvidia-cuda-runtime",
    ]


# --- the plan and build.ninja


@pytest.fixture
def source_tree(tmp_path):
    """A checkout of the smallest kind, in a folder whose name needs quoting."""
    root = tmp_path / "a tree $1"
    (root / "csrc" / "room").mkdir(parents=True)
    for name in ("operators.cpp", "bindings.cpp", "room/cpu.cpp", "room/cpu_kernels.cpp"):
        (root / "csrc" / name).write_text("\n")
    return root


def test_missing_toolkit_is_an_error_where_cuda_is_required(bare_machine, source_tree):
    with pytest.raises(ToolchainError) as caught:
        ninja_build.make_plan(source_tree, {"CONVNEXT_KERNELS_CUDA": "1", **bare_machine}, search_path=[])
    message = str(caught.value)
    assert message.startswith("CONVNEXT_KERNELS_CUDA=1, but no CUDA toolkit found")
    assert all(wheel in message for wheel in WHEELS)


@pytest.mark.parametrize(("setting", "words"), [("", "not built (no CUDA toolkit found"), ("0", "skipped")])
def test_plan_without_cuda(bare_machine, source_tree, setting, words):
    (source_tree / "csrc" / "room" / "cuda.cu").touch()
    plan = ninja_build.make_plan(source_tree, {"CONVNEXT_KERNELS_CUDA": setting, **bare_machine}, search_path=[])
    assert plan.outputs == [ninja_build.CPU_LIBRARY, ninja_build.BINDINGS]
    assert words in plan.announcement
    assert "nvcc" not in ninja_build.ninja_file(plan)


@pytest.mark.parametrize(("cuda", "noted"), [("'12.8'", True), ("'13.2'", False), ("None", False)])
def test_plan_notes_a_toolkit_that_is_newer_than_pytorchs_cuda(
    bare_machine, source_tree, tmp_path, monkeypatch, cuda, noted
):
    """The package installed there may have a driver for PyTorch, and none for the kernels."""
    _fake_toolkit(tmp_path / "cuda")  # 13.0
    torch = tmp_path / "site" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text(f"__version__ = '2.12.0'\ncuda: Optional[str] = {cuda}\n")
    monkeypatch.setattr(sys, "path", [str(torch.parent), *sys.path])
    monkeypatch.delitem(sys.modules, "torch")
    environ = {"CUDA_HOME": str(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": "9.0", **bare_machine}
    plan = ninja_build.make_plan(source_tree, environ, search_path=[])
    assert plan.torch_version == "2.12.0"
    note = "note: PyTorch is for CUDA 12.8. These kernels need a driver for CUDA 13"
    assert (note in plan.announcement) == noted


def test_plan_with_cuda(bare_machine, source_tree, tmp_path):
    nvcc = _fake_toolkit(tmp_path / "cuda")
    environ = {"CUDA_HOME": str(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": "9.0", **bare_machine}
    plan = ninja_build.make_plan(source_tree, environ, search_path=[])
    assert ninja_build.CUDA_LIBRARY not in plan.outputs  # there is no .cu file yet
    (source_tree / "csrc" / "room" / "cuda.cu").touch()
    plan = ninja_build.make_plan(source_tree, environ, search_path=[])
    assert plan.outputs == [ninja_build.CPU_LIBRARY, ninja_build.CUDA_LIBRARY, ninja_build.BINDINGS]
    assert f"CUDA: 13.0, {nvcc} (found in CUDA_HOME)" in plan.announcement
    assert "for sm_90 (TORCH_CUDA_ARCH_LIST)" in plan.announcement
    facts = ninja_build.facts_header(plan, "1.2.3")
    assert 'cuda_version = "13.0"' in facts
    assert 'architectures[] = {"sm_90", nullptr}' in facts


@pytest.mark.parametrize(("version", "flag"), [((12, 8), "-Xfatbin=-compress-all"), ((13, 0), "--compress-mode=size")])
def test_device_code_is_compressed_as_the_toolkits_own_drivers_can_read_it(
    bare_machine, source_tree, tmp_path, version, flag
):
    (source_tree / "csrc" / "room" / "cuda.cu").touch()
    _fake_toolkit(tmp_path / "cuda", version=version)
    plan = ninja_build.make_plan(source_tree, {"CUDA_HOME": str(tmp_path / "cuda"), **bare_machine}, search_path=[])
    words = set(ninja_build.ninja_file(plan).split())
    assert words & {"-Xfatbin=-compress-all", "--compress-mode=size"} == {flag}


def test_a_toolkit_that_is_too_old_for_the_gpu_still_builds(bare_machine, source_tree, monkeypatch, tmp_path):
    """Where it is the only one: the compiler wheels could not be had, or the build is not isolated."""
    monkeypatch.setattr(toolchain, "gpus_present", lambda: ["12.0"])
    nvcc = _fake_toolkit(tmp_path / "usual", version=(12, 4), knows=("80", "90", "90a"))
    (source_tree / "csrc" / "room" / "cuda.cu").touch()
    plan = ninja_build.make_plan(source_tree, bare_machine, search_path=[])
    assert plan.toolkit.nvcc == nvcc
    assert "for sm_90+PTX (the GPUs present; nvcc does not know sm_120: sm_90, whose PTX" in plan.announcement
    assert ninja_build.CUDA_LIBRARY in plan.outputs


def test_kernels_are_compiled_once_for_each_capability(bare_machine, source_tree):
    plan = ninja_build.make_plan(source_tree, {"CONVNEXT_KERNELS_CUDA": "0", **bare_machine})
    for capabilities, x86 in ((ninja_build.X86_CAPABILITIES, 1), ({"portable": []}, 0)):
        plan.capabilities = capabilities
        text = ninja_build.ninja_file(plan)
        assert text.count("build room_cpu_kernels.cpp.") == len(capabilities)
        assert text.count("build room_cpu.cpp.o:") == 1
        assert all(f"-DCPU_CAPABILITY={name}" in text for name in capabilities)
        assert f"-DCONVNEXT_KERNELS_X86={x86}" in text


def test_a_build_compiles_once_and_shows_compiler_errors(bare_machine, source_tree, tmp_path, capfd, monkeypatch):
    for unneeded in ("bindings.cpp", "room/cpu.cpp", "room/cpu_kernels.cpp"):
        (source_tree / "csrc" / unneeded).write_text("// nothing\n")
    plan = ninja_build.make_plan(source_tree, {"CONVNEXT_KERNELS_CUDA": "0", **bare_machine})
    folder = ninja_build.build(plan, "1.2.3")
    assert all((folder / name).is_file() for name in plan.outputs)
    said = capfd.readouterr().out
    assert "CUDA: skipped (CONVNEXT_KERNELS_CUDA=0)" in said

    ninja_build.build(plan, "1.2.3")
    assert "no work to do" in capfd.readouterr().out

    (tmp_path / "isolated").symlink_to(plan.torch)  # the next isolated build finds PyTorch elsewhere
    plan.torch = tmp_path / "isolated"
    ninja_build.build(plan, "1.2.3")
    assert "no work to do" in capfd.readouterr().out

    (source_tree / "csrc" / "operators.cpp").write_text("int broken = missing_name;\n")
    with pytest.raises(ToolchainError, match="compilation failed"):
        ninja_build.build(plan, "1.2.3")
    assert "missing_name" in capfd.readouterr().out

    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(ToolchainError, match="MAX_JOBS: expected a positive integer, got 'many'"):
        ninja_build.build(plan, "1.2.3")


def test_missing_compiler_is_named(bare_machine, source_tree):
    with pytest.raises(ToolchainError, match="no C\\+\\+ compiler: /nowhere/g\\+\\+ does not run"):
        ninja_build.make_plan(source_tree, {"CXX": "/nowhere/g++", **bare_machine})


def test_commit(source_tree):
    assert ninja_build.commit(source_tree) == "unknown"
    (source_tree / "COMMIT").write_text("0123456789ab\n")
    assert ninja_build.commit(source_tree) == "0123456789ab"


def test_source_digest_follows_the_sources(source_tree):
    before = ninja_build.source_digest(source_tree)
    (source_tree / "csrc" / "room" / "notes.txt").write_text("no source")
    assert ninja_build.source_digest(source_tree) == before
    (source_tree / "csrc" / "room" / "plan.h").write_text("// more\n")
    assert ninja_build.source_digest(source_tree) != before


def test_source_distribution_is_complete(tmp_path):
    tree = tmp_path / "tree"
    unneeded = shutil.ignore_patterns(
        ".git", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache", "results"
    )
    shutil.copytree(ROOT, tree, ignore=unneeded)
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check"]
    run = subprocess.run([*command, "--outdir", str(tmp_path), str(tree)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as contents:
        packed = {str(Path(name).relative_to(Path(name).parts[0])) for name in contents.getnames()}
    needed = {"README.md", "LICENSE", "pyproject.toml", "setup.py", ".clang-format", ".ci/run", "COMMIT"}
    for folder in ("csrc", "build_tools", "convnext_kernels", "tests", "benchmarks"):
        needed |= {str(path.relative_to(tree)) for path in (tree / folder).rglob("*") if path.is_file()}
    needed = {name for name in needed if "__pycache__" not in name}
    assert needed <= packed, sorted(needed - packed)
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]
