"""What the commands share: their output and errors, aligned tables, a progress line, and arguments."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

__all__ = [
    "CommandError",
    "JsonFile",
    "Progress",
    "allocating",
    "check_sizes",
    "count_argument",
    "device_argument",
    "discard_stdout",
    "json_file_argument",
    "lacks_memory",
    "number_argument",
    "show",
    "stage_argument",
    "table",
    "threads_argument",
]

#: More channels, pixels in a row or images than this are a slip of the keyboard.
_MOST = 2**31 - 1


class CommandError(Exception):
    """Ends a command with one line on stderr and an exit code: 2 for what was asked for, 1 for what went wrong."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


# --- output


def show(text: str = "") -> None:
    """Prints to stdout, at once: that it cannot be written is known here, and not when Python ends.

    Raises:
        CommandError: a full disk, say. A pipe without a reader stays a BrokenPipeError.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        raise CommandError(f"stdout cannot be written: {error.strerror}", 1) from error


def discard_stdout() -> None:
    """Gives what could not be written somewhere to go: Python tries once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = (), gap: int = 2) -> str:
    """Aligned columns under a ruled header; the columns in `right` are flushed right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        return (" " * gap).join(cells).rstrip()

    return "\n".join([line(header), (" " * gap).join("-" * width for width in widths), *map(line, rows)])


class Progress:
    """A bar on one line of stderr with the step at hand; silent where stderr is no terminal."""

    _WIDTH = 24

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._done = 0
        self._stream = sys.stderr if stream is None else stream
        self._shown = self._stream is not None and self._stream.isatty()  # None: stderr is closed
        self._start = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def step(self, what: str) -> None:
        """Announces the next step; the one before counts as done."""
        self._what = what
        self._draw(what)
        self._done += 1

    def note(self, what: str) -> None:
        """Shows what the step at hand is doing."""
        self._done -= 1
        self._draw(f"{self._what}: {what}")
        self._done += 1

    def _draw(self, text: str) -> None:
        if self._shown:
            filled = self._WIDTH * self._done // max(self._total, 1)
            bar = "#" * filled + "." * (self._WIDTH - filled)
            seconds = time.monotonic() - self._start
            self._stream.write(f"\r\x1b[K[{bar}] {self._done}/{self._total}  {seconds:.0f} s  {text}")
            self._stream.flush()

    def __exit__(self, *exception: object) -> None:
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


# --- memory


def check_sizes(what: str, batch: int, channels: int, size: int) -> None:
    """Refuses a block that has tensors of more bytes than an address counts: PyTorch's error is a page of C++.

    Raises:
        CommandError: naming `what`.
    """
    elements = 4 * channels * max(batch * size**2, channels)  # of the hidden activations, of the MLP's weights
    if elements * torch.float64.itemsize >= 2**63:
        raise CommandError(f"{what}: expected tensors of less than 2^63 bytes, got {elements} elements in one", 2)


def lacks_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def allocating(what: str) -> Iterator[None]:
    """Makes one line about `what` of an allocation that fails; the CPU's is a RuntimeError like many others."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        detail = f", {asked[1]} in one piece" if asked else ""
        raise CommandError(f"{what}: out of memory{detail}", 1) from error


# --- arguments


def device_argument(text: str) -> torch.device:
    """argparse type: a device our kernels can be asked for, and that is there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not there: PyTorch {torch.__version__} sees no GPU")
        if (device.index or 0) >= count:
            raise argparse.ArgumentTypeError(f"{text!r} is not there: PyTorch sees {count} GPU(s)")
    return device


def number_argument(kind: Callable[[str], Any], most: float = math.inf) -> Callable[[str], Any]:
    """argparse type: an int or a float above 0, and no infinite one."""

    def convert(text: str) -> Any:
        value = math.nan
        with contextlib.suppress(ValueError):
            value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
        if value > most:
            raise argparse.ArgumentTypeError(f"expected at most {most}, got {text!r}")
        return value

    return convert


count_argument = number_argument(int, _MOST)

#: Threads or processes. OpenMP ends in a segmentation fault where the system has no room for so many.
threads_argument = number_argument(int, 8 * (os.cpu_count() or 1))


def stage_argument(text: str) -> tuple[int, int]:
    """argparse type: CHANNELS@SIZE."""
    match = re.fullmatch(r"([1-9]\d*)@([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected CHANNELS@SIZE, such as 96@56, got {text!r}")
    channels, size = map(count_argument, match.groups())
    return channels, size


class JsonFile:
    """What --json names.

    A regular file is replaced as a whole, also behind links: a reader never sees half of it. A pipe, a device or an
    open file (/dev/stdout, /dev/fd/N) is a `stream`: it is written to where it stands, so that a command which writes
    as it goes does so at its end only.

    Raises:
        OSError: it cannot be written, as far as that is known beforehand.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        exists = _exists(path)
        self._descriptor = _descriptor(path) if exists else None
        self.stream = self._descriptor is not None or (exists and not path.is_file())
        if self._descriptor is not None:
            os.write(self._descriptor, b"")  # fails where it is open for reading only
        elif exists and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not self.stream:
            self._target = Path(os.path.realpath(path))
            self._partial = self._target.with_name(self._target.name + ".partial")
            self._partial.touch()
            self._partial.unlink()

    def write(self, content: Any) -> None:
        """Writes the whole file or leaves the old one.

        Raises:
            CommandError: it cannot be written after all: a full disk, a pipe without a reader.
        """
        text = json.dumps(content, indent=1) + "\n"
        try:
            if self.stream:
                descriptor = self._descriptor
                with open(self._path if descriptor is None else os.dup(descriptor), "w") as file:
                    file.write(text)
                return
            try:
                self._partial.write_text(text)
                self._partial.replace(self._target)
            except OSError:
                self._partial.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise CommandError(f"--json: {str(self._path)!r} cannot be written: {error.strerror}", 2) from error


def _exists(path: Path) -> bool:
    """Whether there is something behind the links; they may form no ring."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _descriptor(path: Path) -> int | None:
    """N, where links lead through this process's open file N. Opened anew, that would be written from its beginning."""
    while path.is_symlink():
        folder = path.parent.resolve()
        if folder == Path("/proc/self/fd").resolve():
            return int(path.name)
        path = folder / path.readlink()
    return None


def json_file_argument(text: str) -> JsonFile:
    """argparse type: a file that can be written."""
    path = Path(text)
    try:
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
        return JsonFile(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from None
