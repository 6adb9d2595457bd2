"""The command line, and the ways to start it."""

import argparse
import errno
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import convnext_kernels
from convnext_kernels import backends, native, operators
from convnext_kernels.__main__ import main
from convnext_kernels.cli import terminal, verify
from convnext_kernels.cli.accuracy import judge
from numerics import scale_gradient
from processes import run

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


# The shapes here are too small for more threads, which take minutes to wait for a busy processor.
pytestmark = pytest.mark.usefixtures("one_thread_a_test")


def script(name):
    return Path(sysconfig.get_path("scripts")) / name


needs_installation = pytest.mark.skipif(
    native.status().found_in == "CONVNEXT_KERNELS_LIBRARY_DIR",
    reason="the libraries come from CONVNEXT_KERNELS_LIBRARY_DIR, not from an installation",
)


# --- the five ways to start


@needs_installation
@pytest.mark.parametrize(
    ("command", "inside"),
    [
        ([script("convnext-kernels")], False),
        ([script("convnext-kernels")], True),
        ([sys.executable, "-m", "convnext_kernels"], False),
        ([sys.executable, "-m", "convnext_kernels"], True),
    ],
    ids=["script", "script in the checkout", "module", "module in the checkout"],
)
def test_command_line_starts(command, inside, tmp_path):
    done = run(*command, "info", "--json", cwd=ROOT if inside else tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["environment"]["convnext_kernels"] == convnext_kernels.__version__
    assert facts["environment"]["libraries"]["folder"] == str(native.status().folder)


@needs_installation
@pytest.mark.parametrize(
    "command", [[script("pytest")], [sys.executable, "-m", "pytest"]], ids=["pytest", "python -m pytest"]
)
def test_pytest_finds_the_compiled_library(command, tmp_path):
    (tmp_path / "test_generated.py").write_text(
        "import torch\n"
        "from convnext_kernels import FusedConvNeXtBlock, backends\n"
        "def test_block_runs_on_our_kernels():\n"
        "    assert {choice.backend for choice in backends.describe('cpu')} == {'cpu'}\n"
        "    assert FusedConvNeXtBlock(8)(torch.randn(1, 8, 5, 5)).shape == (1, 8, 5, 5)\n"
    )
    # The current folder is the checkout, which `python -m` puts first on the path and bare pytest does not.
    done = run(*command, "-p", "no:cacheprovider", "-c", os.devnull, tmp_path / "test_generated.py", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_uncompiled_tree_says_what_to_do_in_one_line(tmp_path):
    shutil.copytree(
        ROOT / "convnext_kernels", tmp_path / "convnext_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    # Another version than any installed one, whose libraries would be found otherwise.
    (tmp_path / "convnext_kernels" / "_version.py").write_text('__version__ = "0.0.0.dev0"\n')
    done = run(sys.executable, "-m", "convnext_kernels", "info", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("convnext-kernels: ")
    assert "pip install ." in line
    assert str(tmp_path) in line


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: {info,verify,bench,tune}"),
        (["measure"], "invalid choice: 'measure'"),
        (["verify", "--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (["bench", "--device", "meta"], "--device: expected cpu, cuda or cuda:N, got 'meta'"),
        (["bench", "--device", "cuda:99"], "--device: 'cuda:99' is not there: PyTorch"),
        (["bench", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["bench", "--stages", "96x56"], "--stages: expected CHANNELS@SIZE, such as 96@56, got '96x56'"),
        (["bench", "--stages", "0@56"], "--stages: expected CHANNELS@SIZE"),
        (["bench", "--versions", "v3"], "--versions: invalid choice: 'v3'"),
        (["bench", "--batch", "0"], "--batch: expected a number above 0, got '0'"),
        (["bench", "--batch", "1" + "0" * 23], "--batch: expected at most 2147483647, got '1000"),
        (["bench", "--stages", "1" + "0" * 24 + "@1"], "--stages: expected at most 2147483647, got '1000"),
        (["bench", "--threads", "two"], "--threads: expected a number above 0, got 'two'"),
        (["bench", "--threads", "100000"], f"--threads: expected at most {8 * os.cpu_count()}, got '100000'"),
        (["bench", "--threads", "99999999999"], f"--threads: expected at most {8 * os.cpu_count()}, got '9999"),
        (["bench", "--seconds", "nan"], "--seconds: expected a number above 0, got 'nan'"),
        (["bench", "--seconds", "inf"], "--seconds: expected a number above 0, got 'inf'"),
        (["bench", "--json", "/no/such/folder/x.json"], "--json: expected a file in a folder that exists"),
        (["verify", "--json", "/"], "--json: expected a file in a folder that exists, got '/'"),
        (["bench", "--json", "/proc/x.json"], "--json: '/proc/x.json' cannot be written: No such file or directory"),
        (["bench", "--json", "/dev/fd/99"], "--json: '/dev/fd/99' cannot be written: No such file or directory"),
        (["verify", "--json", "/tmp/" + "x" * 250], " cannot be written: File name too long"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there is a GPU")
def test_cuda_without_a_gpu_is_a_clear_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["verify", "--device", "cuda"])
    assert caught.value.code == 2
    assert f"'cuda' is not there: PyTorch {torch.__version__} sees no GPU" in capsys.readouterr().err


def _process(*command, **environment):
    """A process of `python -m convnext_kernels`; a command is a shell's, in which "$@" stands for that."""
    shell = command or ['exec "$@"']
    module = [sys.executable, "-m", "convnext_kernels", "info"]
    folder = str(native.status().folder)
    return run("sh", "-c", *shell, "sh", *module, cwd=ROOT, CONVNEXT_KERNELS_LIBRARY_DIR=folder, **environment)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        pytest.param(
            "CONVNEXT_KERNELS_CPU_CAPABILITY",
            "expected portable, avx2, avx512 or avx512_bf16",
            marks=pytest.mark.skipif(native.status().bindings is None, reason="the libraries come without bindings"),
        ),
        ("CONVNEXT_KERNELS_BACKEND", "expected one of auto, cpu, cuda, triton, reference, got 'sse9'"),
    ],
)
def test_wrong_environment_variable_is_one_line(variable, expected):
    done = _process(**{variable: "sse9"})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"convnext-kernels: {variable}: {expected}")


@pytest.mark.parametrize("arguments", [["bench", "--stages", "8@5"], ["verify"]], ids=lambda arguments: arguments[0])
def test_a_forced_backend_that_cannot_run_is_one_line(arguments, capsys):
    with backends.use("cuda"):
        assert main([*arguments, "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convnext-kernels: convnext_kernels::depthwise_conv2d: backend 'cuda' is forced, but the")


@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        (">/dev/full", "stdout cannot be written: No space left on device"),
        (">&-", "stdout is closed"),
        ("1</dev/null", "stdout cannot be written: Bad file descriptor"),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_stdout_that_cannot_be_written_is_one_line(redirection, reason, unbuffered):
    done = _process(f'exec "$@" {redirection}', PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (1, f"convnext-kernels: {reason}\n")


def test_a_reader_that_has_seen_enough_ends_quietly():
    done = _process('{ "$@"; echo code $? >&2; } | true')
    assert done.stderr == "code 0\n"


def test_interruption_ends_quietly(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "_check", interrupted)
    assert main(["verify"]) == 130
    assert capsys.readouterr().err == "convnext-kernels: interrupted\n"


# --- --json FILE


def _json_file(path):
    return terminal.json_file_argument(str(path))


def test_json_replaces_the_file_behind_links(tmp_path):
    (tmp_path / "results").mkdir()
    target, first, second = tmp_path / "results" / "x.json", tmp_path / "first", tmp_path / "second"
    first.symlink_to("results/x.json")
    second.symlink_to(first)
    for content in ([1], [2]):  # the first time the link leads to nothing
        file = _json_file(second)
        assert not file.stream
        file.write(content)
        assert first.is_symlink() and second.is_symlink()
        assert json.loads(target.read_text()) == content
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["first", "results", "second", "x.json"]


def test_json_goes_straight_into_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("pipe", "link"):
        file = _json_file(tmp_path / name)
        assert file.stream
        file.write([name])
        assert json.loads(os.read(reader, 1000)) == [name]
        assert (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}", "{}/link"])
def test_json_goes_on_in_an_open_file(name, tmp_path):
    with open(tmp_path / "log", "w") as log:
        log.write("before\n")
        log.flush()
        (tmp_path / "link").symlink_to(f"/dev/fd/{log.fileno()}")
        _json_file(name.format(tmp_path if "link" in name else log.fileno())).write([1])
        log.write("after\n")
    assert (tmp_path / "log").read_text() == "before\n[\n 1\n]\nafter\n"


def test_json_that_cannot_be_written_is_refused_beforehand(tmp_path):
    (tmp_path / "ring").symlink_to("ring")
    with open(os.devnull) as reading, open("/dev/full", "w") as full:
        for path, reason in {
            tmp_path / "ring": "Too many levels of symbolic links",
            f"/dev/fd/{reading.fileno()}": "Bad file descriptor",
            f"/dev/fd/{full.fileno()}": "No space left on device",
        }.items():
            with pytest.raises(argparse.ArgumentTypeError, match=f"{path}' cannot be written: {reason}"):
                _json_file(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_json_without_permission_is_refused_beforehand(tmp_path):
    (tmp_path / "file").touch(mode=0o444)
    (tmp_path / "folder").mkdir(mode=0o555)
    for path in (tmp_path / "file", tmp_path / "folder" / "file"):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot be written: Permission denied"):
            _json_file(path)


def test_json_that_cannot_be_written_after_all_leaves_the_old_file(tmp_path, monkeypatch):
    file = _json_file(tmp_path / "x.json")
    file.write(["old"])

    def full(self, text):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(terminal.CommandError, match=r"x\.json' cannot be written: No space left on device"):
        file.write(["new"])
    assert json.loads((tmp_path / "x.json").read_text()) == ["old"]
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


# --- info


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    environment = facts["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["python"] == sys.version.split()[0]
    assert len(environment["gpus"]) == torch.cuda.device_count()
    assert environment["build"] == json.loads(json.dumps(native.build_info()))
    if native.status().bindings:
        assert environment["cpu_capability"] == native.status().bindings.cpu_capability()
    rows = {(row["device"], row["operator"]): row for row in facts["backends"]}
    assert set(rows) == {(device, operator) for device in ("cpu", "cuda") for operator in backends.OPERATORS}
    assert all(row["reason"] for row in rows.values())
    assert all(rows["cpu", operator]["backend"] == "cpu" for operator in backends.OPERATORS)
    if not torch.cuda.device_count():
        assert all(rows["cuda", operator]["backend"] is None for operator in backends.OPERATORS)
        assert "PyTorch sees no GPU" in rows["cuda", "layer_norm"]["reason"]


def test_info_as_text_names_versions_and_a_forced_backend(capsys):
    with backends.use("reference"):
        assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = {line[:18].strip(): line[18:] for line in lines if line}
    assert facts["convnext_kernels"].startswith(convnext_kernels.__version__)
    assert facts["torch"].startswith(torch.__version__)
    assert str(native.status().folder) in facts["libraries"]
    assert facts["CPU products"].startswith("PyTorch's ")
    assert facts["Triton kernels"].startswith(("on ", "none: "))
    (row,) = [line.split() for line in lines if line.startswith("layer_norm_mlp_backward ") and " cpu " in line]
    assert row == ["layer_norm_mlp_backward", "cpu", "reference", "forced"]


def test_info_under_a_backend_that_cannot_run_says_why(capsys):
    with backends.use("cuda"):
        assert main(["info", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["backends"]
    on_cpu = [row for row in rows if row["device"] == "cpu"]
    assert all(row["backend"] is None for row in on_cpu)
    assert all("backend 'cuda' is forced, but the tensors are on 'cpu'" in row["reason"] for row in on_cpu)


# --- verify


def test_verify_passes(capsys, tmp_path):
    assert main(["verify", "--device", "cpu", "--json", str(tmp_path / "verify.json")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert max(map(len, printed.out.splitlines())) <= 120
    report = json.loads((tmp_path / "verify.json").read_text())
    assert report["ok"] is True
    # Every operator, on both backends, in every precision: the output and each gradient.
    seen = {(row["operator"], row["backend"], row["mode"]) for row in report["results"]}
    modes = [mode.name for mode in verify.MODES]
    assert seen == {
        (op, backend, mode) for op in verify.RAW_OPERATORS for backend in ("cpu", "reference") for mode in modes
    }
    block = {row["result"] for row in report["results"] if row["operator"] == "convnext_block"}
    assert block == {"output"} | {
        f"grad {name}"
        for name in (
            "x", "conv_weight", "conv_bias", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "grn_weight",
            "grn_bias", "fc2_weight", "fc2_bias", "layer_scale",
        )
    }  # fmt: skip
    assert f"{len(report['results'])} results against fp64, 0 wrong" in printed.out


def _noisy(y):
    return y + torch.rand_like(y) * 1e-9 * y.detach().abs()


@pytest.mark.parametrize(
    ("operator", "mode", "damage", "failing"),
    [
        ("depthwise_conv2d", "fp32", lambda y: y * (1 + 1e-5), {"output", "grad x", "grad weight", "grad bias"}),
        ("bias_gelu", "bf16", lambda y: y * 1.02, {"output", "grad x"}),
        ("layer_norm", "fp32", lambda y: scale_gradient(y, 1.0001), {"grad x", "grad weight", "grad bias"}),
        ("convnext_block", "autocast bf16", lambda y: y * float("nan"), {"output", "grad fc1_weight", "grad x"}),
        ("layer_norm_mlp", "fp64", _noisy, {"output"}),
    ],
    ids=["output", "bf16 output", "gradient", "nan", "noise"],
)
def test_verify_fails_when_an_operator_is_broken(operator, mode, damage, failing, monkeypatch, capsys):
    intact = getattr(operators, operator)
    monkeypatch.setattr(operators, operator, lambda *args, **kwargs: damage(intact(*args, **kwargs)))
    others = ("bias_gelu", "layer_norm")
    monkeypatch.setattr(verify, "CASES", tuple(case for case in verify.CASES if case.operator in (operator, *others)))
    monkeypatch.setattr(verify, "MODES", tuple(m for m in verify.MODES if m.name == mode))
    assert main(["verify", "--device", "cpu", "--json"]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["ok"] is False
    wrong = [row for row in report["results"] if not row["ok"]]
    assert {row["operator"] for row in wrong} == {operator}
    assert failing <= {row["result"] for row in wrong}
    assert {row["backend"] for row in wrong} == {"cpu", "reference"}
    assert printed.err.count(f"FAILED {operator} [") == len(wrong)


def test_verify_sees_bits_that_change_between_runs(monkeypatch, capsys):
    monkeypatch.setattr(verify, "CASES", tuple(case for case in verify.CASES if case.operator == "layer_norm"))
    monkeypatch.setattr(verify, "MODES", tuple(m for m in verify.MODES if m.name == "fp32"))
    intact, calls = operators.layer_norm, []

    def one_ulp_off_every_second_time(*args, **kwargs):
        calls.append(None)
        y = intact(*args, **kwargs)
        return y + torch.finfo(y.dtype).eps * y.detach() * (len(calls) % 2)

    monkeypatch.setattr(operators, "layer_norm", one_ulp_off_every_second_time)
    assert main(["verify", "--device", "cpu"]) == 1
    assert "a second run gave other bits" in capsys.readouterr().err


def test_verify_goes_on_after_an_error_and_writes_as_it_goes(monkeypatch, capsys, tmp_path):
    chosen = [case for case in verify.CASES if case.operator in ("layer_norm", "bias_gelu", "depthwise_conv2d")]
    monkeypatch.setattr(verify, "CASES", tuple(sorted(chosen, key=lambda case: case.operator)))

    def fails(*args, **kwargs):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(operators, "bias_gelu", fails)
    assert main(["verify", "--device", "cpu", "--json", str(tmp_path / "verify.json")]) == 1
    report = json.loads((tmp_path / "verify.json").read_text())
    assert report["complete"] is True and report["ok"] is False
    wrong = [row for row in report["results"] if not row["ok"]]
    assert {(row["operator"], row["raised"]) for row in wrong} == {
        ("bias_gelu", "RuntimeError: PassManager::run failed")
    }
    assert any(row["ok"] for row in report["results"])
    assert "FAILED bias_gelu [cpu on cpu, fp64, 70x160 erf] none: RuntimeError: PassManager" in capsys.readouterr().err

    # What an earlier kernel left behind meets PyTorch's own too.
    with monkeypatch.context() as broken:
        broken.setattr(verify, "judge", fails)
        assert main(["verify", "--device", "cpu", "--json"]) == 1
        assert {row["backend"] for row in json.loads(capsys.readouterr().out)["results"]} >= {"any"}

    # Ended in the midst of the last operator, it has written the others.
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(operators, "layer_norm", interrupted)
    assert main(["verify", "--device", "cpu", "--json", str(tmp_path / "verify.json")]) == 130
    report = json.loads((tmp_path / "verify.json").read_text())
    assert report["complete"] is False and report["ok"] is False
    assert {row["operator"] for row in report["results"]} == {"bias_gelu", "depthwise_conv2d"}


def test_verify_in_several_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "CASES", verify.CASES[:2])  # the processes have all, in the same order
    for jobs in (1, 2):
        path = tmp_path / f"{jobs}.json"
        assert main(["verify", "--device", "cpu", "--jobs", str(jobs), "--json", str(path)]) == 0
    assert (tmp_path / "1.json").read_text() == (tmp_path / "2.json").read_text()


def test_numerics_rule():
    exact = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    error = torch.where(torch.arange(1000) % 2 == 0, 1e-3, -1e-3)

    def verdict(factor, ours=None):
        ours = exact + factor * error if ours is None else ours
        return judge(ours.float(), (exact + error).float(), exact, exact)

    assert verdict(1.0).ok
    assert verdict(1.99).ok
    assert not verdict(2.01).ok
    one_outlier = exact + error
    one_outlier[500] += 4e-3
    assert verdict(0, one_outlier).error < verdict(0, one_outlier).allowed
    assert not verdict(0, one_outlier).ok
    assert not verdict(0, exact.clone().fill_(float("nan"))).ok
    assert not verdict(0, exact.clone().index_fill_(0, torch.tensor([3]), float("inf"))).ok
    # Few numbers: their largest is no statistic. None at all: nothing to be wrong.
    assert judge(one_outlier[490:510].float(), (exact + 2 * error)[490:510].float(), exact[490:510], exact[490:510]).ok
    assert judge(*[torch.zeros(0, 3)] * 4).ok
    with pytest.raises(ValueError, match=r"expected a result of shape \(1000,\), got \(10,\)"):
        verdict(0, exact[:10])
