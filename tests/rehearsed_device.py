"""A GPU that is not there, for gpu_rehearsal.py: tensors on it, what CUDA refuses, streams, graphs, memory.

A tensor on "cuda" is an `OnDevice`: for PyTorch it is on cuda:0, with CUDA's autograd, autocast and streams; its memory
is a CPU tensor, and what reaches the device runs there: PyTorch's operators on the CPU, ours by the CUDA entries as
tests/cuda_entries.py compiles them. The few functions of CUDA's that PyTorch calls on the way are
tests/cuda_on_host/driver.cpp. Refused, as on a GPU, is

    a tensor on another device among those of an operator;
    waiting for the device while a graph is captured, or under set_sync_debug_mode("error");
    reading what another stream wrote, or the reverse, without an event or the host's waiting in between.

What is captured computes nothing until it is replayed. Memory is counted as PyTorch's allocator does, with cuBLAS's
workspace. Of the Triton backend everything but the kernels runs: their results are the CUDA entries'.
"""

import ctypes
import functools
import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
driver = ctypes.CDLL("libcuda.so.1")  # preloaded
driver.rehearsal_launch.argtypes = [ctypes.c_uint64]
driver.rehearsal_launch.restype = ctypes.c_long
driver.rehearsal_is_after.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_long]

# --- memory, as PyTorch's caching allocator counts it

MIB = 1 << 20


def block_bytes(size):
    """Of the block that a fresh segment gives: what is left of a large one is split off where it is over 1 MiB."""
    size = max(-(-size // 512) * 512, 512)
    rest = -size % (2 * MIB) if size >= 10 * MIB else 0
    return size + (rest if rest <= MIB else 0)


class Memory:
    live = peak = 0

    def add(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)

    def remove(self, size):
        self.live -= size


memory = Memory()


class Storage:
    """What is known about an allocation: its last writer and readers (stream, launch), and the capture it is of."""

    known = {}  # noqa: RUF012

    def __init__(self, size, capture):
        self.size, self.capture = size, capture
        self.write, self.reads = None, {}

    @classmethod
    def of(cls, on_host):
        storage = on_host.untyped_storage()
        key = storage._cdata
        found = cls.known.get(key)
        if found is None:
            found = cls.known[key] = cls(block_bytes(storage.nbytes()) if storage.nbytes() else 0, machine.capture)
            memory.add(found.size)
            weakref.finalize(storage, cls.forget, key, found.size)
        return found

    @classmethod
    def forget(cls, key, size):
        del cls.known[key]
        memory.remove(size)


# --- tensors


class OnDevice(torch.Tensor):
    @staticmethod
    def __new__(cls, on_host):
        tensor = torch.Tensor._make_wrapper_subclass(
            *(cls, on_host.shape, on_host.stride(), on_host.storage_offset()),
            dtype=on_host.dtype,
            device=DEVICE,
        )
        tensor.on_host = on_host
        Storage.of(on_host)
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return machine.run(func, args, kwargs or {})

    def data_ptr(self):
        return self.on_host.data_ptr()

    def __repr__(self):
        return f"OnDevice({self.on_host})"

    def __deepcopy__(self, memo):
        assert self.is_leaf
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy._is_param = True
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol):
        state = self.on_host, self.requires_grad, isinstance(self, torch.nn.Parameter)
        return _rebuilt, state


def _rebuilt(on_host, requires_grad, is_parameter):
    tensor = OnDevice(on_host).requires_grad_(requires_grad)
    if is_parameter:
        tensor._is_param = True
    return tensor


def on_host(value):
    return value.on_host if isinstance(value, OnDevice) else value


def tensors_in(values):
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


# --- the device

aten = torch.ops.aten
# They give the host a number, or a size that depends on one.
WAITS = {
    *[aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.is_nonzero, aten._unique2],
    *[aten.unique_dim, aten.unique_consecutive, aten.bincount],
}
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._addmm_activation}
CUBLAS_WORKSPACE = 32 * MIB  # of a handle and stream on sm_90
# A CPU tensor is what they are for, or a number that a kernel gets as an argument.
MIXED = {aten._to_copy, aten.copy_}


class Refused(RuntimeError):
    """What CUDA or PyTorch refuses."""


