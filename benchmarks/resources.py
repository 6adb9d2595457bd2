"""What the compiled CUDA kernels need of a GPU, and what their main loops issue: no GPU is used.

python -m benchmarks.resources                       the CUDA sources, compiled for sm_80, 90 and 120
python -m benchmarks.resources --arch 86 100         for others; `all`: sm_80, 86, 89, 90, 100, 120
python -m benchmarks.resources --kernel convolution  only kernels whose name matches
python -m benchmarks.resources --triton              the Triton kernels at a ConvNeXt-T's stages, batch 128, bf16
python -m benchmarks.resources --cubin FILE ...      kernels that are compiled already
... --json FILE                                      the same as data

A kernel's main loop is the smallest one that holds nine in ten of the FMA and tensor instructions that any loop holds
(without any such instruction: the longest). Shares are of the instructions issued in one turn; waiting is not in them.
Occupancy is that of a typical launch (TYPICAL), by registers, threads and shared memory.

Needs nvcc (found as for the build), and cuobjdump and nvdisasm: beside nvcc, on PATH, or in Triton's package.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # `python benchmarks/resources.py`
    sys.path.insert(0, str(ROOT))

from build_tools import ninja_build, toolchain  # noqa: E402

ALL_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
USUAL_ARCHITECTURES = (80, 90, 120)


class ResourceError(Exception):
    """A tool is missing or failed; the message says which and why."""


# --- tools


def find_tool(name: str) -> Path:
    """`name` of NVIDIA's binary tools: beside nvcc, on PATH, or in Triton's package.

    Raises:
        ResourceError: there is none.
    """
    toolkit, _ = toolchain.find_toolkit()
    beside = [toolkit.nvcc.parent, toolkit.cudart.parent.parent / "bin"] if toolkit else []
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations if triton else None
    package = [Path(folder, "backends", "nvidia", "bin") for folder in folders or ()]
    on_path = shutil.which(name)
    candidates = [folder / name for folder in beside] + [Path(on_path or name)] + [folder / name for folder in package]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ResourceError(f"{name} is needed: it comes with the CUDA toolkit, and with the package triton")


def _run(command: Iterable[object]) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ResourceError(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def demangle(names: list[str]) -> list[str]:
    """Short readable names: without return type, parameters and our own namespaces. Others stay as they are."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool and names:
        done = subprocess.run([tool], input="\n".join(names) + "\n", capture_output=True, text=True)
        if done.returncode == 0:
            names = done.stdout.splitlines()
    return [_short(name) for name in names]


def _short(name: str) -> str:
    name = re.sub(r"\bconvnext_kernels::(\w+::(?=\w+_kernel))?|^void ", "", name)
    name = re.sub(r"\(\w+(?:::\w+)*\)(?=\d)", "", name)  # (int)8, (bool)1 and enumerators as template arguments
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">" and name[i - 1] != "-")
        if letter == "(" and depth == 0:
            end = i
            break
    return name[:end].replace("__nv_bfloat16", "bf16").replace("__half", "half")


# --- what compiler and disassembler say


@dataclass
class Kernel:
    """One kernel of a cubin. Bytes are those of a thread for stack and spills, of a block for shared memory."""

    name: str
    registers: int
    stack: int
    static_shared: int
    spill_stores: int | None = None  # None: the compiler's report is not at hand
    spill_loads: int | None = None
    most_threads: int | None = None  # of a block, by its launch bounds
    local_accesses: int = 0  # instructions that touch spilled registers or the stack
    instructions: int = 0
    loop_instructions: int = 0  # 0: no loop
    loop: dict[str, int] = dataclasses.field(default_factory=dict)  # kind of instruction -> in one turn

    def share(self, kind: str) -> float:
        """The part of the main loop's instructions that are of a kind."""
        return self.loop.get(kind, 0) / self.loop_instructions if self.loop_instructions else 0.0


