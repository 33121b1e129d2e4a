import pytest
import torch
from forms import covered

from arvision.kernels.compaction import compact_

pytestmark = pytest.mark.usefixtures("_poisoned")


@pytest.mark.parametrize(
    ("dtype", "width", "in_order"),
    covered([torch.float32, torch.bfloat16, torch.float64], [1, 5, 64], [True, False]),
    ids=str,
)
def test_ragged_rows_equal_the_reference(device, dtype, width, in_order):
    layers, rows, heads, slots, num = 2, 4, 3, 19, 6
    keys = torch.randn(layers, rows, heads, slots, width, device=device).to(dtype)
    keys[:, :, :, -1] = float("nan")
    values = keys.neg()
    lengths = torch.tensor([0, 3, 12, 7], device=device)
    kept = torch.stack([torch.randperm(num) for _ in range(rows)]).to(device)[:, :5]
    counts = torch.tensor([5, 0, 1, 3], device=device)
    if in_order:
        kept = torch.where(torch.arange(5, device=device) < counts[:, None], kept, num)
        kept = kept.sort(1).values
    expected_keys, expected_values = keys.clone(), values.clone()
    compact_(expected_keys, expected_values, lengths, kept, counts, backend="reference")
    before = keys.clone()
    compact_(keys, values, lengths, kept, counts, backend="triton")
    torch.testing.assert_close(keys, expected_keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)
    assert not keys.equal(before)


def test_strided_cache(device):
    cache = torch.randn(2, 1, 9, 2, 4, 2, device=device)
    keys, values = (part.transpose(2, 3) for part in cache.unbind(-1))
    expected = keys.clone()
    args = (torch.tensor([2], device=device), torch.tensor([[1, 3, 4]], device=device))
    counts = torch.tensor([3], device=device)
    compact_(keys, values, *args, counts, backend="triton")
    expected[:, :, :, 2:5] = expected[:, :, :, [3, 5, 6]]
    assert keys.equal(expected)
