"""Every Triton kernel compiles to machine code as it is launched, whether or not there is a GPU.

The interpreter takes programs that the compiler refuses; this needs no device. Launches are recorded
from the package's own wrappers, so block sizes, warps and dtypes are those that users get, and built
for NVIDIA's compute capabilities 8.0 and 9.0 and for AMD's gfx942. What it cannot show is how fast
they are.
"""

from __future__ import annotations

import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import short_where

from arvision.kernels.dispatch import is_interpreted, triton_version

if triton_version() is None or is_interpreted():
    pytest.skip("Triton's compiler is not at hand", allow_module_level=True)

import triton

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
    pytest.skip("the compiler is called otherwise before Triton 3.3", allow_module_level=True)

from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from arvision.kernels.compaction import triton as compaction
from arvision.kernels.nearest_code import triton as nearest_code
from arvision.kernels.philox import triton as philox
from arvision.kernels.sampling import triton as sampling
from arvision.kernels.sampling.reference import Shaping
from arvision.kernels.tree_attention import Sight
from arvision.kernels.tree_attention import triton as tree_attention
from arvision.kernels.verify import triton as verify

MODULES = (compaction, nearest_code, philox, sampling, tree_attention, verify)
TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm80": 163 << 10, "sm90": 227 << 10, "gfx942": 64 << 10}
"""Bytes that a block may have."""

KINDS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int8: "i8",
}


class Recorder:
    """Stands for a kernel: writes down how it is launched, and runs nothing."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any], dict[str, Any]]]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*given: Any, **named: Any) -> None:
            names = self.kernel.arg_names
            values = dict(zip(names, given, strict=False))
            values |= {name: value for name, value in named.items() if name in names}
            options = {name: value for name, value in named.items() if name not in names}
            self.launches.append((self.kernel, values, options))

        return launch


def law(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def chain(dtype: torch.dtype, window: int = 32, size: int = 16384) -> tuple[torch.Tensor, ...]:
    """Drafts and laws of two rows, LlamaGen's vocabulary."""
    drafts = torch.zeros(2, window, dtype=torch.int64)
    return drafts, law(2, window, size, dtype=dtype), law(2, window + 1, size, dtype=dtype)


def run_verify(coupling: str, dtype: torch.dtype) -> None:
    uniforms: Any = [torch.zeros(2, num, dtype=torch.float64) for num in (32, 32, 33)]
    launch: Any = verify.verify
    launch(*chain(dtype), *uniforms, coupling)


def run_follow(num: int, is_tree: bool) -> None:
    drafts, choice = torch.zeros(2, num, dtype=torch.int64), torch.zeros(2, num + 1).long()
    parts = torch.zeros(3, 2, num, dtype=torch.int64)
    verify.follow(drafts, choice, tuple(parts) if is_tree else None, num)  # pyright: ignore


def run_siblings(dtype: torch.dtype, is_drawn: bool, replaces: bool) -> None:
    """A tree of 63 drafts, at most eight siblings at a place."""
    drafts, draft_logp, target_logp = chain(dtype, 63)
    children = torch.zeros(64, 8, dtype=torch.int64)
    uniforms = torch.zeros(2, 64, 8, dtype=torch.float64), torch.zeros(2, 64, dtype=torch.float64)
    laws = target_logp, draft_logp if is_drawn else None
    verify.in_turn(drafts, children, *laws, *uniforms, 12, replaces)


def run_draw(dtype: torch.dtype) -> None:
    positions = torch.zeros(2, 33, dtype=torch.int64)
    sampling.draw_gumbel(law(2, 33, 16384, dtype=dtype), positions[:, :3], positions)