COMPILED = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for 'sm_\w+'.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
SPILLS = re.compile(
    r"Function properties for (?P<name>\S+)\s+(?P<stack>\d+) bytes stack frame, "
    r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads"
)
USAGE = re.compile(r"Function (?P<name>[^\s:]+):\s*REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)")
SECTION = re.compile(r"^\t\.section\t\.text\.(?P<name>[^,\s]+),", re.MULTILINE)
INFORMATION = re.compile(r"^\t\.section\t\.nv\.info\.(?P<name>[^,\s]+),", re.MULTILINE)
MOST_THREADS = re.compile(
    r"EIATTR_MAX_THREADS.*?\.word\s+(0x[0-9a-f]+).*?\.word\s+(0x[0-9a-f]+).*?\.word\s+(0x[0-9a-f]+)", re.DOTALL
)
LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*);"
)
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


def parse_ptxas(report: str) -> dict[str, dict[str, int]]:
    """Mangled name -> registers, stack, spill_stores and spill_loads, from `-Xptxas -v`."""
    spills = {match["name"]: match.groupdict() for match in SPILLS.finditer(report)}
    found = {}
    for match in COMPILED.finditer(report):
        if match["name"] not in spills:
            raise ResourceError(f"the compiler's report has no line about the stack of {match['name']}")
        numbers = {key: int(value) for key, value in spills[match["name"]].items() if key != "name"}
        found[match["name"]] = {"registers": int(match["registers"]), **numbers}
    return found


def kind_of(opcode: str, operands: str = "") -> str:
    """FFMA, HMMA, LDS, LDSM, STS, LDG, STG, LDGSTS, convert, MUFU, BAR or other."""
    base = opcode.split(".", 1)[0]
    if base in ("FFMA", "FFMA2"):
        return "FFMA"
    if base.endswith("MMA"):  # HFMA2.MMA, which is no matrix product, has another base
        return "HMMA"
    if base in ("LDS", "LDSM", "STS", "LDG", "STG", "LDGSTS", "MUFU", "BAR"):
        return base
    if base in ("F2F", "F2FP", "PRMT", "I2F", "F2I", "I2FP") or opcode.startswith("HADD2.F32"):
        return "convert"
    # bfloat16 is the upper half of a float: a shift by 16, a product with 2^16, or a mask.
    shifted = {"SHL": "0x10", "SHF": "0x10", "IMAD": "0x10000", "LOP3": "0xffff0000"}.get(base)
    if shifted and re.search(rf", {shifted}\b", operands):
        return "convert"
    return "other"


def main_loop(lines: Iterable[str]) -> tuple[int, int, list[tuple[str, str]]]:
    """All instructions, those on local memory, and the main loop as (opcode, operands), from a kernel's text."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in lines:
        label = LABEL.match(line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        match = INSTRUCTION.match(line)
        if not match or match["opcode"] == "NOP":
            continue
        target = TARGET.search(match["operands"]) if match["opcode"].startswith("BRA") else None
        instructions.append((match["opcode"], match["operands"]))
        # Behind the end of each kernel stands a jump to itself.
        if target and labels.get(target[1], len(instructions)) < len(instructions) - 1:
            loops.append((labels[target[1]], len(instructions)))
    local = sum(opcode.split(".", 1)[0] in ("LDL", "STL") for opcode, _ in instructions)
    if not loops:
        return len(instructions), local, []

    products = [0]
    for opcode, operands in instructions:
        products.append(products[-1] + (kind_of(opcode, operands) in ("FFMA", "HMMA")))
    held = {loop: products[loop[1]] - products[loop[0]] for loop in loops}
    most = max(held.values())
    if most:
        first, end = min((loop for loop in loops if held[loop] >= 0.9 * most), key=lambda loop: loop[1] - loop[0])
    else:
        first, end = max(loops, key=lambda loop: loop[1] - loop[0])
    return len(instructions), local, instructions[first:end]


def parse_disassembly(text: str) -> dict[str, dict[str, Any]]:
    """Mangled name -> the fields of Kernel that instructions and launch bounds tell, from nvdisasm's text."""
    found: dict[str, dict[str, Any]] = {}
    sections = list(re.finditer(r"^\t\.section\t", text, re.MULTILINE))
    ends = [section.start() for section in sections[1:]] + [len(text)]
    for section, end in zip(sections, ends, strict=True):
        body = text[section.start() : end]
        code = SECTION.match(body)
        if code:
            instructions, local, loop = main_loop(body.splitlines())
            mix = dict(Counter(kind_of(*instruction) for instruction in loop))
            fields = {
                "instructions": instructions,
                "local_accesses": local,
                "loop": mix,
                "loop_instructions": len(loop),
            }
            found.setdefault(code["name"], {}).update(fields)
        information = INFORMATION.match(body)
        bounds = MOST_THREADS.search(body) if information else None
        if information and bounds:
            threads = 1
            for word in bounds.groups():
                threads *= int(word, 16)
            found.setdefault(information["name"], {})["most_threads"] = threads
    return found


