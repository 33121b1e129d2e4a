"""Siblings tried in turn, one program for a row: the reference's decisions, and its law."""

import pytest
import torch
from forms import covered
from scipy.stats import chi2

from arvision.decoding.tree import topology_of
from arvision.kernels.verify import in_turn

pytestmark = pytest.mark.usefixtures("_poisoned")
SHARED = [-1, -1, -1, 0, 0, 1, 3, 3, 6]
OWN = [SHARED, list(range(-1, 8)), [-1] * 9, [-1, -1, 0, 0, 0, 1, 1, 2, 2]]


def judged(generator, device, parents, size, kind, dtype):
    """Numbers of four rows; `kind` says how siblings came about."""
    shape = topology_of(torch.tensor(parents, dtype=torch.int64))
    batch, num = 4, shape.laws.shape[-1]
    target = torch.randn(batch, num + 1, size, generator=generator, dtype=torch.float64)
    target = target.masked_fill(torch.rand(target.shape, generator=generator) < 0.2, float("-inf"))
    target[..., 0] = 0.0
    draft = target[:, :-1].clamp(min=-3) + 0.5 * torch.randn(
        batch, num, size, generator=generator, dtype=torch.float64
    )
    draft, target = draft.log_softmax(-1).to(dtype), target.log_softmax(-1).to(dtype)
    drafts = torch.randint(-1, size, (batch, num), generator=generator)
    likely = target[torch.arange(batch)[:, None], shape.laws.expand(batch, num)].argmax(-1)
    drafts = torch.where(torch.rand(drafts.shape, generator=generator) < 0.4, likely, drafts)
    children = shape.children
    width = children.shape[-1]
    accept = torch.rand(batch, num + 1, width, generator=generator, dtype=torch.float64)
    recover = torch.rand(batch, num + 1, generator=generator, dtype=torch.float64)
    # A draft's law like the target's leaves nothing behind a rejection.
    draft[0, :1] = target[0, :1][:num]
    given = (drafts, children, target, None if kind == "chosen" else draft, accept, recover)
    moved = [None if part is None else part.to(device) for part in given]
    return (*moved, shape.num_levels), {"replaces": kind == "independent"}


TREES = {
    "shared": (SHARED, 5, torch.float32),
    "own": (OWN, 37, torch.float64),
    "long": (OWN, 2100, torch.float32),
    "no drafts": ([], 7, torch.float32),
}


@pytest.mark.parametrize(("kind", "name"), covered(["chosen", "independent", "distinct"], TREES))
def test_decides_as_the_reference(device, kind, name):
    parents, size, dtype = TREES[name]
    generator = torch.Generator().manual_seed(size)
    seen = set()
    for _ in range(1 + (size == 37)):
        given, named = judged(generator, device, parents, size, kind, dtype)
        tokens, counts, path = in_turn(*given, **named, backend="triton")
        expected = in_turn(*given, **named, backend="reference")
        assert counts.equal(expected[1])
        for row, count in enumerate(counts.tolist()):
            assert tokens[row, :count].equal(expected[0][row, :count])
            assert path[row, : count - 1].equal(expected[2][row, : count - 1])
            seen.add(count)
    if 7 < size < 100:
        assert len(seen) > 1


def rejects(tokens, law):
    observed = torch.bincount(tokens, minlength=len(law))
    expected = law.double() * len(tokens)
    return chi2.sf(float(((observed - expected) ** 2 / expected).sum()), len(law) - 1) < 1e-4


@pytest.mark.parametrize("kind", ["independent", "distinct"])
def test_the_first_token_follows_the_target_and_a_mutant_does_not(device, kind):
    """Two siblings from q, in turn; one mutant clings to drafts, the other forgets how they were drawn."""
    rows, is_distinct = 100, kind == "distinct"
    generator = torch.Generator().manual_seed(4)
    p, q = torch.tensor([0.45, 0.45, 0.1]), torch.tensor([0.9, 0.05, 0.05])
    drafts = q.expand(rows, 3).multinomial(2, not is_distinct, generator=generator)
    children = topology_of(torch.tensor([-1, -1])).children
    laws = p.log().expand(rows, 3, 3), q.log().expand(rows, 2, 3)
    accept = torch.rand(rows, 3, 2, generator=generator, dtype=torch.float64)
    recover = torch.rand(rows, 3, generator=generator, dtype=torch.float64)

    def first(uniforms, replaces):
        given = [part.to(device) for part in (drafts, children, *laws, uniforms, recover)]
        return in_turn(*given, 1, replaces=replaces, backend="triton")[0][:, 0].cpu()

    assert not rejects(first(accept, not is_distinct), p)
    mutant = first(accept, True) if is_distinct else first(accept / 2, True)
    assert rejects(mutant, p)
