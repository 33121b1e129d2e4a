"""How fast is each operation against its reference, and against what PyTorch brings?

On a GPU: Triton, the reference, and PyTorch's own where there is one, on the sizes of the targets.
On a CPU the references are what runs; the figures say so and the GPU's are missing.

    python -m benchmarks.kernels
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arvision.kernels.compaction import compact_
from arvision.kernels.nearest_code import nearest_code
from arvision.kernels.philox import philox4x32
from arvision.kernels.sampling import Shaping, sample_gumbel
from arvision.kernels.tree_attention import tree_attention
from arvision.kernels.tree_attention.reference import visible
from arvision.kernels.verify import verify

from .common import alternate, save

Tasks = dict[str, Callable[[], Any]]
IS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_CUDA else "cpu")
BACKENDS = ("triton", "reference") if IS_CUDA else ("reference",)
ROUNDS = 20 if IS_CUDA else 5


def measure(tasks: Tasks) -> dict[str, float]:
    """Median microseconds of each task (CUDA: on the device, with its caches cold)."""
    if not IS_CUDA:
        return {n: 1e6 * statistics.median(s) for n, s in alternate(tasks, ROUNDS).items()}
    from triton.testing import do_bench

    timer: Callable[..., Any] = do_bench
    return {n: 1e3 * timer(task, return_mode="median") for n, task in tasks.items()}


def agree(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Refuse to measure what is wrong."""
    torch.testing.assert_close(ours.float(), expected.float(), rtol=tolerance, atol=tolerance)


def bandwidth() -> float:
    """Bytes per microsecond that the device reads: a sum over 1 GB (CPU: 128 MB)."""
    data = torch.ones((1 << 28) if IS_CUDA else (1 << 25), device=DEVICE)
    return data.numel() * 4 / measure({"read": data.sum})["read"]


def bench_tree_attention() -> dict[str, Any]:
    """64 queries of one row against 16k keys, 8 key/value heads of 128, 32 query heads."""
    dtype = torch.bfloat16 if IS_CUDA else torch.float32
    length, num, heads, group, width = 16384, 64, 8, 4, 128
    slots = length + num
    queries = torch.randn(1, heads * group, num, width, device=DEVICE, dtype=dtype)
    keys, values = torch.randn(2, 1, heads, slots, width, device=DEVICE, dtype=dtype)
    lengths = torch.tensor([length], device=DEVICE)
    ancestors = torch.eye(num, device=DEVICE).bool()
    ancestors[:, 0] = True
    given = (queries, keys, values, lengths, ancestors)
    mask = visible(lengths, ancestors, slots, None)[:, None]

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=True
        )

    tasks: Tasks = {b: (lambda b=b: tree_attention(*given, backend=b)) for b in BACKENDS}
    tasks["sdpa with a mask"] = sdpa
    if IS_CUDA:
        tasks["flex_attention"] = flex(given, slots)
    expected = tasks["reference"]()
    for task in tasks.values():
        agree(task(), expected, 2e-2 if IS_CUDA else 1e-4)
    seconds = measure(tasks)
    read = (keys.numel() + values.numel()) * keys.element_size() / bandwidth()
    ratios = {name: time / read for name, time in seconds.items()}
    return {"microseconds": seconds, "cache_read_microseconds": read, "over_cache_read": ratios}