def architecture_of(disassembly: str) -> int:
    """The number of the architecture, e.g. 90."""
    target = re.search(r"\.target\s+sm_(\d+)|\bEF_CUDA_SM(\d+)", disassembly)  # a cubin's new format, and its old one
    if not target:
        raise ResourceError("nvdisasm named no architecture")
    return int(target[1] or target[2])


def kernels_of_cubin(cubin: Path, report: str = "") -> list[Kernel]:
    """The kernels of a cubin, sorted by name. `report`: what `ptxas -v` said of it, for the spills."""
    usage = _run([find_tool("cuobjdump"), "--dump-resource-usage", cubin])
    text = _run([find_tool("nvdisasm"), cubin])
    architecture = architecture_of(text)
    spills, read = parse_ptxas(report), parse_disassembly(text)
    matches = list(USAGE.finditer(usage))
    kernels = []
    for match, name in zip(matches, demangle([match["name"] for match in matches]), strict=True):
        fields = dict(read.get(match["name"], {}))
        told = spills.get(match["name"], {})
        fields |= {key: told[key] for key in ("spill_stores", "spill_loads") if key in told}
        shared = int(match["shared"])
        # From sm_90 on the system's own KiB of a block is counted with it.
        shared -= BLOCK_OVERHEAD if shared >= BLOCK_OVERHEAD and architecture >= 90 else 0
        kernels.append(Kernel(name, int(match["registers"]), int(match["stack"]), shared, **fields))
    return sorted(kernels, key=lambda kernel: kernel.name)


# --- compiling


def cuda_sources() -> dict[str, Path]:
    """room/name -> source. A room may spread its kernels over several."""
    return {f"{source.parent.name}/{source.stem}": source for source in sorted(ROOT.glob("csrc/*/cuda*.cu"))}