def run_attention(
    dtype: torch.dtype, width: int, heads: int, shared: int, padded: bool, window: int = 0
) -> None:
    """32 candidates behind 700 slots, as in LlamaGen's models and grouped ones of text."""
    queries = torch.zeros(2, heads, 32, width, dtype=dtype)
    keys = torch.zeros(2, heads // shared, 768, width, dtype=dtype)
    is_open = torch.ones(2, 120, dtype=torch.bool) if padded else None
    ancestors = torch.ones(32, 32, dtype=torch.bool).tril()
    lengths = torch.full((2,), 700)
    sight = Sight.of(lengths, ancestors, 32, is_open)
    if window:
        sight = sight.within(window, lengths[:, None] + torch.arange(32))
    tree_attention.tree_attention(queries, keys, keys, sight, 0.1)


def run_sampling(kind: str, dtype: torch.dtype, how: Shaping, size: int = 16384) -> None:
    logits = law(32, size, dtype=dtype)
    if kind == "shape":
        sampling.shape(logits, how, logits.clone(), 3.0)
    elif kind == "gumbel":
        identity = torch.zeros(32, 4, dtype=torch.int64)
        sampling.sample_gumbel(logits, identity, how, 0, logits.clone(), 3.0)
    elif kind == "draw":
        # Two images of sixteen candidates, each with a guidance scale of its own.
        noise = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64), 0
        sampling.Cut(logits, how, logits.clone(), torch.ones(32), noise)
    else:
        uniforms = torch.zeros(32, dtype=torch.float64)
        sampling.sample_inverse(logits, uniforms, how, logits.clone(), 3.0)


def run_compaction(dtype: torch.dtype, width: int) -> None:
    cache = torch.zeros(2, 4, 8, 96, width, dtype=dtype)
    kept = torch.zeros(4, 32, dtype=torch.int64)
    compaction.compact_(cache, cache.clone(), torch.zeros(4).long(), kept, torch.ones(4).long())


def run_philox() -> None:
    words = (torch.zeros(2, 64, 4096, dtype=torch.int64),) * 4
    philox.philox4x32(words, (words[0], words[0]))


def run_nearest(dtype: torch.dtype, width: int, metric: str) -> None:
    nearest_code.nearest_code(law(576, width, dtype=dtype), law(16384, width, dtype=dtype), metric)


BF16, FP16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CUT = Shaping(temperature=0.9, top_k=1000, top_p=0.9)
CASES: dict[str, Any] = {
    "philox": run_philox,
    "compaction bf16 64": lambda: run_compaction(BF16, 64),
    "compaction float32 128": lambda: run_compaction(F32, 128),
    "verify maximal float32": lambda: run_verify("maximal", F32),
    "verify maximal float64": lambda: run_verify("maximal", F64),
    "verify independent float32": lambda: run_verify("independent", F32),
    "verify chain": lambda: run_follow(32, False),
    "verify tree of 31": lambda: run_follow(31, True),
    "verify tree of 64": lambda: run_follow(64, True),
    "verify siblings chosen float32": lambda: run_siblings(F32, False, False),
    "verify siblings distinct float32": lambda: run_siblings(F32, True, False),
    "verify siblings independent float64": lambda: run_siblings(F64, True, True),
    "sampling shape bf16": lambda: run_sampling("shape", BF16, CUT),
    "sampling shape float32 greedy": lambda: run_sampling("shape", F32, Shaping(temperature=0)),
    "sampling gumbel bf16": lambda: run_sampling("gumbel", BF16, Shaping(), 151936),
    "sampling gumbel float32": lambda: run_sampling("gumbel", F32, Shaping(), 151936),
    "sampling cut and draw bf16": lambda: run_sampling("draw", BF16, CUT),
    "sampling cut and draw float32": lambda: run_sampling("draw", F32, CUT),
    "sampling cut and draw float32 greedy": lambda: run_sampling(
        "draw", F32, Shaping(temperature=0)
    ),
    "sampling draw float32": lambda: run_draw(F32),
    "sampling draw float64": lambda: run_draw(F64),
    "sampling inverse fp16": lambda: run_sampling("inverse", FP16, CUT),
    "nearest_code float32 8": lambda: run_nearest(F32, 8, "euclidean"),
    "nearest_code bf16 32": lambda: run_nearest(BF16, 32, "inner"),
    "nearest_code float32 256": lambda: run_nearest(F32, 256, "euclidean"),
    "tree_attention bf16 64": lambda: run_attention(BF16, 64, 12, 1, False),
    "tree_attention fp16 128 grouped": lambda: run_attention(FP16, 128, 16, 2, True),
    "tree_attention bf16 128 window": lambda: run_attention(BF16, 128, 16, 2, False, 512),
    "tree_attention float32 64": lambda: run_attention(F32, 64, 12, 1, True),
    "tree_attention float32 128": lambda: run_attention(F32, 128, 8, 1, False),
    "tree_attention bf16 256": lambda: run_attention(BF16, 256, 4, 4, True),
}
SLOW = {"tree_attention float32 128", "tree_attention bf16 256", "nearest_code float32 256"}
"""These take the compiler long."""