def flex(given: tuple[Tensor, ...], slots: int) -> Callable[[], Tensor]:
    """FlexAttention, compiled, with the same tree as a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    queries, keys, values, lengths, ancestors = given
    num = queries.shape[2]

    def sees(batch: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        offset = slot - lengths[batch]
        return (offset < 0) | ancestors[query, offset.clamp(0, num - 1)]

    block_mask = create_block_mask(sees, 1, None, num, slots, device=str(DEVICE))
    compiled: Any = torch.compile(flex_attention)
    return lambda: compiled(queries, keys, values, block_mask=block_mask, enable_gqa=True)


def bench_sampling(size: int) -> dict[str, Any]:
    """Guidance, temperature, top-k 2000, top-p 0.9 and a Gumbel draw of 16 rows."""
    logits, null = 3 * torch.randn(2, 16, size, device=DEVICE)
    identity = torch.randint(1 << 32, (16, 4), device=DEVICE)
    how = Shaping(top_k=2000, top_p=0.9)
    law = {"null_logits": null, "guidance_scale": 4.0}
    tasks: Tasks = {
        b: (lambda b=b: sample_gumbel(logits, identity, how, backend=b, **law)) for b in BACKENDS
    }
    for task in tasks.values():
        agree(task(), tasks["reference"](), 0)
    return {"microseconds": measure(tasks)}


def bench_verify() -> dict[str, Any]:
    """A window of 32 drafts of one row at a vocabulary of 16,384."""
    target = torch.randn(1, 33, 16384, device=DEVICE).log_softmax(-1)
    draft = (target[:, :-1] + 0.5 * torch.randn(1, 32, 16384, device=DEVICE)).log_softmax(-1)
    drafts = draft.exp()[0].multinomial(1).T
    numbers = [torch.rand(1, n, device=DEVICE, dtype=torch.float64) for n in (32, 32, 33)]
    given = (drafts, draft, target, *numbers)
    tasks: Tasks = {
        b: (lambda b=b: verify(*given, coupling="independent", backend=b)) for b in BACKENDS
    }
    for task in tasks.values():
        agree(task()[0], tasks["reference"]()[0], 0)
    return {"microseconds": measure(tasks)}


def bench_compaction() -> dict[str, Any]:
    """6 of 64 candidates kept in 4 rows of 12 layers, 12 heads of 64."""
    keys, values = torch.randn(2, 12, 4, 12, 512, 64, device=DEVICE)
    lengths = torch.tensor([100, 200, 300, 400], device=DEVICE)
    kept = torch.tensor([[0, 3, 9, 20, 33, 50]], device=DEVICE).expand(4, 6)
    counts = torch.tensor([6, 3, 1, 5], device=DEVICE)
    given = (keys, values, lengths, kept, counts)
    return {
        "microseconds": measure({b: (lambda b=b: compact_(*given, backend=b)) for b in BACKENDS})
    }


def bench_philox() -> dict[str, Any]:
    """The bits of 2^20 numbers."""
    lanes = torch.arange(1 << 18, device=DEVICE)
    one = torch.tensor(1, device=DEVICE)
    tasks: Tasks = {
        b: (lambda b=b: philox4x32((one, one, lanes, one), (one, one), backend=b)) for b in BACKENDS
    }
    for task in tasks.values():
        assert task().equal(tasks["reference"]())
    return {"microseconds": measure(tasks)}


def bench_nearest_code() -> dict[str, Any]:
    """The 256 vectors of one image against 16,384 codes of width 8."""
    vectors = F.normalize(torch.randn(256, 8, device=DEVICE), dim=-1)
    codes = F.normalize(torch.randn(16384, 8, device=DEVICE), dim=-1)
    tasks: Tasks = {b: (lambda b=b: nearest_code(vectors, codes, backend=b)) for b in BACKENDS}
    tasks["cdist"] = lambda: torch.cdist(vectors, codes).argmin(1)
    return {"microseconds": measure(tasks)}


BENCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "tree_attention 1 x 64 x 16384": bench_tree_attention,
    "sampling 16384": lambda: bench_sampling(16384),
    "sampling 151936": lambda: bench_sampling(151936),
    "verify 32 x 16384": bench_verify,
    "compaction": bench_compaction,
    "philox 2^20": bench_philox,
    "nearest_code 256 x 16384": bench_nearest_code,
}


def main() -> None:
    """Measure and write `results/kernels.json`."""
    torch.manual_seed(0)
    if not IS_CUDA:
        print(
            "no CUDA device: these are the references on this CPU; the GPU figures are missing",
            file=sys.stderr,
        )
    record: dict[str, Any] = {
        "has_gpu_figures": IS_CUDA,
        "bytes_per_microsecond": bandwidth(),
    }
    for name, bench in BENCHES.items():
        record[name] = bench()
        line = ", ".join(f"{n} {t:.0f} us" for n, t in record[name]["microseconds"].items())
        print(f"{name}: {line}")
    save("kernels", record)


if __name__ == "__main__":
    main()