def compile_cubin(source: Path, architecture: int, folder: Path) -> tuple[Path, str]:
    """The cubin and what the compiler said, warnings included.

    Raises:
        ResourceError: there is no compiler, or it failed.
    """
    toolkit, rejected = toolchain.find_toolkit()
    if not toolkit:
        raise ResourceError("; ".join(["no CUDA compiler was found", *rejected]))
    torch = importlib.util.find_spec("torch")
    if not torch or not torch.submodule_search_locations:
        raise ResourceError("PyTorch's headers are needed: install torch")
    cubin = folder / f"{source.parent.name}.{source.stem}.sm_{architecture}.cubin"
    command = [toolkit.nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]
    command += [f"-arch=sm_{architecture}", f"-DTORCH_TARGET_VERSION={ninja_build.TORCH_TARGET_VERSION}"]
    command += ["-DTORCH_STABLE_ONLY", "-DUSE_CUDA", f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", Path(torch.submodule_search_locations[0], "include")]
    for include in toolkit.includes:
        command += ["-isystem", include]
    return cubin, _run([*command, source, "-o", cubin])


def compiled_kernels(sources: Iterable[Path], architectures: Iterable[int], jobs: int) -> dict[tuple[str, int], Any]:
    """(room/name, architecture) -> (kernels, what the compiler said)."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:

        def build(source: Path, architecture: int) -> tuple[list[Kernel], str]:
            cubin, report = compile_cubin(source, architecture, Path(name))
            return kernels_of_cubin(cubin, report), report

        started = {
            (f"{source.parent.name}/{source.stem}", architecture): pool.submit(build, source, architecture)
            for source in sources
            for architecture in architectures
        }
        return {key: job.result() for key, job in started.items()}


# --- occupancy


#: Blocks of a multiprocessor: CUDA C++ Programming Guide, table of technical specifications.
MOST_BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
WARP = 32
SCHEDULERS = 4
REGISTERS_OF_A_SCHEDULER = 16384
REGISTERS_AT_A_TIME = 256  # that a warp is given
BLOCK_OVERHEAD = 1024  # bytes of shared memory that the system takes of each block


@dataclass(frozen=True)
class Occupancy:
    """What is resident on a multiprocessor, and what keeps more from being so."""

    blocks: int
    warps: int
    limit: str


def occupancy(registers: int, threads: int, shared_bytes: int, architecture: int, chip: Any) -> Occupancy:
    """`chip`: has shared_bytes_per_multiprocessor and threads_per_multiprocessor (`_C.plans.chip_of_architecture`)."""
    warps = -(-threads // WARP)
    of_a_warp = -(-registers * WARP // REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME
    limits = {
        "registers": SCHEDULERS * (REGISTERS_OF_A_SCHEDULER // of_a_warp) // warps,
        "threads": chip.threads_per_multiprocessor // (warps * WARP),
        "shared memory": chip.shared_bytes_per_multiprocessor // (-(-shared_bytes // 128) * 128 + BLOCK_OVERHEAD),
        "blocks": MOST_BLOCKS[architecture],
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limits[limit] * warps, limit)


def load_plans() -> Any:
    """`_C.plans`, or None where the package is not compiled."""
    try:
        from convnext_kernels import native

        bindings = native.load().bindings
    except ImportError:
        return None
    return None if bindings is None else bindings.plans


def element_bytes(name: str) -> int:
    """Of a kernel's first template argument."""
    first = re.search(r"<(half|bf16|float|double)\b", name)
    return {"half": 2, "bf16": 2, "float": 4, "double": 8}[first[1]] if first else 4


def _tiles(kind: str) -> Callable[[Any, Any, str], tuple[int, int]]:
    def launch(plans: Any, chip: Any, name: str) -> tuple[int, int]:
        kind_of_plan = getattr(plans.depthwise_conv.Kind, kind)
        plan = plans.depthwise_conv.plan_tiles(kind_of_plan, 128, 96, 56, 56, element_bytes(name), chip)
        return plan.warps * WARP, plan.shared_bytes

    return launch


#: Pattern of a kernel's name -> (plans, chip, name) -> threads of a block and bytes of dynamic shared memory at batch
#: 128, C = 96, 56 x 56. The others: as many threads as their launch bounds allow, and no dynamic shared memory.
TYPICAL: list[tuple[str, Callable[[Any, Any, str], tuple[int, int]]]] = [
    (r"^convolution_kernel", _tiles("CONVOLUTION")),
    (r"^weight_gradient_kernel", _tiles("WEIGHT_GRADIENT")),
]


def typical_launch(kernel: Kernel, plans: Any, chip: Any) -> tuple[int, int] | None:
    """Threads of a block, and bytes of its shared memory; None where neither plan nor bounds tell."""
    for pattern, launch in TYPICAL:
        if re.search(pattern, kernel.name):
            threads, dynamic = launch(plans, chip, kernel.name)
            return threads, dynamic + kernel.static_shared
    return (kernel.most_threads, kernel.static_shared) if kernel.most_threads else None


# --- Triton


#: Channels and sides of the maps for which the Triton kernels are compiled: ConvNeXt-T's stages at 224 pixels.
STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))


def triton_rows(architectures: Iterable[int], plans: Any) -> Iterable[tuple[str, int, list[dict[str, Any]]]]:
    """(operator and stage, architecture, rows of plain data) of what is launched there that was not launched before."""
    import torch

    from benchmarks.triton_cubins import compile_launch, launches_of
    from convnext_kernels.cli.tune import workloads

    for architecture in architectures:
        for name, launches in launches_of(workloads(STAGES, [128], [torch.bfloat16]), architecture).items():
            rows = []
            for launch in launches:
                code = compile_launch(launch, architecture)
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(code.cubin)
                    file.flush()
                    kernels = kernels_of_cubin(Path(file.name))
                block = code.threads, code.shared
                rows += rows_of(name, architecture, kernels, plans, lambda *_, block=block: block)
            yield name, architecture, rows


