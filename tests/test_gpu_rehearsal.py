"""The tests marked `gpu`, rehearsed without a GPU (tests/gpu_rehearsal.py): that they are right, before there is one.

Values and launches are those of the CUDA entries, executed on the CPU; streams, graphs, synchronisation, devices and
memory are checked by what CUDA allows. `-k` leaves out what takes the engine long.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import cuda_programs
from benchmark_suite import goals, report
from cuda_entries import Entries

# What cannot be rehearsed.
NOT_REHEARSED = {
    "block_errors and sparse": "the stand-in has no sparse tensors",
    "opcheck_with_gradients": "AOTAutograd takes the stand-in's tensors apart",
    "test_gpu_bias_gelu.py and non_finite_values": "PyTorch's GELU of infinity is NaN on a CPU, and not on a GPU",
}
# Files, and what is chosen of them: `not` what takes the engine long.
GROUPS = {
    "operators": ("gpu_bias_gelu gpu_layer_norm", "not against_fp64 or float32-bfloat16"),
    "convolution": (
        "gpu_depthwise_conv",
        "another_device or unknown or errors or empty or residual or test_fp64 or unaligned and fma"
        " or same_pass and 3x24 or agree and 3x40 or dropped and shape0 or (graph or sync or same_bits) and not shape0",
    ),
    "mlp": ("gpu_mlp", "not bounded and not put_together and not same_bits and not (against_fp64 and tanh)"),
    "block": ("gpu_block", "not what_is_kept or bf16-v1 and not autocast"),
    "triton": (
        "gpu_triton_mlp_backward gpu_triton_mlp gpu_triton_layer_norm gpu_triton_depthwise_conv",
        "graph or errors or arguments or mask or optional",
    ),
    "on_every_device": ("block operators convert fcmae", "not gradcheck or bias_gelu"),
}


@pytest.fixture(scope="module")
def entries(request):
    if not torch.version.cuda:
        pytest.skip("this PyTorch was built without CUDA")
    pytest.importorskip("triton")
    for entries in cuda_programs.provide(request, [], Entries):
        if len(request.session.items) > 5:
            for edits in ((), DROPS_FORGOTTEN):
                entries.start_library("plain", edits)
        entries.driver()  # before several rehearsals ask for it at once
        yield entries


def rehearse(entries, tmp_path, files, expression, *options, edits=()):
    """The finished process, and how often each (operator, backend) ran."""
    left_out = "".join(f" and not ({what})" for what in NOT_REHEARSED)
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_rehearsal", "-m", "gpu", *options]
    command += [*(f"tests/test_{name}.py" for name in files), "-k", f"({expression}){left_out}"]
    done = entries.rehearse(command, tmp_path / "launches", edits, [tmp_path])
    lines = (tmp_path / "launches").read_text().splitlines() if (tmp_path / "launches").exists() else []
    return done, {tuple(line.split()[:2]): int(line.split()[2]) for line in lines}


def passed(done):
    """The number of tests that passed; none may have failed."""
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


# The operators that each group must have launched, by backend.
CONVOLUTION = ["depthwise_conv2d", "depthwise_conv2d_input_grad", "depthwise_conv2d_weight_grad"]
ROWS = ["bias_gelu", "bias_gelu_backward", "layer_norm", "layer_norm_backward"]
MLP = ["layer_norm_mlp", "layer_norm_mlp_backward"]
EXPECTED = {
    "operators": (100, {(name, "cuda") for name in ROWS}),
    "convolution": (50, {(name, "cuda") for name in [*CONVOLUTION, "depthwise_conv2d_cast"]}),
    "mlp": (40, {(name, "cuda") for name in MLP}),
    # As on a GPU: the MLP by Triton, of which the entry gives the results, and by the CUDA kernels.
    "block": (
        80,
        {(name, "cuda") for name in [*CONVOLUTION, "depthwise_conv2d_cast", *MLP]} | {(m, "triton") for m in MLP},
    ),
    "triton": (30, {(name, "triton") for name in [*CONVOLUTION, *ROWS, *MLP]} - {("bias_gelu_backward", "triton")}),
    "on_every_device": (150, {(name, "cuda") for name in [*CONVOLUTION, *ROWS, *MLP]} | {(m, "triton") for m in MLP}),
}


@pytest.fixture(scope="module")
def runs(request, entries, tmp_path_factory):
    """What `rehearse` gives for each group and each defect in Python: two at a time, from the beginning."""

    def run(name, folder):
        if name in GROUPS:
            files, expression = GROUPS[name]
            return rehearse(entries, folder, files.split(), expression)
        text, expression, _ = DEFECTS[name]
        (folder / "planted.py").write_text(text)
        return rehearse(entries, folder, ["gpu_block"], expression, "-x", "-p", "planted")

    with ThreadPoolExecutor(2) as pool:
        mine = [item for item in request.session.items if item.path == request.path and "runs" in item.fixturenames]
        names = [item.callspec.params["name"] for item in mine]
        # The folders here: pytest makes them in one thread only.
        yield {name: pool.submit(run, name, tmp_path_factory.mktemp("rehearsal")) for name in names}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", GROUPS)
def test_rehearsal(runs, name):
    done, ran = runs[name].result()
    least, expected = EXPECTED[name]
    assert passed(done) >= least
    assert ran.keys() >= expected
    if name == "operators":
        assert len(re.findall(r"needs 2\d GiB of free GPU memory, and 8.0 are", done.stdout)) == 2


# Stand-ins cannot be views of inference tensors, and have no storage to be known by.
COMMAND = """
import sys, torch, triton
from convnext_kernels.cli import measure
triton.testing.do_bench = lambda run, warmup, rep, return_mode: run() and 1.0
measure.saved_bytes = lambda forward, parameters: 1
torch.inference_mode = lambda mode=True: torch.set_grad_enabled(not mode)
import gpu_rehearsal
with gpu_rehearsal.rehearsing():
    from convnext_kernels.__main__ import main
    gpu_rehearsal.leave(main(sys.argv[1:]))
