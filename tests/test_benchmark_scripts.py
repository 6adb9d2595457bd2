"""benchmarks/baseline.py and benchmarks/qualify.sh, the scripts for a machine with a GPU."""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from processes import run

ROOT = Path(__file__).resolve().parent.parent


# --- benchmarks/baseline.py


@pytest.fixture
def baseline(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    options = ["--device", "cpu", "--batch", "2", "--size", "64", "--iters", "1", "--out", tmp_path / "baseline.json"]
    command = [sys.executable, ROOT / "benchmarks" / "baseline.py", *options]

    def start(*arguments):
        done = run(*command, *arguments, cwd=tmp_path)
        path = tmp_path / "baseline.json"
        return done, json.loads(path.read_text()) if path.exists() else None

    return start


def test_baseline_measures_writes_and_goes_on(baseline, tmp_path):
    done, report = baseline("--models", "convnext_atto", "--task", "training")
    assert done.returncode == 0, done.stderr
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["chip"] == "CPU"
    assert [(r["task"], r["precision"], r["status"]) for r in report["results"]] == [
        ("training", "autocast-bf16", "ok"),
        ("training", "pure-bf16", "ok"),
    ]
    for result in report["results"]:
        assert result["images_a_second"] == pytest.approx(2000 / result["ms"])
        assert result["parameters"] == 3695520
    # Another run measures what is missing, keeps what is there, and records what cannot be done.
    done, more = baseline("--models", "convnext_atto", "no_such_model", "--precision", "pure-bf16")
    assert done.returncode == 1
    assert more["results"][:2] == report["results"]
    assert [(r["model"], r["task"], r["status"]) for r in more["results"][2:]] == [
        ("convnext_atto", "inference", "ok"),
        ("no_such_model", "training", "failed"),
        ("no_such_model", "inference", "failed"),
    ]
    assert "no_such_model" in more["results"][3]["message"]
    # Figures of another installation do not get mixed in.
    more["environment"]["torch"] = "1.0"
    (tmp_path / "baseline.json").write_text(json.dumps(more))
    done, unchanged = baseline("--models", "convnext_atto", "--task", "inference")
    assert done.returncode == 1
    assert "measured with torch 1.0" in done.stderr
    assert unchanged == more


def test_baseline_stops_at_its_budget(baseline):
    done, report = baseline("--models", "convnext_atto", "--budget-seconds", "0.2")
    assert done.returncode == 3
    assert report is None
    assert "4 of 4 cases are left" in done.stderr


def test_baseline_gives_up_a_case_that_takes_too_long(baseline):
    done, report = baseline("--models", "convnext_atto", "--precision", "pure-bf16", "--case-seconds", "0.2")
    assert done.returncode == 0
    assert [result["status"] for result in report["results"]] == ["timeout", "timeout"]


def test_baseline_refuses_bad_arguments(baseline):
    for arguments, message in (
        (["--batch", "0"], "expected numbers of at least 1"),
        (["--part", "everything"], "invalid choice: 'everything'"),
        (["--out", "/no/such/folder/x.json"], "does not exist"),
    ):
        done, _ = baseline(*arguments)
        assert done.returncode == 2
        assert message in done.stderr


# --- benchmarks/qualify.sh


@pytest.fixture
def qualify(tmp_path, monkeypatch):
    """qualify.sh with a GPU and an interpreter that are stand-ins: the interpreter notes what it is asked to do."""
    calls = tmp_path / "calls"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)  # it would show in every call

    def start(*parts, gpu="echo 9.0; echo 9.0", python="exit 0", plugins=False, **environment):
        python = f'case "$*" in "-c import "*) exit {int(not plugins)};; esac\n{python}'
        for name, body in (("nvidia-smi", gpu), ("python", f'echo "$TORCH_CUDA_ARCH_LIST $*" >> {calls}\n{python}')):
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), **environment}
        done = run("bash", ROOT / "benchmarks" / "qualify.sh", *parts, cwd=tmp_path, **environment)
        listed = calls.read_text().splitlines() if calls.exists() else []
        return done, [call for call in listed if "-c import " not in call]

    return start


def test_qualify_runs_every_part(qualify, tmp_path):
    done, calls = qualify("all", tmp_path / "out", WORKERS="3")
    assert done.returncode == 0, done.stdout + done.stderr
    install = f"9.0 -m pip install --verbose --no-build-isolation --no-deps {ROOT}"
    triton = " ".join(map(str, sorted((ROOT / "tests").glob("test_gpu_triton*"))))
    tests = "-m pytest -m gpu --test-budget 490"
    assert [re.split(r" --(?:benchmark-)?json| --out", call)[0].strip() for call in calls] == [
        install,
        "-m convnext_kernels info",
        install,
        f"{tests} tests --ignore-glob=tests/test_gpu_triton* --ignore=tests/test_gpu_sanitizer.py"
        " --deselect=tests/test_tune.py::test_it_tunes_on_a_gpu",
        install,
        f"{tests} {triton}",
        install,
        "-m pytest -m gpu tests/test_gpu_sanitizer.py",
        install,
        "-m convnext_kernels verify --device cuda --jobs 3",
        install,
        "-m convnext_kernels tune --batch 128 --stages 96@56 192@28 384@14 768@7 128@56 256@28 512@14 1024@7",
        install,
        suite("operators"),
        install,
        suite("model"),
        install,
        suite("block"),
        install,
        f"-m benchmarks.counters --budget 440 --csv {tmp_path}/out/counters.csv",
        f"{ROOT}/benchmarks/baseline.py --part eager",
    ]
    parts = ("build", "test", "test-triton", "sanitize", "verify", "tune", "operators", "models", "blocks", "counters")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{part}.log" for part in (*parts, "baseline")}


