"""Plain text for a terminal: aligned tables, a progress line, and the arguments that the commands share."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

__all__ = ["Progress", "device_argument", "json_file_argument", "table", "write_json"]


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
        self._shown = self._stream.isatty()
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


def json_file_argument(text: str) -> Path:
    """argparse type: a file to write, in a folder that exists."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return path


def write_json(path: Path, content: Any) -> None:
    """Writes the whole file or leaves the old one: a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
