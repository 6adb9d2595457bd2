"""The command line: ``convnext-kernels info | verify | bench | tune``, or ``python -m convnext_kernels``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

# Importing the package loads the compiled libraries, or ends with one line where there are none.
from . import __version__, native
from .cli import bench, info, tune, verify


def parser() -> argparse.ArgumentParser:
    """The command line's parser; ``python -m convnext_kernels`` and the console script share it."""
    top = argparse.ArgumentParser(
        prog="convnext-kernels",
        description="Fused ConvNeXt blocks for PyTorch: what runs here, whether it is right, and how fast it is.",
    )
    top.add_argument("--version", action="version", version=f"convnext-kernels {__version__}")
    commands = top.add_subparsers(title="commands", metavar="{info,verify,bench,tune}", required=True)
    for command in (info, verify, bench, tune):
        command.add_parser(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 for a failed check, 2 for bad usage, 130 when interrupted."""
    options = parser().parse_args(arguments)
    bindings = native.status().bindings
    try:
        if bindings is not None:
            bindings.cpu_capability()
    except RuntimeError as error:  # CONVNEXT_KERNELS_CPU_CAPABILITY names what is not there
        print(f"convnext-kernels: {error}", file=sys.stderr)
        return 2
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit has somewhere to go
        return 0
    except KeyboardInterrupt:
        print("convnext-kernels: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