def suite(name, providers="not compile and not autotune"):
    """The call that measures one of the suite's files."""
    options = f"--benchmark-only -q --device cuda -k {providers} --budget 440"
    return f"-m pytest benchmarks/test_{name}.py {options}"


def test_qualify_measures_what_compiles_apart(qualify, tmp_path):
    done, calls = qualify("blocks-compile", "bench", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    providers = "compile or autotune or ours] or eager] or timm]"
    assert calls[1].strip() == f"{suite('block', providers)} --benchmark-json {tmp_path}/out/blocks-compile.json"
    assert calls[3].strip() == f"-m convnext_kernels bench --device cuda --json {tmp_path}/out/bench.json"
    # Together the two parts choose every provider.
    command = [sys.executable, "-m", "pytest", "benchmarks/test_block.py", "--collect-only", "-q", "--device", "cpu"]
    listed = [
        set(re.findall(r"test_block\[.*", run(*command, "-k", chosen, cwd=ROOT).stdout))
        for chosen in ("", "not compile and not autotune", providers)
    ]
    assert listed[0] == listed[1] | listed[2]
    assert {name.rsplit("-", 1)[1] for name in listed[1] & listed[2]} == {"ours]", "eager]", "timm]"}


def test_qualify_is_honest_about_failures(qualify, tmp_path):
    done, calls = qualify("all", tmp_path / "out", python=r'case "$*" in *-m\ pytest*) echo broken; exit 7;; esac')
    assert done.returncode == 1
    assert "=== test: FAILED with exit code 7" in done.stderr
    assert "qualify.sh: failed: test test-triton sanitize operators models blocks\n" in done.stderr
    assert (tmp_path / "out" / "test.log").read_text() == "broken\n"
    assert any("baseline" in call for call in calls)  # the parts after it ran
    done, calls = qualify("verify", "bench", OUT=str(tmp_path / "out"), python='case "$*" in *pip*) exit 3;; esac')
    assert done.returncode == 1
    assert "qualify.sh: failed: verify bench" in done.stderr


def test_qualify_keeps_to_its_time(qualify, tmp_path):
    start = time.monotonic()
    done, _ = qualify("bench=1", tmp_path / "out", python="exec sleep 60")
    assert done.returncode == 1
    assert "=== bench: FAILED with exit code 124" in done.stderr
    assert time.monotonic() - start < 30
    done, calls = qualify("test=90", "models=300", "operators=60", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [int(found[1]) for call in calls if (found := re.search(r"budget (\d+)", call))] == [60, 210, 40]


def test_qualify_runs_the_tests_in_several_processes_where_it_can(qualify, tmp_path):
    done, calls = qualify("test", "test-triton", tmp_path / "out", plugins=True, WORKERS="5")
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [call for call in calls if "pytest" in call]
    assert len(tests) == 2
    options = "-n 5 --dist worksteal --timeout 100 --timeout-method thread --test-budget 490"
    assert all(f" -m gpu {options} " in call for call in tests)


def test_qualify_runs_the_checkout_with_libraries_that_are_there(qualify, tmp_path):
    (tmp_path / "libraries").mkdir()
    shown = 'echo "libraries $CONVNEXT_KERNELS_LIBRARY_DIR path $PYTHONPATH"'
    environment = {"CONVNEXT_KERNELS_LIBRARY_DIR": "libraries", "PYTHONPATH": ""}
    done, calls = qualify("verify", "build", "out", python=shown, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [("pip install" in call, call.split()[-1]) for call in calls] == [
        (False, f"{tmp_path}/out/verify.json"),
        (True, str(ROOT)),
        (False, "info"),
    ]
    assert (tmp_path / "out" / "verify.log").read_text() == f"libraries {tmp_path}/libraries path {ROOT}\n"
    # What was installed answers for itself.
    assert (tmp_path / "out" / "build.log").read_text().splitlines()[-1] == "libraries  path "


def test_qualify_takes_unfinished_tuning_for_a_success(qualify, tmp_path):
    done, _ = qualify("tune=3", tmp_path / "out", python='case "$*" in *tune*) exec sleep 60;; esac')
    assert done.returncode == 0, done.stdout + done.stderr
    done, _ = qualify("tune", tmp_path / "out", python='case "$*" in *tune*) exit 2;; esac')
    assert done.returncode == 1
    assert "=== tune: FAILED with exit code 2" in done.stderr


def test_qualify_takes_an_unfinished_baseline_for_a_success(qualify, tmp_path):
    done, calls = qualify("baseline-compile", tmp_path / "out", python="exit 3")
    assert done.returncode == 0
    assert len(calls) == 1
    assert "--part compile --out" in calls[0]
    assert qualify("baseline-compile", tmp_path / "out", python="exit 1")[0].returncode == 1


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        (["tset", "bench"], {}, "benchmarks/qualify.sh PART[=SECONDS]... [OUT_DIR]"),
        (["test=9m", "out"], {}, "benchmarks/qualify.sh PART[=SECONDS]... [OUT_DIR]"),
        (["--fast"], {}, "benchmarks/qualify.sh PART[=SECONDS]... [OUT_DIR]"),
        ([], {}, "benchmarks/qualify.sh PART[=SECONDS]... [OUT_DIR]"),
        (["build"], {"OUT": ""}, "benchmarks/qualify.sh PART[=SECONDS]... [OUT_DIR]"),
        (["build", "out"], {"gpu": "exit 9"}, "nvidia-smi finds no GPU"),
    ],
)
def test_qualify_refuses_bad_usage(qualify, parts, options, message):
    done, calls = qualify(*parts, **options)
    assert done.returncode == 2
    assert message in done.stderr
    assert calls == []