# --- the report


KINDS = ("FFMA", "HMMA", "LDS", "LDSM", "STS", "LDG", "STG", "LDGSTS", "convert", "MUFU", "BAR", "other")


def rows_of(
    source: str,
    architecture: int,
    kernels: Iterable[Kernel],
    plans: Any,
    launch_of: Callable[[Kernel, Any, Any], tuple[int, int] | None] = typical_launch,
) -> list[dict[str, Any]]:
    """A row of plain data for each kernel. `launch_of`: threads and shared bytes of a block, as typical_launch."""
    chip = plans.chip_of_architecture(architecture) if plans and architecture in ALL_ARCHITECTURES else None
    rows = []
    for kernel in kernels:
        row = {"source": source, "architecture": architecture, **dataclasses.asdict(kernel)}
        launch = launch_of(kernel, plans, chip) if chip else None
        if launch:
            found = occupancy(kernel.registers, *launch, architecture, chip)
            row |= {"threads": launch[0], "shared": launch[1], **dataclasses.asdict(found)}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, shares of the main loop in per cent."""
    heads = ["kernel", "regs", "stack", "spill", "threads", "shared", "blocks", "warps", "limit", "loop"]
    heads += [kind for kind in KINDS if any(row["loop"].get(kind) for row in rows)]
    lines = [heads]
    for row in rows:
        spill = None if row["spill_stores"] is None else row["spill_stores"] + row["spill_loads"]
        values = [row["name"], row["registers"], row["stack"], spill]
        values += [row.get(key) for key in ("threads", "shared", "blocks", "warps", "limit")]
        values.append(row["loop_instructions"] or None)
        for kind in heads[10:]:
            values.append(f"{100 * row['loop'].get(kind, 0) / row['loop_instructions']:.0f}" if row["loop"] else None)
        lines.append(["-" if value is None else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__.split("\n", 1)[0])
    numbers = ", ".join(map(str, ALL_ARCHITECTURES))
    parser.add_argument("--arch", nargs="+", default=list(USUAL_ARCHITECTURES), help=f"of {numbers}, or all")
    parser.add_argument("--kernel", default="", help="a regular expression that kernels' names must match")
    parser.add_argument("--cubin", nargs="+", type=Path, default=[], help="compiled kernels, instead of the sources")
    parser.add_argument("--triton", action="store_true", help="the Triton kernels, instead of the CUDA sources")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS", os.cpu_count() or 1)))
    options = parser.parse_args(arguments)
    asked = [str(number).removeprefix("sm_") for number in options.arch]
    if asked == ["all"]:
        asked = list(map(str, ALL_ARCHITECTURES))
    if not set(asked) <= set(map(str, ALL_ARCHITECTURES)):
        parser.error(f"--arch: expected some of {numbers}, or all, got {' '.join(asked)}")
    options.arch = list(map(int, asked))
    return options


def reported(options: argparse.Namespace, plans: Any) -> Iterable[tuple[str, int, list[dict[str, Any]]]]:
    """(source, architecture, rows) of what was asked for."""
    if options.triton:
        yield from triton_rows(options.arch, plans)
    elif options.cubin:
        for cubin in options.cubin:
            architecture = architecture_of(_run([find_tool("nvdisasm"), "-c", cubin]))
            yield cubin.name, architecture, rows_of(cubin.name, architecture, kernels_of_cubin(cubin), plans)
    else:
        compiled = compiled_kernels(cuda_sources().values(), options.arch, options.jobs)
        for (source, architecture), (kernels, _) in compiled.items():
            yield source, architecture, rows_of(source, architecture, kernels, plans)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    plans = load_plans()
    every = []
    try:
        for source, architecture, rows in reported(options, plans):
            rows = [row for row in rows if re.search(options.kernel, row["name"])]
            every += rows
            if rows:
                print(f"\n{source}, sm_{architecture}\n{table(rows)}", flush=True)
    except ResourceError as error:
        print(error, file=sys.stderr)
        return 1
    if plans is None:
        print("\nThreads, shared memory and occupancy are left out: the package is not compiled.")
    if options.json:
        options.json.write_text(json.dumps(every, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
