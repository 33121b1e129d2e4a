"""Linear layers at the few rows of a decoding pass, on a CPU in float32.

PyTorch's `linear` calls MKL there, oneDNN (which PyTorch ships, too) with its weight packed
beforehand is about twice as fast at 16 to 64 rows on CPUs where MKL stays with AVX2, and equal below
four: 150 us against 283 us at 16 rows for the five matrices of a layer of `llamagen-fashion`, 249
against 494 at 32, 82 against 83 at 2 (one thread of an AMD EPYC). The operators are those that
TorchInductor emits for frozen graphs.
"""

from .packed import Linear, packed_linear, runs_packed

__all__ = ["Linear", "packed_linear", "runs_packed"]