"""
COMMANDS = {
    "info": ([], "0: rehearsal, compute capability 9.0, 8 GiB"),
    "bench": (["--stages", "16@6", "--batch", "2", "--device", "cuda"], "V2 16@6"),
    "verify": (["--device", "cuda"], " 0 wrong"),
    "tune": (["--stages", "8@2", "--batch", "1", "--jobs", "1"], "configurations for "),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line(entries, tmp_path, monkeypatch, name):
    monkeypatch.setenv("CONVNEXT_KERNELS_CACHE_DIR", str(tmp_path))
    options, expected = COMMANDS[name]
    done = entries.rehearse(["-c", COMMAND, name, *options], tmp_path / "launches")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert expected in done.stdout


def test_script_for_compute_sanitizer(entries, tmp_path):
    code = "import gpu_rehearsal, gpu_small_steps\nwith gpu_rehearsal.rehearsing(): gpu_small_steps.main()\n"
    code += "gpu_rehearsal.leave(0)"
    done = entries.rehearse(["-c", code], tmp_path / "launches")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("small steps done\n")


# The benchmark suite's own cases are too large for the engine: those of the models keep their names, for
# benchmarks/goals.py, and have small networks and images.
SMALL_CASES = """
from dataclasses import replace
import timm, torchvision
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
import gpu_rehearsal
from convnext_kernels.cli import measure
from benchmarks import cases, experiments, models, timing

gpu_rehearsal.PROPERTIES.L2_cache_size = 10000
timing.COPIED = timing.MULTIPLIED = {"cuda": 16}
timing.BEST_SECONDS = 0
experiments.VARYING, experiments.LargestBatch.MOST = (8, 4), 16
measure.saved_bytes = models.saved_bytes = lambda forward, parameters: 0
cases._shapes = lambda device_type, full: [("v1", 16, 6, 2)]
blocks, inputs = cases.block_cases, models.ModelRunner._inputs
cases.block_cases = lambda *of: [case for case in blocks(*of) if case.drop_path == 0]
cases.GOAL_MODELS = cases.GOAL_MODELS[:1]
scaling, experimental = cases.scaling_cases, cases.experiment_cases
cases.scaling_cases = lambda *of: scaling(*of)[:1]
cases.experiment_cases = lambda *of: [replace(case, batch=8) for case in experimental(*of)]

def create(library, name):
    widths = 8, 8, 8, 8
    if library == "timm":
        version = "convnextv2_atto" if "v2" in name else "convnext_atto"
        return timm.create_model(version, depths=(1, 1, 1, 1), dims=widths, drop_path_rate=0.0)
    return ConvNeXt([CNBlockConfig(*pair, 1) for pair in zip(widths, (*widths[1:], None))], stochastic_depth_prob=0.0)

models.create = create
def small(self, batch):
    case, self._case = self._case, replace(self._case, size=64 if self._case.experiment == "masked pretraining" else 32)
    try:
        return inputs(self, min(batch, 2))
    finally:
        self._case = case
models.ModelRunner._inputs = small
"""


@pytest.mark.parametrize(("file", "least"), [("operators", 60), ("block", 30), ("model", 20)])
def test_the_benchmark_suite(entries, tmp_path, capsys, file, least):
    """Streams, events, graphs and the checks against fp64, and what is made of the result; the times mean nothing."""
    (tmp_path / "small_cases.py").write_text(SMALL_CASES)
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "small_cases", "-p", "gpu_rehearsal"]
    command += [f"benchmarks/test_{file}.py", "--benchmark-only", "--device", "cuda", "--seconds", "0.01"]
    command += ["--jobs", "1"]
    command += ["-k", "not compile and not autotune and not liger", "--benchmark-json", tmp_path / "result.json"]
    done = entries.rehearse(command, tmp_path / "launches", (), [tmp_path])
    assert passed(done) >= least
    result = report.load(tmp_path / "result.json")
    assert (result.facts["chip"], result.facts["device"]) == ("rehearsal", "cuda:0")
    assert "## Goals" in report.page(result, [])
    assert goals.main([str(tmp_path / "result.json")]) == 0
    measured = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| convnext_tiny, batch 256")]
    # Of each precision: training, inference, memory.
    assert sum("not measured" not in line for line in measured) == (6 if file == "model" else 0)


# What each needs that the stand-in has not: a profiler, and a model that the engine gets through.
SCRIPTS = {
    "counters": """
