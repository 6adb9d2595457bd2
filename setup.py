"""The compiled part of the package. Metadata is in pyproject.toml, the build itself in build_tools/."""

import functools
import os
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

from build_tools import ninja_build
from build_tools.toolchain import ToolchainError

ROOT = Path(__file__).resolve().parent


class Build(build):
    def run(self):
        # setuptools would pack modules that an earlier build left here and that have since been removed.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildLibraries(build_ext):
    """Builds all libraries of the package at once, by ninja; the one Extension below marks the wheel as compiled."""

    @functools.cached_property
    def plan(self):
        try:
            return ninja_build.make_plan(ROOT)
        except ToolchainError as error:
            raise CompileError(str(error)) from error

    def run(self):
        try:
            built = ninja_build.build(self.plan, self.distribution.get_version())
        except ToolchainError as error:
            raise CompileError(str(error)) from error
        package = ROOT / "convnext_kernels" if self.inplace else Path(self.build_lib) / "convnext_kernels"
        package.mkdir(parents=True, exist_ok=True)
        if ninja_build.CUDA_LIBRARY not in self.plan.outputs:
            (package / ninja_build.CUDA_LIBRARY).unlink(missing_ok=True)  # of an earlier build
        for name in self.plan.outputs:
            # Replaced, not overwritten: a running process may have the old file mapped.
            shutil.copy2(built / name, package / f".{name}.new")
            os.replace(package / f".{name}.new", package / name)

    def get_outputs(self):
        return [f"{self.build_lib}/convnext_kernels/{name}" for name in self.plan.outputs]

    def get_output_mapping(self):
        if not self.inplace:
            return {}
        return {output: f"convnext_kernels/{Path(output).name}" for output in self.get_outputs()}

    def get_source_files(self):
        return []  # MANIFEST.in lists them


class SourceDistribution(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        Path(base_dir, "COMMIT").write_text(ninja_build.commit(ROOT) + "\n")


setup(
    ext_modules=[Extension("convnext_kernels._C", sources=[])],
    cmdclass={"build": Build, "build_ext": BuildLibraries, "sdist": SourceDistribution},
)
