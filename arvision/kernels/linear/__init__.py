"""Linear layers at the few rows of a decoding pass, on a CPU in float32 or bfloat16.

PyTorch's `linear` calls MKL there, oneDNN (which PyTorch ships, too) with its weight packed
beforehand is about twice as fast at 16 to 64 rows on CPUs where MKL stays with AVX2, and equal below
four: 150 us against 283 us at 16 rows for the five matrices of a layer of `llamagen-fashion`, 249
against 494 at 32, 82 against 83 at 2 (one thread of an AMD EPYC). On Intel's CPUs with AVX-512 MKL stays:
all matrices of a pass take it 856 us against 1254 at 8 rows, 1257 against 1283 at 16 and 1855 against
1889 at 32 (one thread of a Xeon). In bfloat16 PyTorch's `linear` packs the weight
anew in every call: 768 x 2304 take it 186 us for one row and 531 for 16, packed beforehand 70 and 402; 768 x 3072
take 315 and 1024 against 86 and 522 (one thread of an AMD EPYC with AVX-512, loaded). The operators are those that
TorchInductor emits for frozen graphs.
"""

from .packed import Linear, packed_linear, packed_operators, packing_pays, runs_packed

__all__ = ["Linear", "packed_linear", "packed_operators", "packing_pays", "runs_packed"]
