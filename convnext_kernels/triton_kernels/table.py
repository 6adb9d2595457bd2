"""The configurations of the Triton kernels that the package ships: one :class:`Entry` a line, by kernel.

No entry has been tuned on a GPU yet. What is here was compiled for each of its chips, has no stack there and fits the
shared memory (each kernel's test file proves it); which configuration is fastest has not been measured.
`convnext-kernels tune` measures on the GPU at hand and writes a cache that goes before this table.
"""

from __future__ import annotations

from .config import Entry

__all__ = ["TABLE"]

#: kernel -> entries. The first entry that fits is taken, so the narrower ones come first.
TABLE: dict[str, tuple[Entry, ...]] = {}
