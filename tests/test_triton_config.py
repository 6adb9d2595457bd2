"""Configurations of the Triton kernels: declared, tabled, cached, chosen by bucket, and never tuned at a launch."""

import json
import logging
import timeit

import pytest
import torch

from convnext_kernels.triton_kernels import config, table
from convnext_kernels.triton_kernels.config import Config, Entry, Problem

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
DEFAULT = Config({"BLOCK": 32}, 4, 1)


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A declared kernel, an empty cache folder and a GPU called Chip with capability 9.0."""
    monkeypatch.setenv("CONVNEXT_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(config, "_kernels", {})
    monkeypatch.setattr(config, "_capability", lambda index: 90)
    monkeypatch.setattr(config, "chip_name", lambda device: "Chip sm_90")
    monkeypatch.setattr(table, "TABLE", {})
    config.forget()
    monkeypatch.setattr(config, "_untuned_chips", set())
    config.declare(
        "test", default=lambda problem: DEFAULT, candidates=lambda problem: [Config({"BLOCK": 64}, 8, 2), DEFAULT]
    )
    yield "test"
    config.forget()


def choose(rows=100, device=GPU, channels=96, dtype=torch.bfloat16):
    return config.choose("test", channels=channels, hidden=384, dtype=dtype, rows=rows, device=device)


def test_a_config_is_what_a_launch_takes():
    c = Config({"BLOCK_M": 64}, num_warps=8, num_stages=3)
    assert dict(c.meta) == {"BLOCK_M": 64, "num_warps": 8, "num_stages": 3} and c["BLOCK_M"] == 64
    assert c == Config({"BLOCK_M": 64}, 8, 3) and hash(c) == hash(Config({"BLOCK_M": 64}, 8, 3))
    assert c != Config({"BLOCK_M": 64}, 4, 3)
    with pytest.raises(AttributeError, match="immutable"):
        c.num_warps = 4
    with pytest.raises(ValueError, match="got 3"):
        Config({}, num_warps=3)


def test_a_missing_entry_takes_the_default_and_says_so_once(kernel, caplog):
    with caplog.at_level(logging.WARNING, logger="convnext_kernels"):
        assert choose() == DEFAULT and choose(channels=8) == DEFAULT
        config.declare("another", default=lambda problem: DEFAULT)
        other = {"channels": 96, "hidden": 384, "dtype": torch.bfloat16, "rows": 100, "device": GPU}
        assert config.choose("another", **other) == DEFAULT
    assert [r.getMessage() for r in caplog.records] == [
        "the Triton kernels (test is the first) run with default configurations: none are known for these problems on "
        "sm_90 (`convnext-kernels tune` finds them)"
    ]
    caplog.clear()
    assert choose(device=CPU) == DEFAULT and not caplog.records  # the interpreter has nothing to tune


def test_the_first_entry_of_the_table_that_fits_is_taken(kernel, monkeypatch, caplog):
    narrow, wide = Config({"BLOCK": 16}), Config({"BLOCK": 128})
    entries = Entry(narrow, channels=96, dtypes=(torch.bfloat16,), chips=(90, 100), rows=1024), Entry(wide, hidden=384)
    monkeypatch.setattr(table, "TABLE", {kernel: entries})
    config.forget()
    assert choose(rows=1024) == narrow
    assert choose(rows=1025) == choose(channels=8) == choose(dtype=torch.float32) == wide
    assert not caplog.records
    monkeypatch.setattr(config, "_capability", lambda index: 80)
    config.forget()
    assert choose() == wide


def test_the_choice_depends_on_the_bucket_of_rows_only(kernel):
    for low, high in zip((0, *config.ROW_BUCKETS), config.ROW_BUCKETS):
        assert config.bucket_of(low + 1) == config.bucket_of(high) == high
    before = config._chosen.cache_info().misses
    for rows in range(1, 1000, 7):
        choose(rows)
    assert config._chosen.cache_info().misses == before + 1


def test_the_cache_goes_before_the_table_and_survives_the_process(kernel, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "TABLE", {kernel: (Entry(Config({"BLOCK": 16})),)})
    problem = config.problem_of(channels=96, hidden=384, dtype=torch.bfloat16, rows=100, device=GPU)
    tuned = Config({"BLOCK": 256}, 8, 4)
    path = config.write_cache("Chip sm_90", {(kernel, problem): tuned})
    assert path.parent == tmp_path and "Chip_sm_90" in path.name
    assert choose() == tuned and choose(rows=10**6) == Config({"BLOCK": 16})
    config.write_cache("Chip sm_90", {(kernel, problem._replace(channels=8)): DEFAULT})  # adds, does not replace
    assert choose() == tuned and choose(channels=8) == DEFAULT
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    versions = json.loads(path.read_text())
    assert versions["chip"] == "Chip sm_90" and versions["triton"] and versions["convnext_kernels"]


def test_the_cache_is_kept_by_chip_and_versions(kernel, monkeypatch):
    one = config.cache_file("Chip sm_90")
    assert config.cache_file("Other sm_90") != one
    monkeypatch.setattr(config, "_versions", lambda: {"convnext_kernels": "0", "triton": "0"})
    assert config.cache_file("Chip sm_90") != one


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"entries": [{"kernel": "test"}]}', '{"entries": [{"dtype": "load"}]}']
)
def test_a_broken_cache_is_named_and_left_aside(kernel, content, caplog):
    config.cache_file("Chip sm_90").write_text(content)
    assert choose() == DEFAULT
    assert str(config.cache_file("Chip sm_90")) in caplog.records[0].getMessage()


def test_a_cached_entry_of_another_kernel_version_is_not_used(kernel):
    problem = config.problem_of(channels=96, hidden=384, dtype=torch.bfloat16, rows=100, device=GPU)
    config.write_cache("Chip sm_90", {(kernel, problem): Config({"OLD_NAME": 256})})
    assert choose() == DEFAULT


def test_override(kernel):
    forced = Config({"BLOCK": 8})
    with config.override(kernel, forced):
        assert choose() == choose(channels=1) == forced
        with config.override(kernel, DEFAULT):
            assert choose() == DEFAULT
        assert choose() == forced
    assert choose() == DEFAULT
    with pytest.raises(ValueError, match="expected one of"), config.override("unknown", forced):
        pass


def test_candidates_start_with_what_runs_now(kernel):
    problem = Problem(96, 384, torch.bfloat16, 1024, 90)
    assert config.candidates(kernel, problem) == [DEFAULT, Config({"BLOCK": 64}, 8, 2)]


def test_a_choice_measures_nothing_and_is_a_look_up(kernel, monkeypatch):
    choose()

    def forbidden(*_):
        raise AssertionError("a choice that was made before looked something up again")

    monkeypatch.setattr(config, "chip_of", forbidden)
    monkeypatch.setattr(config, "_resolve", forbidden)
    assert choose(rows=99) == DEFAULT
    # Far above what it takes: this is a bound on its kind, not on its speed.
    assert timeit.timeit(choose, number=1000) < 0.5


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("CONVNEXT_KERNELS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert config.cache_file("Chip").parent == tmp_path / "convnext_kernels"
    monkeypatch.setenv("CONVNEXT_KERNELS_CACHE_DIR", str(tmp_path / "mine"))
    assert config.cache_file("Chip").parent == tmp_path / "mine"


def test_names_are_declared_once(kernel):
    with pytest.raises(ValueError, match="declared already"):
        config.declare(kernel, default=lambda problem: DEFAULT)
