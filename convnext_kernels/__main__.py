"""The command line: ``convnext-kernels info | verify | bench | tune``, or ``python -m convnext_kernels``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

# Importing the package loads the compiled libraries, or ends with one line where there are none.
from . import __version__, backends, native
from .cli import bench, info, tune, verify
from .cli.terminal import CommandError, discard_stdout


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
    """Runs a command and returns its exit code.

    0; 1 for a failed check, memory that ran out or a full disk; 2 for what was asked for and is not there or cannot be
    done; 130 when interrupted.
    """
    options = parser().parse_args(arguments)
    bindings = native.status().bindings
    try:
        if bindings is not None:
            bindings.cpu_capability()
    except RuntimeError as error:  # CONVNEXT_KERNELS_CPU_CAPABILITY names what is not there
        return _failed(error, 2)
    try:
        if sys.stdout is None:  # closed before Python started
            raise CommandError("stdout is closed", 1)
        return options.run(options)
    except CommandError as error:
        return _failed(error, error.code)
    except backends.RefusedError as error:  # CONVNEXT_KERNELS_BACKEND names what cannot run here
        return _failed(error, 2)
    except BrokenPipeError:  # the reader of a pipe, `head` say, has seen enough
        discard_stdout()
        return 0
    except KeyboardInterrupt:
        return _failed("interrupted", 130)


def _failed(reason: object, code: int) -> int:
    print(f"convnext-kernels: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
