"""A pytest plugin (`-p gpu_rehearsal`) that runs the tests marked `gpu` without a GPU: are the tests themselves right?

rehearsed_device.py is the device. Here it takes the place of PyTorch's and of the backends'.
"""

import contextlib
import functools
import importlib
import os
import sys
import types

import pytest
import torch

from rehearsed_device import MIB, Graph, Mode, OnDevice, machine, memory

FREE_BYTES = 8 << 30  # what mem_get_info says: tests of large tensors skip

# --- torch.cuda

PROPERTIES = types.SimpleNamespace(
    name="rehearsal",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=FREE_BYTES,
    shared_memory_per_block_optin=227 * 1024,
    L2_cache_size=50 * MIB,
)


def reset_peak(device=None):
    memory.peak = memory.live


def patch_torch(patch):
    memory_functions = {
        "memory_allocated": lambda device=None: memory.live,
        "max_memory_allocated": lambda device=None: memory.peak,
        "max_memory_reserved": lambda device=None: memory.peak,
        "reset_peak_memory_stats": reset_peak,
        "mem_get_info": lambda device=None: (FREE_BYTES, FREE_BYTES),
    }
    for name, function in memory_functions.items():
        patch.setattr(torch.cuda, name, function)
        patch.setattr(torch.cuda.memory, name, function)
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "_sleep", lambda cycles: machine.ordered([], []))
    patch.setattr(torch.cuda, "get_device_properties", lambda device=None: PROPERTIES)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (PROPERTIES.major, PROPERTIES.minor))
    patch.setattr(torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state())
    patch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state))
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    # torch.tensor(..., device="cuda") copies where a mode sees it.
    torch._C._set_only_lift_cpu_tensors(True)
    # Otherwise a parameter keeps the tensor's class that it was made with.
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def patch_backends(patch):
    from convnext_kernels import backends, parts, triton_kernels

    def on_the_host(operator):
        overload = getattr(torch.ops.convnext_kernels, operator).default
        return functools.partial(overload.redispatch, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU))

    decide = backends._decide

    def on_the_device(operator, forced, device, arguments):
        function = decide(operator, forced, device, arguments)
        if device.type != "cuda":
            return function
        backend = backends._choose(operator, forced, device, arguments).backend
        if backend == "reference":
            machine.launches[operator, backend] += 1
            return function
        return machine.entry(operator, on_the_host(operator)) if backend == "cuda" else function

    for operator, module in triton_kernels.OPERATORS.items():
        module = importlib.import_module(f"{triton_kernels.__name__}.{module}")
        stand_in = machine.triton(operator, getattr(module, operator), on_the_host(operator))
        patch.setattr(module, operator, stand_in)
    # A block with parameters of another class than PyTorch's calls its layers.
    patch.setattr(parts, "_ORDINARY_TYPES", parts._ORDINARY_TYPES | {OnDevice})
    patch.setitem(backends._DISPATCH_KEYS, "cuda", "CPU")
    patch.setattr(backends, "_decide", on_the_device)
    backends._has_kernel.cache_clear()


# --- pytest

_SESSION = pytest.StashKey()

# By module: shapes that the engine gets through in a second.
SMALLER = {"test_gpu_block": {"STAGE": (4, 96, 12, 12)}}


def begin():
    """Returns what undoes it."""
    patch = pytest.MonkeyPatch()
    patch_torch(patch)
    patch_backends(patch)
    machine.mode = Mode()
    return patch.undo


def leave(status):
    """Ends the process without Python's last steps: autograd's thread for the device may still hold Python's objects,
    and would end it by std::terminate then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status))


@contextlib.contextmanager
def rehearsing():
    """For scripts: all in one."""
    undo = begin()
    try:
        with machine.mode:
            yield
    finally:
        undo()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.add_cleanup(begin())


def pytest_collection_modifyitems(items):
    for name, constants in SMALLER.items():
        for module in {item.module for item in items if item.module.__name__ == name}:
            for constant, value in constants.items():
                assert hasattr(module, constant)
                setattr(module, constant, value)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    with machine.mode:
        return (yield)


def pytest_sessionstart(session):
    session.config.stash[_SESSION] = session


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    with open(os.environ["GPU_REHEARSAL_LAUNCHES"], "w") as file:
        for (operator, backend), count in sorted(machine.launches.items()):
            file.write(f"{operator} {backend} {count}\n")
    if _SESSION in config.stash:
        leave(config.stash[_SESSION].exitstatus)
