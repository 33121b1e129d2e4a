import pytest
import torch
import torch.nn.functional as F
from forms import covered

from arvision import InputError
from arvision.kernels.dispatch import is_interpreted
from arvision.kernels.nearest_code import nearest_code

pytestmark = pytest.mark.usefixtures("_poisoned")
# The interpreter multiplies the bits of bfloat16 matrices, as integers.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not is_interpreted())


@pytest.mark.parametrize(
    ("metric", "dtype", "sizes"),
    covered(["inner", "euclidean"], DTYPES, [(1, 1, 1), (3, 33, 8), (37, 300, 5), (5, 70, 130)]),
    ids=str,
)
def test_equals_the_reference(device, metric, dtype, sizes):
    num, size, width = sizes
    # Small multiples of a power of two: products and sums are exact in every dtype and order.
    vectors = torch.randint(-4, 5, (1, num, width), device=device).to(dtype) / 4
    codes = torch.randint(-4, 5, (size, width), device=device).to(dtype) / 4
    ours = nearest_code(vectors, codes, metric=metric, backend="triton")
    truth = nearest_code(vectors.double(), codes.double(), metric=metric)
    assert ours.equal(truth)


def test_unit_vectors_and_scores_at_the_edge(device):
    vectors = F.normalize(torch.randn(65, 8, device=device), dim=-1)
    codes = F.normalize(torch.randn(257, 8, device=device), dim=-1)
    assert nearest_code(vectors, codes, backend="triton").equal(nearest_code(vectors, codes))
    assert nearest_code(codes, codes, backend="triton").equal(torch.arange(257, device=device))
    large = nearest_code(vectors * 1e4, codes, metric="euclidean", backend="triton")
    assert large.equal(nearest_code(vectors * 1e4, codes, metric="euclidean"))


def test_of_equal_codes_the_first(device):
    codes = torch.ones(300, 8, device=device)
    assert nearest_code(codes[:3], codes, backend="triton").tolist() == [0, 0, 0]


def test_what_triton_does_not_take(device):
    codes = torch.ones(4, 300, device=device)
    with pytest.raises(InputError, match="width <= 256, not 300"):
        nearest_code(codes, codes, backend="triton")
