import pytest
import torch

from arvision.kernels.verify import verify, verify_gumbel

pytestmark = pytest.mark.usefixtures("_poisoned")


def laws(batch, window, size, dtype, device):
    target = torch.randn(batch, window + 1, size, device=device, dtype=torch.float64)
    draft = target[:, :-1] + 0.7 * torch.randn(batch, window, size, device=device)
    target = target.masked_fill(torch.rand_like(target) < 0.3, float("-inf"))
    target[..., 0] = 1e4 if size % 2 else 0.0
    return draft.log_softmax(-1).to(dtype), target.log_softmax(-1).to(dtype)


def uniforms(batch, num, device):
    return torch.rand(batch, num, device=device, dtype=torch.float64).clamp(min=1e-9)


@pytest.mark.parametrize("coupling", ["maximal", "independent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "sizes", [(3, 0, 5), (2, 1, 1), (5, 6, 4), (3, 7, 37), (2, 3, 2500)], ids=str
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(3, 0, 5), (2, 1, 1), (4, 6, 4), (2, 3, 2500)], ids=str)
def test_gumbel_equals_the_reference(device, dtype, sizes):
    batch, window, size = sizes
    _, target = laws(batch, window, size, dtype, device)
    gumbel = -(-torch.rand_like(target).log()).log()
    drafts = (target + gumbel).argmax(-1)[:, :-1]
    drafts = torch.where(torch.rand(batch, window, device=device) < 0.3, -1, drafts)
    tokens, counts = verify_gumbel(drafts, target, gumbel, backend="triton")
    expected = verify_gumbel(drafts, target, gumbel, backend="reference")
    assert tokens.equal(expected[0])
    assert counts.equal(expected[1])