class Machine:
    def __init__(self):
        self.capture = None
        self.launches = Counter()  # of our operators, by (operator, backend)
        self.products = set()  # streams whose cuBLAS handle has its workspace
        self.generators = {}  # by id: CUDA's, and one on the host in its place
        self.mode = None

    def stream(self):
        return torch._C._cuda_getCurrentRawStream(0)

    # --- rules

    def waits(self, what):
        """The host waits for the device."""
        if self.capture:
            raise Refused(f"CUDA error: operation not permitted when stream is capturing ({what})")
        if torch._C._cuda_get_sync_debug_mode() == 2:
            raise Refused(f"called a synchronizing CUDA operation ({what})")

    def ordered(self, reads, writes):
        """A launch on the current stream."""
        if self.capture:
            return
        stream = self.stream()

        def check(earlier, what):
            if not driver.rehearsal_is_after(stream, *earlier):
                raise Refused(f"stream {stream:#x} {what} of stream {earlier[0]:#x} without waiting for it")

        for storage in {*reads, *writes}:
            if storage.write:
                check(storage.write, "meets a write")
        for storage in writes:
            for reader in storage.reads.items():
                check(reader, "overwrites what a kernel reads")
        now = driver.rehearsal_launch(stream)
        for storage in reads:
            storage.reads[stream] = now
        for storage in writes:
            storage.write, storage.reads = (stream, now), {}

    def host_reads(self, on_host, what):
        self.waits(what)
        self.ordered([Storage.of(on_host)], [])
        torch._C._cuda_synchronize()

    # --- operators

    def run(self, func, args, kwargs):
        name = func._schema.name.split("::")[1]
        if func.namespace == "convnext_kernels":
            return self.run_ours(name, func, args, kwargs)
        given = tensors_in((args, kwargs))
        ours = [t for t in given if isinstance(t, OnDevice)]
        device = next((value for a, value in self.named(func, args, kwargs) if a.name == "device"), None)
        if not ours and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self.mode:
                return func.decompose(*args, **kwargs)
        assert device is None or "device" in kwargs
        if device is not None and device.index not in (None, 0):
            raise Refused(f"CUDA error: invalid device ordinal ({device})")
        packet = func.overloadpacket
        to_host = device is not None and device.type == "cpu"
        if device is not None and device.type == "meta":
            return func(*tree_map(lambda t: t.on_host.to("meta") if isinstance(t, OnDevice) else t, args), **kwargs)
        non_blocking = next((value for a, value in self.named(func, args, kwargs) if a.name == "non_blocking"), False)
        self.check_devices(packet, given, non_blocking)
        if packet in WAITS or self.has_mask(packet, args):
            self.waits(func)
            if ours:
                self.ordered([Storage.of(t.on_host) for t in ours], [])
                torch._C._cuda_synchronize()
        if packet is aten.copy_ and not isinstance(args[0], OnDevice):
            self.host_reads(args[1].on_host, func)
            args[0].copy_(args[1].on_host)
            return args[0]
        if to_host:
            self.host_reads(args[0].on_host, func)
            # A copy always: never the same memory.
            return func(*tree_map(on_host, args), **{**kwargs, "device": torch.device("cpu")}).clone()
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cuda":
            if id(generator) not in self.generators:
                on_cpu = torch.Generator().manual_seed(generator.initial_seed())
                self.generators[id(generator)] = generator, on_cpu
            kwargs = {**kwargs, "generator": self.generators[id(generator)][1]}
        if packet in PRODUCTS:
            self.take_workspace()
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
            if "pin_memory" not in {argument.name for argument in func._schema.arguments}:
                del kwargs["pin_memory"]
        host_args, host_kwargs = tree_map(on_host, (args, kwargs))
        wrote = [
            value
            for argument, value in self.named(func, args, kwargs)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if self.capture:
            self.capture.keep([t.on_host for t in tensors_in(wrote)])
        if packet is aten._to_copy and not ours:
            # Also where the dtype is the same.
            result = func(*host_args, **host_kwargs).clone(memory_format=torch.preserve_format)
        else:
            result = func(*host_args, **host_kwargs)
        if packet in (aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided):
            forget(result)
        results = tensors_in(result)
        if self.capture:
            self.capture.record(func, host_args, host_kwargs, results)
        if not results:  # a number
            return result
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view:
            written = [Storage.of(t.on_host) for t in tensors_in(wrote)] or [Storage.of(t) for t in results]
            self.ordered([Storage.of(t.on_host) for t in ours], written)
        wrapped = tree_map(lambda t: OnDevice(t) if isinstance(t, torch.Tensor) else t, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if ours else wrapped

    def named(self, func, args, kwargs):
        for i, argument in enumerate(func._schema.arguments):
            if i < len(args):
                yield argument, args[i]
            elif argument.name in kwargs:
                yield argument, kwargs[argument.name]

    def check_devices(self, packet, given, non_blocking):
        for tensor in given:
            if isinstance(tensor, OnDevice):
                continue
            if packet in MIXED:
                if tensor.device.type == "cpu" and (self.capture or not non_blocking):
                    self.waits(f"{packet}: a copy from pageable memory")
            elif tensor.device.type == "cpu" and packet in (aten.index, aten.index_put_, aten.index_put):
                if tensor.dim() or packet is aten.index:
                    self.waits(f"{packet}: indices from the host")
            elif tensor.device.type != "cpu" or tensor.dim():
                raise Refused(f"{packet}: expected all tensors to be on the same device, not {tensor.device} too")

    def has_mask(self, packet, args):
        """Indices from a mask: how many there are, the host has to know."""
        if packet not in (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_):
            return False
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])

    def take_workspace(self):
        stream = self.stream()
        if stream not in self.products:
            self.products.add(stream)
            memory.add(CUBLAS_WORKSPACE)

    # --- our operators

    def run_ours(self, name, func, args, kwargs):
        from convnext_kernels import backends
        from convnext_kernels.operators import block

        if not any(isinstance(t, OnDevice) for t in tensors_in(args)):
            return func(*args, **kwargs)
        with self.mode:
            if name in backends.OPERATORS:
                return backends._implementation(name, backends._forced, args)(*args)
            composition = {"convnext_block": block._forward, "convnext_block_backward": block._backward}
            return composition[name](*args)

    def entry(self, operator, call):
        """A CUDA entry."""

        def run(*args):
            self.launches[operator, "cuda"] += 1
            if operator.startswith("layer_norm_mlp"):  # with matrix products
                self.take_workspace()

            # A tensor of the host's is of another device than the entry's.
            def given(value):
                if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice):
                    return value.to("meta")
                return on_host(value)

            host_args = tree_map(given, args)
            with self.mode, Workspace():
                results = call(*host_args)
            if self.capture:
                self.capture.record(call, host_args, {}, tensors_in(results))
            self.ordered(
                [Storage.of(t) for t in tensors_in(host_args) if t.device.type == "cpu"],
                [Storage.of(t) for t in tensors_in(results)],
            )
            return tree_map(lambda t: OnDevice(t) if isinstance(t, torch.Tensor) else t, results)

        return run

    def triton(self, operator, function, call):
        """An operator's function in the Triton backend: what its kernels would write comes from the CUDA entry."""
        from convnext_kernels.triton_kernels import launch

        @functools.wraps(function)
        def run(*args, **options):
            if not any(isinstance(t, OnDevice) for t in tensors_in(args)):
                return function(*args, **options)
            self.launches[operator, "triton"] += 1
            with launch.recorded(launch.chip_of_architecture(90)):
                results = function(*args, **options)
            host_args = tree_map(on_host, args)
            targets = [t.on_host for t in tensors_in(results)]

            def compute(*host_args):
                for target, value in zip(targets, tensors_in(call(*host_args)), strict=True):
                    assert target.shape == value.shape and target.dtype == value.dtype, operator
                    target.copy_(value)
                return targets

            with _disable_current_modes():
                compute(*host_args)
            if self.capture:
                self.capture.record(compute, host_args, {}, targets)
            self.ordered([Storage.of(t) for t in tensors_in(host_args)], [Storage.of(t) for t in targets])
            return results

        return run