def launches_of(name: str, is_amd: bool = False) -> list[Any]:
    """What the wrappers launch in a case, on a machine of AMD's if asked."""
    launches: list[Any] = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.version, "hip", "6.4" if is_amd else None)
        for module in MODULES:
            for attribute, value in list(vars(module).items()):
                is_own = getattr(getattr(value, "fn", None), "__module__", "") == module.__name__
                if is_own and isinstance(value, triton.runtime.JITFunction):
                    patch.setattr(module, attribute, Recorder(value, launches))
        CASES[name]()
    return launches


def build(launch: Any, target: GPUTarget, ones: bool = False) -> Any:
    """Compile a recorded launch as Triton would for its arguments, or with all sizes 1."""
    kernel, values, options = launch
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{KINDS[value.dtype]}"
            attributes[place,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 or ones:
            # Triton compiles anew for arguments that are 1, as constants.
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """What the bundled `cuobjdump` says of machine code: registers, stack, local memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton comes without cuobjdump")
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    told = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told.stdout + told.stderr)
    assert len(found) == 3, told
    return {name: int(number) for name, number in found}


def has_product(compiled: Any) -> bool:
    return "tt.dot" in compiled.asm["ttir"]


def is_narrow(launch: Any) -> bool:
    """Whether a launch multiplies 16-bit numbers; float32 is multiplied in full precision."""
    tensors = [value for value in launch[1].values() if isinstance(value, torch.Tensor)]
    return tensors[0].dtype in (BF16, FP16)


NVIDIA = ("sm80", "sm90")


def is_short(name: str, target: str) -> bool:
    """Whether a case is built always: each for one of NVIDIA's, one of each module for AMD's."""
    if target == "gfx942":
        first = next(case for case in CASES if case.split()[0] == name.split()[0])
        return name == first
    return name not in SLOW and list(CASES).index(name) % 2 == (target == "sm90")


@pytest.mark.parametrize(("name", "target"), short_where(is_short, product(CASES, NVIDIA)))
def test_machine_code_for_nvidia_keeps_all_numbers_in_registers(
    name, target, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = launches_of(name)
    assert launches
    for launch in launches:
        compiled = build(launch, TARGETS[target])
        used = resources(compiled.asm["cubin"], tmp_path)
        told = f"{launch[0].fn.__name__}: {used}, {compiled.metadata.shared} bytes shared"
        print(told)
        assert used["LOCAL"] == 0, told
        assert used["STACK"] == 0, told
        assert compiled.metadata.shared <= SHARED_MEMORY[target]
        if has_product(compiled) and is_narrow(launch):
            wanted = r"wgmma|mma\.sync" if target == "sm90" else r"mma\.sync"
            assert re.search(wanted, compiled.asm["ptx"]), "no tensor cores"


@pytest.mark.skipif("amd" not in backends, reason="this Triton comes without AMD's backend")
@pytest.mark.parametrize(("name", "target"), short_where(is_short, product(CASES, ["gfx942"])))
def test_machine_code_for_amd_fits(name, target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in launches_of(name, is_amd=True):
        compiled = build(launch, TARGETS[target])
        code = compiled.asm["amdgcn"]
        assert compiled.metadata.shared <= SHARED_MEMORY[target]
        assert re.findall(r"\.private_segment_fixed_size: (\d+)", code) == ["0"], "local memory"
        assert re.findall(r"\.vgpr_spill_count: (\d+)", code) == ["0"]
        if has_product(compiled):
            assert "v_mfma" in code, "no matrix cores"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiles_with_sizes_of_one(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in launches_of(name):
        assert build(launch, TARGETS["sm90"], ones=True).asm["cubin"]


def test_every_kernel_is_launched_in_some_case():
    launched = {launch[0] for name in CASES for launch in launches_of(name)}
    kernels = [
        value
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, triton.runtime.JITFunction)
    ]
    for kernel in kernels:
        helps = any(f"{kernel.fn.__name__}(" in other.src for other in launched if other != kernel)
        inner = any(f"{kernel.fn.__name__}(" in other.src for other in kernels if other != kernel)
        assert kernel in launched or helps or inner, kernel.fn.__qualname__
