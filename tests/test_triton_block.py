"""The Triton backend end to end without a GPU: blocks train and infer in the interpreter; `verify` covers it there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import convnext_kernels
from triton_tools import in_interpreter


def test_blocks_in_the_interpreter():
    in_interpreter("test_gpu_triton_block.py")


def test_verify_covers_triton_in_the_interpreter():
    """The smallest case of each operator, in the precisions the interpreter has."""
    script = (
        "import sys\n"
        "from convnext_kernels.__main__ import main\n"
        "from convnext_kernels.cli import verify\n"
        "names = ('3@9x7 k5 no bias', '12x40 no weights', '9x40 erf', 'V2 24@5 dropped sample',\n"
        "         'V1 16@3x3 dropped sample')\n"
        "verify.CASES = tuple(case for case in verify.CASES if case.name in names)\n"
        "verify.MODES = tuple(mode for mode in verify.MODES if mode.name in ('fp64', 'fp32'))\n"
        "sys.exit(main(['verify', '--device', 'cpu', '--json']))\n"
    )
    root = str(Path(convnext_kernels.__file__).parent.parent)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = json.loads(done.stdout)["results"]
    operators = {"depthwise_conv2d", "layer_norm", "bias_gelu", "layer_norm_mlp", "convnext_block"}
    assert {row["operator"] for row in results if row["backend"] == "triton"} == operators
    assert {row["mode"] for row in results if row["backend"] == "triton"} == {"fp32"}
