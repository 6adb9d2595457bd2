"""`convnext-kernels tune`: its search with an imagined clock, its cache, its arguments. Only the clock needs a GPU."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

import triton

import convnext_kernels  # noqa: F401  (loads the compiled operators)
from convnext_kernels import backends, triton_kernels
from convnext_kernels.__main__ import main
from convnext_kernels.cli import tune
from convnext_kernels.cli.terminal import CommandError
from convnext_kernels.triton_kernels import config, offline
from convnext_kernels.triton_kernels.config import Config
from convnext_kernels.triton_kernels.launch import chip_of_architecture

CPU = torch.device("cpu")


class Machine:
    """Kernels that only ask for their configurations, and a clock that knows how long each takes."""

    def __init__(self, seconds):
        self.seconds = seconds  # kernel -> Config -> seconds
        self.now, self.wrong, self.failing, self.timed = {}, set(), set(), []
        for kernel in seconds:
            config.declare(
                kernel,
                default=lambda problem, kernel=kernel: next(iter(self.seconds[kernel])),
                candidates=lambda problem, kernel=kernel: list(self.seconds[kernel]),
            )

    def launch(self, kernel, channels=96):
        chosen = config.choose(
            kernel, channels=channels, hidden=0, dtype=torch.bfloat16, rows=100, device=torch.device("cpu")
        )
        if (kernel, chosen) in self.failing:
            raise MemoryError("out of resource: shared memory")
        self.now[kernel] = chosen
        return chosen

    def time(self, run):
        self.now = {}
        run()
        self.timed.append(dict(self.now))
        return sum(self.seconds[kernel][chosen] for kernel, chosen in self.now.items())

    def result(self):
        return torch.full((4,), 2.0 if any(pair in self.wrong for pair in self.now.items()) else 1.0)


def sized(*sizes):
    return [Config({"BLOCK": size}) for size in sizes]


@pytest.fixture
def declare(monkeypatch):
    monkeypatch.setattr(config, "_kernels", {})
    config.forget()
    yield Machine
    config.forget()


def best_of(found):
    return {kernel: chosen["BLOCK"] for (kernel, _), chosen in found.items()}


def test_the_fastest_configuration_of_each_kernel_is_found(declare):
    a, b, c = sized(16, 32, 64)
    machine = declare({"first": {a: 3.0, b: 1.0, c: 2.0}, "second": {a: 1.0, b: 5.0}})

    def run():
        machine.launch("first")
        machine.launch("second")
        return (machine.result(),)

    found = tune.Tuner(machine.time).tune(run)
    assert best_of(found) == {"first": 32, "second": 16}
    (problem,) = {problem for _, problem in found}
    assert problem == config.problem_of(channels=96, hidden=0, dtype=torch.bfloat16, rows=100, device=CPU)


def test_what_is_known_is_not_measured_again_and_runs_along(declare):
    a, b = sized(16, 32)
    machine = declare({"first": {a: 3.0, b: 1.0}, "second": {a: 2.0, b: 1.0}})

    def run():
        machine.launch("first")
        machine.launch("second")
        return (machine.result(),)

    problem = config.problem_of(channels=96, hidden=0, dtype=torch.bfloat16, rows=100, device=CPU)
    other = problem._replace(channels=8)
    found = tune.Tuner(machine.time).tune(run, {("first", problem): b, ("second", other): a})
    assert best_of(found) == {"second": 32}
    assert {chosen["first"]["BLOCK"] for chosen in machine.timed} == {32}


def test_forms_are_compared_at_their_best(declare):
    """A form that loses with default configurations wins once its kernels are tuned, and the other way round."""
    one, two = sized(1, 2)
    slow, fast = sized(16, 32)
    free = {one: 0.0, two: 0.0}
    machine = declare({"form": free, "fused": {slow: 3.0, fast: 2.5}, "product": {slow: 9.0, fast: 1.0}})

    def run():
        machine.launch("fused" if machine.launch("form") == one else "product")
        return (machine.result(),)

    assert best_of(tune.Tuner(machine.time).tune(run)) == {"form": 2, "fused": 32, "product": 32}


def test_everything_that_tuning_launches_is_compiled_ahead(declare):
    """Every candidate of every kernel, those of kernels that only another's choice brings in too; no known ones."""
    one, two = sized(1, 2)
    slow, fast = sized(16, 32)
    kernels = {"form": dict.fromkeys((one, two)), "fused": dict.fromkeys((slow, fast)), "product": {slow: 0}}
    machine = declare(kernels)
    launched = set()

    def run():
        first = machine.launch("form")
        name = "fused" if first == one else "product"
        launched.update({("form", first), (name, machine.launch(name))})
        return (machine.result(),)

    found = tune.variants(run)
    launched.clear()
    for overrides in found:
        with tune._overridden(overrides):
            run()
    assert launched == {(kernel, chosen) for kernel, candidates in kernels.items() for chosen in candidates}
    problem = config.problem_of(channels=96, hidden=0, dtype=torch.bfloat16, rows=100, device=CPU)
    assert not any("fused" in overrides for overrides in tune.variants(run, {("fused", problem)}))
    machine.seconds = {kernel: dict.fromkeys(candidates, 1.0) for kernel, candidates in kernels.items()}
    tuner = tune.Tuner(machine.time)
    tuner.tune(run)
    assert {pair for timed in machine.timed for pair in timed.items()} == launched


