"""Every Triton kernel compiles for an NVIDIA GPU, whether or not there is one.

The interpreter takes programs that the compiler refuses; this needs no device. What it cannot show
is how fast they are.
"""

from __future__ import annotations

import pytest

from arvision.kernels.dispatch import is_interpreted, triton_version

if triton_version() is None or is_interpreted():
    pytest.skip("Triton's compiler is not at hand", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from arvision.kernels.compaction import triton as compaction
from arvision.kernels.nearest_code import triton as nearest_code
from arvision.kernels.philox import triton as philox
from arvision.kernels.sampling import triton as sampling
from arvision.kernels.tree_attention import triton as tree_attention
from arvision.kernels.verify import triton as verify

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 232448
LAW = {"GUIDED": True, "TEMPERED": True, "BLOCK": 2048}

CASES = {
    "philox": (philox._philox, "i64* i64* i64* i64* i64* i64* i64* i32", {"BLOCK": 1024}, {}),
    "nearest_code": (
        nearest_code._nearest,
        "f32* f32* i64* i32 i32 i32",
        {"EUCLIDEAN": True, "BLOCK_N": 32, "BLOCK_V": 128, "BLOCK_D": 16},
        {},
    ),
    "compaction": (
        compaction._compact,
        "bf16* bf16* i64* i64* i64* i32 i32 i32 i64 i64 i64 i32 i32",
        {"BLOCK_K": 32, "BLOCK_D": 128},
        {},
    ),
    "verify": (
        verify._settle,
        "i64* f32* f32* f64* f64* f64* i64* i64* i32 i32",
        {"MAXIMAL": False, "BLOCK_M": 64, "BLOCK": 2048},
        {},
    ),
    "verify maximal float64": (
        verify._settle,
        "i64* f64* f64* f64* f64* f64* i64* i64* i32 i32",
        {"MAXIMAL": True, "BLOCK_M": 64, "BLOCK": 2048},
        {},
    ),
    "verify gumbel": (
        verify._argmax,
        "f32* f32* i64* i32",
        {"DTYPE": triton.language.float32, "BLOCK": 2048},
        {},
    ),
    "verify count": (verify._count, "i64* i64* i64* i32", {"BLOCK_M": 64}, {}),
    "sampling cut": (
        sampling._cut,
        "bf16* bf16* f32* f32* i64* f32* i32 f32 f32 i32 f32",
        {"GREEDY": False, "TOP_K": True, "TOP_P": True, **LAW},
        {"enable_fp_fusion": False, "num_warps": 16},
    ),
    "sampling write": (
        sampling._write,
        "bf16* bf16* f32* f32* i64* f32* f32* i32 f32 f32",
        LAW,
        {"enable_fp_fusion": False},
    ),
    "sampling gumbel": (
        sampling._gumbel,
        "f32* f32* f32* f32* i64* f32* i64* i64 f32* i64* i32 f32 f32 i32",
        {"SPLIT": 8192, **LAW},
        {"enable_fp_fusion": False},
    ),
    "sampling inverse": (
        sampling._inverse,
        "f32* f32* f32* f32* i64* f32* f64* i64* i32 f32 f32",
        LAW,
        {"enable_fp_fusion": False},
    ),
    "tree_attention merge": (
        tree_attention._merge,
        "f32* f32* bf16* i32 i32 i32",
        {"BLOCK_M": 16, "BLOCK_D": 256},
        {},
    ),
}
for dtype, block_n, block_d in (("bf16", 64, 128), ("fp16", 32, 256), ("f32", 32, 256)):
    CASES[f"tree_attention {dtype} {block_d}"] = (
        tree_attention._attend,
        f"{dtype}* {dtype}* {dtype}* i64* i64* i8* f32* f32* i32 i32 i32 i32 i32 i32 i32 f32 "
        + " ".join(["i64"] * 12),
        {"PADDED": True, "BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_D": block_d},
        {"num_stages": 2},
    )


# Triton compiles anew for arguments that are 1, as constants.
ONES = {
    "philox": "num",
    "nearest_code": "num size width",
    "compaction": "num_rows width num_kept stride_d",
    "verify": "window size",
    "verify gumbel": "size",
    "verify count": "window",
    "sampling cut": "size top_k",
    "sampling write": "size",
    "sampling gumbel": "size num_splits use",
    "sampling inverse": "size",
    "tree_attention merge": "num_members width num_splits",
    "tree_attention bf16 128": "num group width num_heads num_open num_splits q_d k_d v_d",
}

# Wide heads take the compiler long.
NAMES = [pytest.param(n, marks=[pytest.mark.slow] * n.endswith(" 256")) for n in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_compiles_for_hopper(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_for_hopper(name, ())
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("name", ONES)
def test_compiles_with_sizes_of_one(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compile_for_hopper(name, ONES[name].split()).asm["cubin"]


def compile_for_hopper(name, ones):
    kernel, types, constants, options = CASES[name]
    runtime = [parameter for parameter in kernel.arg_names if parameter not in constants]
    kinds = {"f32": "fp32", "f64": "fp64"}
    given = types.split()
    assert len(given) == len(runtime), runtime
    assert set(ones) <= set(runtime)
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    for parameter, kind in zip(runtime, given, strict=True):
        if parameter not in ones:
            base = kind.rstrip("*")
            star = "*" if kind.endswith("*") else ""
            signature[parameter] = f"{star}{kinds.get(base, base)}"
    constants = {**constants, **dict.fromkeys(ones, 1)}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=HOPPER, options=options)