torch.cuda.profiler.start = torch.cuda.profiler.stop = lambda: None
from benchmarks import counters
gpu_rehearsal.leave(counters.main(["-k", "layer_norm", "--call-each", "called"]))
""",
    "baseline": """
import io, json
from benchmarks import baseline
baseline.build_model = lambda case: small_cases.create(case.library, case.model)
options = baseline.parse("--models convnext_tiny --batch 2 --size 32 --device cuda".split())
lines = [json.dumps(vars(case)) for case in baseline.cases_of(options)]
sys.stdin = io.StringIO("\\n".join(lines))
baseline.work(options.device, 2)
gpu_rehearsal.leave(0)
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_other_scripts(entries, tmp_path, name):
    (tmp_path / "small_cases.py").write_text(SMALL_CASES)
    code = "import os, sys, torch, gpu_rehearsal, small_cases\nos.chdir(sys.argv[1])\n"
    code += "with gpu_rehearsal.rehearsing():" + SCRIPTS[name].replace("\n", "\n    ")
    done = entries.rehearse(["-c", code, tmp_path], tmp_path / "launches", (), [tmp_path])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    if name == "counters":
        called = json.loads((tmp_path / "called").read_text())
        assert len(called) == 4 and called[0] == "layer_norm_mlp v1 forward 16@6 batch 2 pure-bf16 ours"
    else:
        facts, *results = map(json.loads, done.stdout.splitlines())
        assert facts["chip"] == "rehearsal"
        assert [(result["status"], result["iterations"]) for result in results] == [("ok", 2)] * 4, results


# --- the rehearsal sees what a GPU would not forgive: defects planted in the library

CAST = "test_the_cast_in_the_same_pass and tensor and 3x24"
DROPS_FORGOTTEN = (
    (
        "depthwise_conv/cuda.cu",
        "params.sample_scale = data_or_null<float>(sample_scale);",
        "params.sample_scale = nullptr;",
    ),
)
FORWARD = """
import torch
from convnext_kernels.operators import block
forward = block._forward
stream = None
def planted(x, *rest):
    {}
block._forward = planted
"""
DEFECTS = {
    "the-host-reads-a-number": (
        FORWARD.format("x.sum().item(); return forward(x, *rest)"),
        "test_no_synchronisation and bf16-v1",
        "called a synchronizing CUDA operation",
    ),
    "and-while-a-graph-is-captured": (
        FORWARD.format("x.sum().item(); return forward(x, *rest)"),
        "test_cuda_graph and bf16-v1",
        "operation not permitted when stream is capturing",
    ),
    "a-copy-from-the-host": (
        FORWARD.format("return forward(x + torch.zeros(x.shape[1:]).to(x.device, x.dtype), *rest)"),
        "test_no_synchronisation and bf16-v1",
        "a copy from pageable memory",
    ),
    "a-tensor-on-the-host": (
        FORWARD.format("return forward(x + torch.zeros(x.shape[1:]), *rest)"),
        "test_two_runs and bf16-v1",
        "expected all tensors to be on the same device",
    ),
    "a-stream-that-nothing-waits-for": (
        FORWARD.format("with torch.cuda.stream(torch.cuda.Stream()): return forward(x, *rest)"),
        "test_side_stream and bf16-v1",
        "without waiting for it",
    ),
    "a-result-from-the-step-before": (
        FORWARD.format("global stream; stream, y = forward(x, *rest), stream; return y or stream"),
        "test_cuda_graph and bf16-v1",
        "assert_same_bits",
    ),
    "the-hidden-tensor-kept": (
        "import functools, convnext_kernels as ck\n"
        "ck.convnext_block = functools.partial(ck.convnext_block, recompute=False)",
        "test_what_is_kept and bf16-v1 and not autocast",
        "bytes an element instead of",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_is_found(runs, name):
    done, _ = runs[name].result()
    assert done.returncode == 1, f"the planted defect was not found:\n{done.stdout}{done.stderr}"
    assert DEFECTS[name][2] in done.stdout


def test_planted_defect_in_an_entry_is_found(entries, tmp_path):
    done, _ = rehearse(entries, tmp_path, ["gpu_depthwise_conv"], CAST, "-x", edits=DROPS_FORGOTTEN)
    assert done.returncode == 1 and "test_the_cast_in_the_same_pass" in done.stdout, done.stdout + done.stderr
