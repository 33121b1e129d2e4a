import pytest
import torch
from forms import covered

from arvision import InputError
from arvision.kernels.dispatch import is_interpreted
from arvision.kernels.tree_attention import Sight, tree_attention

pytestmark = pytest.mark.usefixtures("_poisoned")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# The interpreter multiplies the bits of bfloat16 matrices, as integers.
DTYPES = [dtype for dtype in TOLERANCE if dtype != torch.bfloat16 or not is_interpreted()]


def random_tree(num, device):
    parents = [int(torch.randint(-1, t, ())) if t else -1 for t in range(num)]
    ancestors = torch.eye(num, dtype=torch.bool)
    for child, parent in enumerate(parents):
        if parent >= 0:
            ancestors[child] |= ancestors[parent]
    return ancestors.to(device)


def problem(device, dtype, num, group, width, slots=150, lengths=(0, 77, 130)):
    batch, heads = len(lengths), 2
    queries = torch.randn(batch, heads * group, num, width, device=device).to(dtype)
    cache = torch.randn(2, batch, heads, slots, width, device=device).to(dtype)
    for row, length in enumerate(lengths):
        # What stands behind the candidates is not a number.
        cache[:, row, :, length + num :] = float("nan")
    lengths = torch.tensor(lengths, device=device)
    return queries, cache[0], cache[1], lengths, random_tree(num, device)


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    covered(DTYPES, [(1, 1, 16), (3, 2, 24), (20, 1, 64), (13, 3, 5)]),
    ids=str,
)
def test_ragged_rows_equal_the_reference(device, dtype, sizes):
    num, group, width = sizes
    given = problem(device, dtype, num, group, width)
    ours = tree_attention(*given, backend="triton")
    exact = [t.double() if t.is_floating_point() else t for t in given]
    truth = tree_attention(*exact, backend="reference")
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance)
    assert ours.dtype == dtype


@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_stretches_merge_to_the_whole(device, num_splits):
    from arvision.kernels.tree_attention.triton import tree_attention as run

    given = problem(device, torch.float32, 4, 2, 16)
    queries, keys, values, lengths, tree = given
    sight = Sight.of(lengths, tree, 4, None)
    ours = run(queries, keys, values, sight, 0.25, num_splits=num_splits)
    torch.testing.assert_close(ours, tree_attention(*given, backend="reference"), rtol=0, atol=2e-6)


def test_all_64_candidates_and_one_tree_per_row(device):
    queries, keys, values, lengths, _ = problem(device, torch.float32, 64, 1, 16, lengths=(3, 86))
    trees = torch.stack([random_tree(64, device), torch.eye(64, device=device).bool()])
    chain = torch.ones(64, 64, device=device).tril().bool()
    for ancestors in (trees, chain):
        ours = tree_attention(queries, keys, values, lengths, ancestors, backend="triton")
        expected = tree_attention(queries, keys, values, lengths, ancestors, backend="reference")
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [1e4, 1e2])
def test_padding_strides_and_extreme_scores(device, size):
    queries, keys, values, lengths, tree = problem(
        device, torch.float32, 5, 2, 8, lengths=(60, 77, 130)
    )
    queries *= size
    is_open = torch.rand(3, 60, device=device) < 0.5
    is_open[0, :] = False
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :140]
    values = values[:, :, :140]
    given = (queries, keys, values, lengths, tree)
    ours = tree_attention(*given, open_columns=is_open, backend="triton")
    expected = tree_attention(*given, open_columns=is_open, backend="reference")
    # At scores of 1e4 a rounding of the product moves a weight by parts in a thousand.
    torch.testing.assert_close(ours, expected, rtol=0, atol=max(2e-6, 1e-6 * size))
    closed = tree_attention(*given, backend="triton")
    assert not torch.allclose(ours[1:], closed[1:], atol=1e-3)


def test_what_triton_does_not_take(device):
    given = problem(device, torch.float32, 65, 1, 8)
    with pytest.raises(InputError, match="at most 64 candidates, not 65"):
        tree_attention(*given, backend="triton")
    short = problem(device, torch.float64, 2, 1, 8)
    with pytest.raises(InputError, match=r"no torch\.float64"):
        tree_attention(*short, backend="triton")


def test_a_chain_that_runs_past_the_end(device):
    """What runs over is not there; nobody asks for what it says."""
    queries, keys, values, _, _ = problem(device, torch.float32, 6, 1, 16, lengths=(10, 20))
    lengths, chain = torch.tensor([10, 20], device=device), torch.ones(6, 6, device=device).tril()
    chain = chain.bool()
    ours = tree_attention(
        queries, keys[:, :, :23], values[:, :, :23], lengths, chain, backend="triton"
    )
    expected = tree_attention(queries, keys, values, lengths, chain, backend="reference")
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(ours[1, :, :3], expected[1, :, :3], rtol=0, atol=2e-6)
    assert ours.isfinite().all()


@pytest.mark.parametrize("window", [1, 4, 90])
def test_layers_with_a_window(device, window):
    from arvision.kernels.tree_attention.reference import visible
    from arvision.kernels.tree_attention.triton import tree_attention as run

    queries, keys, values, lengths, tree = problem(device, torch.float32, 9, 2, 16)
    depths = tree.sum(-1) - 1
    positions = lengths[:, None] + depths
    sight = Sight.of(lengths, tree, 9, None).within(window, positions)
    sees = visible(lengths, tree, keys.shape[2], None)
    slots = torch.arange(keys.shape[2], device=device).expand(len(lengths), -1)
    places = slots.scatter(1, lengths[:, None] + torch.arange(9, device=device), positions)
    sees = sees & (positions[:, :, None] - places[:, None] < window)
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries, keys.nan_to_num(), values.nan_to_num(), sees[:, None], scale=0.25, enable_gqa=True
    )
    for splits in (1, 3):
        ours = run(queries, keys, values, sight, 0.25, num_splits=splits)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
