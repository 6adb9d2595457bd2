"""Builds the CUDA entries (csrc/*/cuda*.cu) with a C++ compiler into a library that runs their operators on CPU tensors
(tests/cuda_on_host/entries.cpp), and runs tests with it in a process of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import cuda_programs
from build_tools.ninja_build import CPU_LIBRARY, TORCH_TARGET_VERSION
from cuda_programs import FLAGS, FOLDER, KERNELS, ROOT, VARIANTS, digest, write_edited

SOURCES = sorted(KERNELS.glob("*/cuda*.cu"))
TORCH = Path(torch.__file__).parent
# engine.cpp first: its globals are constructed before entries.cpp sets them.
HOST_SOURCES = [FOLDER / "engine.cpp", FOLDER / "race_hooks.cpp", FOLDER / "entries.cpp", KERNELS / "operators.cpp"]
LIBRARY_FLAGS = ["-fPIC", "-fvisibility=hidden", "-DUSE_CUDA", "-DTORCH_STABLE_ONLY"]
LIBRARY_FLAGS += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]


def registered_operators():
    """The operators that the CUDA sources register."""
    return {name for source in SOURCES for name in re.findall(r'm\.impl\("(\w+)"', source.read_text())}


class Entries(cuda_programs.Programs):
    """`folder(variant)`: where the library is. It is compiled in the background, once for each content."""

    def start_library(self, variant, edits=()):
        """`edits`: (file below csrc, old text, new text) applied to a copy."""
        key = ("entries", variant, tuple(edits))
        if key not in self.jobs:
            headers = [*FOLDER.glob("*.h"), *KERNELS.rglob("*.cuh"), *KERNELS.rglob("*.h")]
            headers = sorted(header for header in headers if not header.name.startswith("cpu_"))
            sources = [*HOST_SOURCES, *SOURCES]
            objects = [self.pool.submit(self._object, source, variant, headers, edits) for source in sources]
            self.jobs[key] = self.pool.submit(self._library, variant, [*sources, *headers], objects, edits)
        return key

    def folder(self, variant, edits=()):
        return self.jobs[self.start_library(variant, edits)].result()

    def _key(self, variant, edits):
        changes = [text for edit in edits for text in edit]
        flags = [*FLAGS, *VARIANTS[variant], *LIBRARY_FLAGS]
        return flags, [*flags, torch.__version__, *changes], f"{variant}-{digest(changes)[:8]}"

    def _object(self, source, variant, headers, edits):
        place = source.relative_to(ROOT)
        # Only entries are edited: the other objects are those of the sources as they are.
        edits = [edit for edit in edits if KERNELS / edit[0] == source]
        flags, key, edition = self._key(variant, edits)
        target = self._target(f"entry-{'-'.join(place.with_suffix('').parts)}-{edition}", [source, *headers], key)
        if not target.is_dir():
            work = self._work_folder(target)
            write_edited(work / "csrc", edits)
            include = [f"-I{KERNELS}", f"-I{FOLDER}", "-isystem", TORCH / "include", "-isystem", self.headers]
            text = work / place if edits else source
            self._run([*flags, *include, "-x", "c++", "-c", text, "-o", work / "object.o"])
            self._publish(work, target)
        return target / "object.o"

    def _library(self, variant, inputs, objects, edits):
        objects = [job.result() for job in objects]
        _, key, edition = self._key(variant, edits)
        target = self._target(f"entries-{edition}", inputs, key)
        if not target.is_dir():
            work = self._work_folder(target)
            # What entries.cpp defines of PyTorch's names stays in the library, and the library uses it.
            (work / "names").write_text("{ local: *; };\n")
            torch_libraries = [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-ldl"]
            command = [*VARIANTS[variant], "-shared", *objects, f"-Wl,--version-script={work / 'names'}"]
            self._run([*command, *torch_libraries, "-o", work / CPU_LIBRARY])
            self._publish(work, target)
        return target

    def _sanitizer(self):
        """AddressSanitizer has to be a process's first library, and finds what it replaces in those loaded with it."""
        paths = []
        for name in ("libasan.so", "libstdc++.so.6"):
            command = [self.compiler, f"-print-file-name={name}"]
            paths.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        return ":".join(paths)

    def _environment(self, variant, edits, **settings):
        environment = {**os.environ, "CONVNEXT_KERNELS_LIBRARY_DIR": str(self.folder(variant, edits))}
        # Small tensors: PyTorch's threads would only wait for each other.
        environment |= {"OMP_NUM_THREADS": "1"}
        environment |= {f"CUDA_ON_HOST_{name.upper()}": str(value) for name, value in settings.items()}
        for name in ("CONVNEXT_KERNELS_BACKEND", "PYTEST_ADDOPTS"):
            environment.pop(name, None)
        return environment

    def run_pytest(self, variant, launches, *arguments, edits=(), **settings):
        """Runs pytest with the library. `launches`: a file for what was launched; `settings`: see entries.cpp.

        Returns the finished process.
        """
        environment = self._environment(variant, edits, launches=launches, **settings)
        if variant == "asan":
            environment |= {"LD_PRELOAD": self._sanitizer(), "ASAN_OPTIONS": "detect_leaks=0"}
        # Uncaptured: what AddressSanitizer says before it ends the process would be lost.
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "not gpu", "-p", "no:cacheprovider"]
        command += map(str, arguments)
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    def driver(self):
        """What stands in for CUDA's driver (tests/cuda_on_host/driver.cpp)."""
        source = FOLDER / "driver.cpp"
        target = self._target("driver", [source], [])
        if not target.is_dir():
            work = self._work_folder(target)
            name = "libcuda.so.1"
            self._run([*FLAGS, "-O1", "-fPIC", "-shared", f"-Wl,-soname,{name}", source, "-o", work / name])
            self._publish(work, target)
        return target / "libcuda.so.1"

    def rehearse(self, arguments, launches, edits=(), folders=()):
        """Runs python with tests/gpu_rehearsal.py, the library, and a chip of as many multiprocessors as an H100.

        `launches`: a file for the operators that ran and their backends; `folders`: where more modules are.
        Returns the finished process.
        """
        environment = self._environment("plain", edits, multiprocessors=132)
        environment |= {"LD_PRELOAD": str(self.driver()), "GPU_REHEARSAL_LAUNCHES": str(launches)}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, [*folders, ROOT, ROOT / "tests"]))
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
