"""The PEP 517/660 build backend: setuptools', plus the CUDA compiler as a build requirement where one is wanted and
none is installed.

An isolated build sees its own requirements only, and these are fixed in pyproject.toml before anything is known of the
machine. The hooks `get_requires_for_build_*` run on the machine and can ask for more.
"""

import setuptools
from setuptools import build_meta as _setuptools
from setuptools.build_meta import (  # noqa: F401  (hooks the frontend calls on this module)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from build_tools import toolchain

if int(setuptools.__version__.split(".")[0]) < 77:
    # Without build isolation nobody checks pyproject.toml's requirements, and the error would be about the licence.
    raise SystemExit(f"setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77.0.3'")


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + _compiler_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + _compiler_requirements()


def _compiler_requirements():
    try:
        return toolchain.compiler_requirements()
    except toolchain.ToolchainError as error:
        raise SystemExit(f"error: {error}") from error  # one line instead of a traceback