@pytest.mark.parametrize("jobs", [1, 2])
def test_compiling_processes(jobs, monkeypatch, tmp_path):
    """They leave their work in Triton's cache on disk; what the compiler refuses is left to tuning."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    work = next(w for w in tune.workloads([(24, 3)], [2], [torch.bfloat16]) if w.operator == "layer_norm")
    with tune.Compilers(jobs, chip_of_architecture(90)) as compilers:
        compilers.compile(work, ())
    kernels = list(tmp_path.rglob("*.cubin"))
    assert bool(kernels) == (jobs == 2)
    assert all("_forward_kernel" in path.name for path in kernels)


def test_candidates_that_fail_or_differ_are_passed_over_and_named(declare):
    a, b, c = sized(16, 32, 64)
    machine = declare({"kernel": {a: 3.0, b: 2.0, c: 1.0}})
    machine.failing, machine.wrong = {("kernel", c)}, {("kernel", b)}

    def run():
        machine.launch("kernel")
        return (machine.result(),)

    tuner = tune.Tuner(machine.time, lambda error: isinstance(error, MemoryError))
    assert best_of(tuner.tune(run)) == {"kernel": 16}
    assert len(tuner.refused) == 2
    assert "results are off by 1.0e+00" in tuner.refused[0] and "shared memory" in tuner.refused[1]
    with pytest.raises(MemoryError):  # an error that nobody announced is an error
        tune.Tuner(machine.time).tune(run)


_COMPILERS_OWN = triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (_COMPILERS_OWN, True),
        (triton.runtime.errors.PTXASError("`ptxas` failed with error code 1"), True),
        (RuntimeError("PassManager::run failed"), True),
        (RuntimeError("failed to translate module to LLVM IR"), True),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), True),
        (RuntimeError("layer_norm: argument 'x': expected a tensor, got None"), False),
        (RuntimeError("Cannot find ptxas"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("PassManager::run failed"), False),
    ],
    ids=repr,
)
def test_what_counts_as_a_refused_candidate(error, refused, declare, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    a, b = sized(16, 32)
    machine = declare({"kernel": {a: 3.0, b: 2.0}})

    def run():
        if machine.launch("kernel") == b:
            raise error
        return (machine.result(),)

    tuner = tune.Tuner(machine.time, tune.refuses)
    if refused:
        assert best_of(tuner.tune(run)) == {"kernel": 16}
        assert len(tuner.refused) == 1
    else:
        with pytest.raises(type(error)):
            tuner.tune(run)


def test_a_kernel_that_failed_while_it_ran_is_no_refusal(monkeypatch):
    """CUDA says so once more, to whatever is asked of it."""

    def synchronize():
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        tune.refuses(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))


@pytest.mark.parametrize("message", ["PassManager::run failed", "something else"])
def test_compiling_ahead_leaves_refused_candidates_to_tuning(message, monkeypatch):
    def compile_launch(launch, capability):
        raise RuntimeError(message)

    monkeypatch.setattr(offline, "compile_launch", compile_launch)
    monkeypatch.setattr(tune, "_compiled", set())
    work = next(w for w in tune.workloads([(24, 3)], [2], [torch.bfloat16]) if w.operator == "layer_norm")
    with contextlib.nullcontext() if message.startswith("Pass") else pytest.raises(RuntimeError, match=message):
        tune._compile_variant(work, [], chip_of_architecture(90))
    assert tune._compiled


def test_nan_is_a_difference(declare):
    a, b = sized(16, 32)
    machine = declare({"kernel": {a: 3.0, b: 2.0}})

    def run():
        chosen = machine.launch("kernel")
        return (torch.full((4,), float("nan") if chosen == b else 1.0),)

    assert best_of(tune.Tuner(machine.time).tune(run)) == {"kernel": 16}


def test_what_was_found_is_what_later_launches_take(declare, monkeypatch, tmp_path):
    monkeypatch.setenv("CONVNEXT_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(config, "_capability", lambda index: 90)
    monkeypatch.setattr(config, "chip_name", lambda device: "Chip sm_90")
    a, b = sized(16, 32)
    machine = declare({"kernel": {a: 3.0, b: 1.0}})
    found = tune.Tuner(machine.time).tune(lambda: (machine.launch("kernel"), torch.ones(1))[1:])
    config.write_cache("Chip sm_90", found)
    arguments = {"channels": 96, "hidden": 0, "dtype": torch.bfloat16, "rows": 7}
    assert config.choose("kernel", **arguments, device=torch.device("cuda", 0)) == b
    assert config.choose("kernel", **{**arguments, "channels": 8}, device=torch.device("cuda", 0)) == a


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_workloads_arguments_are_what_the_operators_take(dtype, monkeypatch):
    monkeypatch.setattr(triton_kernels, "OPERATORS", dict.fromkeys(backends.OPERATORS, "some module"))
    work = tune.workloads([(8, 3)], [2], [dtype])
    assert {w.operator for w in work} == set(backends.OPERATORS)
    assert {str(w) for w in work if w.operator == "layer_norm_mlp"} == {
        f"layer_norm_mlp V{v} 8@3 batch 2 {str(dtype)[6:]}" for v in (1, 2)
    }
    for workload in work:
        results = getattr(torch.ops.convnext_kernels, workload.operator)(*tune.arguments_of(workload, CPU))
        for result in results if isinstance(results, tuple) else (results,):
            assert result.isfinite().all()


def test_every_stage_is_one_the_kernels_take_and_every_bucket_is_met():
    stages = [tune._stage_argument(text) for text in tune.STAGES]
    assert all(channels % 8 == 0 for channels, _ in stages) and len(set(stages)) == len(stages)
    rows = {batch * side * side for _, side in stages for batch in tune.BATCHES}
    assert {config.bucket_of(r) for r in rows} == set(config.ROW_BUCKETS)


def test_a_workload_beyond_what_can_be_addressed_is_refused():
    with pytest.raises(CommandError, match=r"8@99999999 batch 128: expected tensors of less than 2\^63 bytes"):
        tune.workloads([(8, 99999999)], [1, 128], [torch.bfloat16])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [[], ["--device", "cpu"]])
def test_without_a_gpu_it_says_so(arguments, capsys):
    assert main(["tune", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err == "convnext-kernels tune: it measures on a GPU, and PyTorch sees none\n" and not printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "96x56"], "--stages: expected CHANNELS@SIZE, such as 96@56, got '96x56'"),
        (["--stages", "100@56"], "--stages: expected channels in multiples of 8, got '100@56'"),
        (["--batch", "0"], "--batch: expected a number above 0, got '0'"),
        (["--batch", "²"], "--batch: expected a number above 0, got '²'"),
        (["--batch", "1" + "0" * 23], "--batch: expected at most 2147483647, got '1000"),
        (["--stages", "8@99999999999"], "--stages: expected at most 2147483647, got '99999999999'"),
        (["--jobs", "100000"], "--jobs: expected at most "),
        (["--dtype", "fp64"], "--dtype: invalid choice: 'fp64'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["tune", *arguments])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.gpu
def test_it_tunes_on_a_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CONVNEXT_KERNELS_CACHE_DIR", str(tmp_path))
    config.forget()
    assert main(["tune", "--stages", "40@7", "--batch", "2"]) == 0
    assert "layer_norm_backward" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 1
    config.forget()
