"""The command line: bench, and what it measures with."""

import io
import json
import os
import sys
import time

import pytest
import torch

from convnext_kernels.__main__ import main
from convnext_kernels.block import FusedConvNeXtBlock
from convnext_kernels.cli import bench, terminal
from convnext_kernels.cli.measure import peak_growth, saved_bytes, time_interleaved
from numerics import scale_gradient

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread_a_test")


def _bench(tmp_path, *arguments):
    path = tmp_path / "bench.json"
    code = main(["bench", "--device", "cpu", "--batch", "2", "--seconds", "0.02", "--json", str(path), *arguments])
    return code, json.loads(path.read_text()) if path.exists() else None


def test_bench(tmp_path, capsys):
    code, report = _bench(tmp_path, "--stages", "16@9", "24@5", "--dtype", "fp32", "autocast-bf16", "pure-bf16")
    assert code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert len(report["results"]) == 2 * 2 * 3
    for result in report["results"]:
        assert f"{result['version'].upper()} {result['channels']}@{result['size']}" in text
        for task in ("infer", "train"):
            ours, theirs = result[task]["fused"], result[task]["pytorch"]
            assert 0 < ours["ms_quantile_20"] <= ours["ms"] <= ours["ms_quantile_80"]
            assert result[task]["speedup"] == pytest.approx(theirs["ms"] / ours["ms"])
            assert ours["images_a_second"] == pytest.approx(2000 / ours["ms"])
            assert theirs["memory_format"] in ("channels-last", "NCHW")
        # x and z in the compute dtype, mean and rstd in fp32 (README: what is kept for backward).
        bytes_a_number = 4 if result["precision"] == "fp32" else 2
        kept = 2 * bytes_a_number + 8 / result["channels"]
        assert result["saved_bytes_an_element"]["fused"] == pytest.approx(kept)
        assert result["saved_bytes_an_element"]["pytorch"] > 3 * kept
        assert result["relative_error"]["fused"]["rms"] < bench.PRECISIONS[result["precision"]][2]
    assert "geometric means" in text
    assert report["environment"]["torch"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("damage", [lambda y: y * 1.1, lambda y: y * float("nan"), lambda y: scale_gradient(y, 1.1)])
def test_bench_refuses_a_wrong_block(damage, tmp_path, monkeypatch, capsys):
    intact = FusedConvNeXtBlock.forward
    monkeypatch.setattr(FusedConvNeXtBlock, "forward", lambda self, x: damage(intact(self, x)))
    code, report = _bench(tmp_path, "--stages", "16@9", "--versions", "v1", "--dtype", "fp32")
    assert code == 1
    assert report is None
    printed = capsys.readouterr()
    assert "convnext-kernels bench: V1 16@9 fp32: error" in printed.err
    assert printed.out == ""


def test_bench_judges_gradients_that_are_zero(tmp_path):
    """A LayerNorm of one channel has a constant for a result."""
    code, report = _bench(tmp_path, "--stages", "1@1", "1@2", "--dtype", "fp32")
    assert code == 0
    assert len(report["results"]) == 2 * 2
    exact = {"zero": torch.full((4,), 1e-15, dtype=torch.float64), "other": torch.full((4,), 2.0, dtype=torch.float64)}
    errors = bench._errors({"zero": torch.full((4,), 0.5), "other": torch.full((4,), 2.5)}, exact)
    assert errors == {"zero": pytest.approx(0.5), "other": pytest.approx(0.25)}


def test_bench_writes_into_a_pipe_once(tmp_path):
    reader, writer = os.pipe()
    options = ["--stages", "8@5", "--dtype", "fp32", "--seconds", "0.01", "--json", f"/dev/fd/{writer}"]
    assert main(["bench", "--device", "cpu", "--batch", "1", *options]) == 0
    os.close(writer)
    with open(reader) as pipe:
        assert len(json.load(pipe)["results"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--stages", "99999999@99999"], 2, "V1 99999999@99999 fp32: expected tensors of less than 2^63 bytes, got "),
        # More than an address space holds: it fails whatever the system promises.
        (["--batch", "999999999"], 1, "V1 96@56 fp32: out of memory, 1204223998795776 bytes in one piece"),
    ],
    ids=["addresses", "memory"],
)
def test_bench_beyond_what_there_is_is_one_line(arguments, code, message, capsys):
    assert main(["bench", "--device", "cpu", "--dtype", "fp32", "--seconds", "0.01", *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"convnext-kernels: {message}")


def test_bench_whose_results_nobody_reads_is_one_line(capsys):
    reader, writer = os.pipe()
    os.close(reader)
    options = ["--stages", "8@5", "--dtype", "fp32", "--seconds", "0.01", "--json", f"/dev/fd/{writer}"]
    assert main(["bench", "--device", "cpu", "--batch", "1", *options]) == 2
    os.close(writer)
    assert capsys.readouterr().err == f"convnext-kernels: --json: '/dev/fd/{writer}' cannot be written: Broken pipe\n"


def test_other_errors_are_no_lack_of_memory():
    for error, asked in {
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0"): ", 20.00 GiB in one piece",
        MemoryError(): "",
    }.items():
        with pytest.raises(terminal.CommandError) as caught, terminal.allocating("this"):
            raise error
        assert (str(caught.value), caught.value.code) == (f"this: out of memory{asked}", 1)
    with pytest.raises(RuntimeError, match="another"), terminal.allocating("this"):
        raise RuntimeError("another")


def test_bench_shows_a_slow_block_as_slow(tmp_path, monkeypatch):
    intact = FusedConvNeXtBlock.forward

    def slow(self, x):
        time.sleep(0.05)
        return intact(self, x)

    monkeypatch.setattr(FusedConvNeXtBlock, "forward", slow)
    code, report = _bench(tmp_path, "--stages", "8@5", "--versions", "v1", "--dtype", "fp32")
    assert code == 0
    (result,) = report["results"]
    assert result["infer"]["fused"]["ms"] >= 50
    assert result["infer"]["speedup"] < 1
    assert result["train"]["speedup"] < 1


def test_threads_option(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert _bench(tmp_path, "--threads", "3", "--stages", "8@5", "--versions", "v2", "--dtype", "fp32")[0] == 0
    assert asked == [3]


def test_timing_takes_turns_and_repeats_short_functions():
    order = []
    functions = {"long": lambda: (order.append("long"), time.sleep(0.02)), "short": lambda: order.append("short")}
    timings = time_interleaved(functions, CPU, 0.01)
    assert timings["long"].median >= 20
    assert timings["short"].median < 1
    assert timings["long"].calls_a_round == 1 < timings["short"].calls_a_round
    assert timings["long"].rounds == timings["short"].rounds >= 3
    rounds = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert rounds.count("long") >= 2


def test_saved_bytes_counts_each_storage_once_and_no_parameters():
    x = torch.randn(8, 16, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(16, 16))
    assert saved_bytes(lambda: (x @ weight).sum(), [weight]) == x.numel() * 4
    assert saved_bytes(lambda: (x * x + x.t().t() * x).sum(), []) == x.numel() * 4
    assert saved_bytes(lambda: torch.exp(x).sum(), []) == x.numel() * 4
    assert saved_bytes(lambda: (x + 1).sum(), []) == 0


def test_peak_growth_of_a_known_allocation():
    def allocate():
        first = torch.ones(30_000_000)
        second = torch.ones(10_000_000)
        del first
        return second

    growth = peak_growth(allocate, CPU)
    if growth is None:
        pytest.skip("this system does not let a process reset its peak resident set")
    assert growth == pytest.approx(160e6, rel=0.05)
    assert peak_growth(lambda: None, CPU) < 8e6


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_drawn_on_a_terminal_only():
    for stream in (_Terminal(), io.StringIO()):
        with terminal.Progress(2, stream) as progress:
            progress.step("first")
            progress.step("second")
            progress.note("a part of it")
        text = stream.getvalue()
        if stream.isatty():
            assert "0/2" in text
            assert "1/2" in text and "second: a part of it" in text and "2/2" not in text
            assert text.endswith("\r\x1b[K")
        else:
            assert text == ""


def test_progress_without_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as Python starts where it is closed
    with terminal.Progress(1) as progress:
        progress.step("first")


def test_table_is_aligned():
    text = terminal.table(("name", "ms"), [("a", "1.0"), ("longer", "10.0")], right=[1])
    assert text.splitlines() == ["name      ms", "------  ----", "a        1.0", "longer  10.0"]