def forget(result):
    """Fresh memory holds anything."""
    for tensor in tensors_in(result):
        if tensor.is_floating_point() and tensor.numel():
            tensor.fill_(float("nan"))


machine = Machine()


class Mode(TorchDispatchMode):
    """Every operator, those without a tensor among their arguments too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if Workspace.open and func.overloadpacket in (aten.new_empty, aten.empty, aten.new_zeros, aten._to_copy):
            result = func(*args, **(kwargs or {}))
            Storage.of(result)
            return result
        return machine.run(func, args, kwargs or {})


class Workspace:
    """Inside: what a compiled operator allocates on the host is device memory."""

    open = 0

    def __enter__(self):
        Workspace.open += 1

    def __exit__(self, *error):
        Workspace.open -= 1


# --- graphs


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph=False):
        self.calls = []  # function, arguments, results
        self.kept = {}  # of what is written: the storage and what it held
        self.captured = False

    def capture_begin(self, pool=None, capture_error_mode="global", **_):
        if machine.stream() == 0:
            raise Refused("CUDA graphs must be captured on a non-default stream")
        assert machine.capture is None
        machine.capture = self
        driver.rehearsal_capture(1)

    def capture_end(self):
        machine.capture = None
        driver.rehearsal_capture(0)
        self.captured = True
        # Nothing ran: results hold anything, and what was there holds what it held.
        for _, _, _, results in self.calls:
            for result in results:
                if Storage.of(result).capture is self:
                    forget(result)
        for storage, held in self.kept.values():
            storage.copy_(held)
        self.kept = {}

    def keep(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if Storage.of(tensor).capture is not self and storage._cdata not in self.kept:
                self.kept[storage._cdata] = storage, storage.clone()

    def record(self, function, args, kwargs, results):
        self.calls.append((function, args, kwargs, results))

    def replay(self):
        assert self.captured
        touched = {Storage.of(t) for _, args, kwargs, _ in self.calls for t in tensors_in((args, kwargs))}
        machine.ordered(touched, {s for _, _, _, results in self.calls for s in map(Storage.of, results)})
        for function, args, kwargs, results in self.calls:
            for old, new in zip(results, tensors_in(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reset(self):
        self.calls = []

    def pool(self):
        return 0, 0
