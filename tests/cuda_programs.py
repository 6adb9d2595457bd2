"""Builds the programs that execute CUDA kernels on the CPU (tests/cuda_on_host/). They need the CUDA toolkit's headers,
no compiler of NVIDIA's and no GPU.

A program is built in up to three variants, once for each content of its sources:

    plain   optimised: many shapes
    asan    AddressSanitizer and UndefinedBehaviorSanitizer: bounds and arithmetic
    race    instrumented memory accesses with our own runtime behind them: races, whatever the schedule
"""

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "cuda_on_host"
KERNELS = ROOT / "csrc"

FLAGS = ["-std=c++20", "-g1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas"]
VARIANTS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "race": ["-O1", "-DEMU_RACE_HOOKS"],
}
# For the file with the kernels only: the engine's own accesses are not theirs.
INSTRUMENTED = {"race": ["-fsanitize=thread"]}
HEADERS = ("cuda_fp16.h", "cuda_bf16.h", "driver_types.h", "vector_types.h", "crt/host_defines.h")


def find_headers():
    """The folder with the toolkit's headers, or None."""
    folders = []
    if os.environ.get("CUDA_HOME"):
        folders.append(Path(os.environ["CUDA_HOME"], "include"))
    from build_tools import toolchain

    toolkit, _ = toolchain.find_toolkit()
    if toolkit:
        folders += [*toolkit.includes, toolkit.cudart.parent.parent / "include"]
    for entry in sys.path:
        folders += sorted(Path(entry or ".").glob("nvidia/cu*/include"))
    return next((folder for folder in folders if all((folder / name).is_file() for name in HEADERS)), None)


class Programs:
    """Compiles in the background, at most one job a processor; `path` waits."""

    def __init__(self, cache, headers):
        self.compiler = shutil.which("g++")
        self.cache = Path(cache)
        self.headers = headers
        self.pool = ThreadPoolExecutor(os.cpu_count() or 1)
        self.jobs = {}
        version = subprocess.run([self.compiler, "--version"], capture_output=True, text=True, check=True).stdout
        self.salt = [version, str(headers), _processor(), Path(__file__).read_text()]

    def start(self, name, variant, edits=(), flags=()):
        """Begins to build `name`_cases.cpp. `edits`: (file below csrc, old text, new text) applied to a copy."""
        key = (name, variant, tuple(edits), tuple(flags))
        if key not in self.jobs:
            engine = self._submit_engine(variant)
            self.jobs[key] = self.pool.submit(self._build, name, variant, edits, flags, engine)
        return key

    def path(self, name, variant, edits=(), flags=()):
        return self.jobs[self.start(name, variant, edits, flags)].result()

    def close(self):
        self.pool.shutdown(cancel_futures=True)

    def _submit_engine(self, variant):
        # Submitted before every program that needs it: the pool runs jobs in order, so waiting for it cannot block.
        if variant not in self.jobs:
            self.jobs[variant] = self.pool.submit(self._build_engine, variant)
        return self.jobs[variant]

    def _build_engine(self, variant):
        sources = [FOLDER / "engine.cpp", FOLDER / "race_hooks.cpp"]
        inputs = [*sources, *sorted(FOLDER.glob("*.h"))]
        target = self._target(f"engine-{variant}", inputs, VARIANTS[variant])
        objects = [target / f"{source.stem}.o" for source in sources]
        if not target.is_dir():
            work = self._work_folder(target)
            for source, compiled in zip(sources, objects):
                include = ["-isystem", str(self.headers), f"-I{FOLDER}"]
                self._run([*FLAGS, *VARIANTS[variant], *include, "-c", source, "-o", work / compiled.name])
            self._publish(work, target)
        return objects

    def _build(self, name, variant, edits, flags, engine):
        source = FOLDER / f"{name}_cases.cpp"
        inputs = [
            source,
            *sorted(FOLDER.glob("*.h")),
            *sorted(KERNELS.rglob("*.cuh")),
            *sorted(KERNELS.rglob("*_plan.h")),
            KERNELS / "common" / "chip.h",
        ]
        changes = [*flags, *(text for edit in edits for text in edit)]
        edition = digest(changes)[:8]
        target = self._target(f"{name}-{variant}-{edition}", inputs, [*VARIANTS[variant], *changes])
        program = target / name
        if not program.is_file():
            objects = engine.result()
            work = self._work_folder(target)
            edited = work / "csrc"
            write_edited(edited, edits)
            include = [f"-I{edited}"] if edits else []
            include += ["-isystem", str(self.headers), f"-I{KERNELS}", f"-I{FOLDER}"]
            instrumented = INSTRUMENTED.get(variant, [])
            compiled = work / f"{name}.o"
            self._run([*FLAGS, *VARIANTS[variant], *instrumented, *flags, *include, "-c", source, "-o", compiled])
            self._run([*VARIANTS[variant], compiled, *objects, "-o", work / name, "-ldl"])
            self._publish(work, target)
        return program

    def _target(self, name, inputs, extra):
        sources = [f"{path.name}\0{path.read_text()}" for path in inputs]
        return self.cache / f"{name}-{digest([*self.salt, *FLAGS, *extra, *sources])}"

    def _work_folder(self, target):
        work = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        return work

    def _publish(self, work, target):
        # Whole or not at all: another session may build the same at the same time.
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(work)
        # What this one takes the place of.
        for old in self.cache.glob(f"{target.name.rpartition('-')[0]}-*"):
            if old != target and "." not in old.name:
                shutil.rmtree(old, ignore_errors=True)

    def _run(self, arguments):
        command = [self.compiler, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def write_edited(folder, edits):
    """Writes the changed files of csrc into `folder`."""
    for file, old, new in edits:
        text = (folder / file if (folder / file).exists() else KERNELS / file).read_text()
        assert text.count(old) == 1, f"{file} should hold this text once, not {text.count(old)} times: {old!r}"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text.replace(old, new))


def digest(texts):
    state = hashlib.sha256()
    for text in texts:
        state.update(text.encode() + b"\0")
    return state.hexdigest()[:20]


def _processor():
    """What -march=native means here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def provide(request, wanted, builder=Programs):
    """What a file's `programs` fixture yields: the builder, with the (name, variant, ...) of `wanted` on their way.

    One test alone waits for the programs it needs; for a whole file all are built side by side.
    """
    if not shutil.which("g++"):
        pytest.skip("g++ is needed to build the programs")
    headers = find_headers()
    if not headers:
        pytest.skip("the CUDA toolkit's headers are needed: none in CUDA_HOME, beside nvcc, or in site-packages/nvidia")
    programs = builder(request.config.cache.mkdir("cuda_on_host"), headers)
    if sum(item.path == request.path for item in request.session.items) > 50:
        for program in wanted:
            programs.start(*program)
    yield programs
    programs.close()


def run(program, case, **options):
    """The exit status and output of one case. A crash is not a status: it fails here."""
    command = [program, case, *(f"{key}={value}" for key, value in options.items())]
    # Leak checking needs ptrace, which containers often forbid; fibers never unwind anyway.
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode in (0, 1), f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr[:4000]}"
    return done.returncode, done.stdout + done.stderr


def check(program, case, **options):
    status, output = run(program, case, **options)
    assert status == 0, output
