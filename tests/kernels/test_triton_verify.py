import pytest
import torch
from forms import covered

from arvision import InputError
from arvision.decoding.tree import topology_of
from arvision.kernels.verify import follow, verify

pytestmark = pytest.mark.usefixtures("_poisoned")


def laws(batch, window, size, dtype, device):
    target = torch.randn(batch, window + 1, size, device=device, dtype=torch.float64)
    draft = target[:, :-1] + 0.7 * torch.randn(batch, window, size, device=device)
    target = target.masked_fill(torch.rand_like(target) < 0.3, float("-inf"))
    target[..., 0] = 1e4 if size % 2 else 0.0
    return draft.log_softmax(-1).to(dtype), target.log_softmax(-1).to(dtype)


def uniforms(batch, num, device):
    return torch.rand(batch, num, device=device, dtype=torch.float64).clamp(min=1e-9)


@pytest.mark.parametrize(
    ("coupling", "dtype", "sizes"),
    covered(
        ["maximal", "independent"],
        [torch.float32, torch.float64],
        [(3, 0, 5), (2, 1, 1), (5, 6, 4), (3, 7, 37), (2, 3, 2500)],
    ),
    ids=str,
)
def test_equals_the_reference(device, coupling, dtype, sizes):
    batch, window, size = sizes
    draft, target = laws(batch, window, size, dtype, device)
    drafts = torch.randint(-1, size, (batch, window), device=device)
    if window > 2:
        # A law that equals its draft leaves no residual.
        draft[0, :2] = target[0, :2]
        drafts[0, :2] = target[0, :2].argmax(-1)
    numbers = (
        uniforms(batch, window, device),
        uniforms(batch, window, device),
        uniforms(batch, window + 1, device),
    )
    given = (drafts, draft, target, *numbers)
    tokens, counts = verify(*given, coupling=coupling, backend="triton")
    expected = verify(*given, coupling=coupling, backend="reference")
    assert tokens.equal(expected[0])
    assert counts.equal(expected[1])


def is_the_same(ours, expected):
    """Equal tokens and paths as far as they mean something."""
    assert ours[1].equal(expected[1])
    for part, found in ((0, 0), (2, 1)):
        if expected[part] is None:
            assert ours[part] is None
            continue
        for mine, right, count in zip(
            ours[part], expected[part], expected[1].tolist(), strict=True
        ):
            assert mine[: count - found].equal(right[: count - found])


@pytest.mark.parametrize("num", [0, 1, 6])
def test_the_way_down_a_chain(device, num):
    choice = torch.randint(3, (9, num + 1), device=device)
    drafts = torch.where(torch.rand(9, num, device=device) < 0.3, -1, choice[:, :-1])
    drafts = torch.where(torch.rand(9, num, device=device) < 0.2, 0, drafts)
    is_the_same(
        follow(drafts, choice, backend="triton"), follow(drafts, choice, backend="reference")
    )


@pytest.mark.parametrize("num", [1, 2, 13, 63, 64])
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "of each row"])
def test_the_way_down_a_tree(device, num, is_shared):
    generator = torch.Generator().manual_seed(num)
    parents = [[-1] + [int(torch.randint(-1, t, (), generator=generator)) for t in range(1, num)]]
    parents = torch.tensor(parents if is_shared else [*parents, list(range(-1, num - 1))] * 3)
    shape = topology_of(parents[0] if is_shared else parents)
    drafts = torch.randint(-1, 2, (6, num), generator=generator)
    choice = torch.randint(2, (6, num + 1), generator=generator)
    if num > 2:
        # One row keeps all of a chain, one nothing.
        drafts[1], choice[1], choice[0, 0] = 1, 1, 5
    laws, depths, bits = (part.to(device) for part in shape.packed)
    given = (drafts.to(device), choice.to(device), (laws, depths, bits))
    ours = follow(*given, shape.num_levels, backend="triton")
    expected = follow(*given, shape.num_levels, backend="reference")
    is_the_same(ours, expected)
    if num > 2:
        assert expected[1].unique().numel() > 1


def test_a_tree_too_large_for_one_integer(device):
    given = topology_of(torch.arange(-1, 64)).packed
    with pytest.raises(InputError, match="at most 64 drafts, not 65"):
        follow(torch.zeros(1, 65).long(), torch.zeros(1, 66).long(), given, 65, backend="triton")
