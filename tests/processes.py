"""Processes that tests start."""

import os
import subprocess


def run(*command, cwd, **environment):
    """A process that finds the package as a user's does: by installation, not by a developer's variables."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("CONVNEXT_KERNELS_", "PYTHONPATH"))}
    env["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=300
    )
