"""The cache against full recomputation: chains, trees, ragged commits, dropped rows."""

from __future__ import annotations

import pytest
import torch

from arvision import InputError, StateError
from arvision.decoding.tree import ancestor_mask, depths, topology_of
from arvision.testing import DroppingTableModel, tiny_llamagen


def assert_close(ours, expected):
    """Equal up to float64 rounding in another order of operations."""
    torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-9)


@pytest.fixture(scope="module")
def model():
    return tiny_llamagen(grid=(4, 5)).to(torch.float64)


def reference(model, conditions, scale, prefix):
    """Logits after a token sequence, recomputed without any cache of candidates."""
    state, logits = model.start(conditions, scale)
    if len(prefix) == 0:
        return logits[0]
    return state.extend(torch.tensor([prefix]))[0, -1]


def test_ancestors_and_depths():
    parents = torch.tensor([-1, 0, 0, -1, 2, 4])
    assert depths(parents).tolist() == [0, 1, 1, 0, 2, 3]
    assert ancestor_mask(parents)[5].tolist() == [True, False, True, False, True, True]


def random_parents(num, generator):
    return torch.tensor(
        [int(torch.randint(t + 1, (), generator=generator)) - 1 for t in range(num)]
    )


def test_trees_of_the_rows_follow_from_their_parents_as_one_tree_does():
    generator = torch.Generator().manual_seed(0)
    for num in (1, 2, 9, 40):
        parents = torch.stack([random_parents(num, generator) for _ in range(5)])
        parents[0], parents[1] = torch.arange(-1, num - 1), -1
        rows = topology_of(parents)
        assert not rows.is_shared
        assert rows.num_levels >= int(rows.depths.max()) + 1
        for row, own in enumerate(parents):
            alone = topology_of(own)
            assert alone.is_shared
            assert alone.parents == tuple(rows.parents[row])
            assert torch.equal(rows.ancestors[row], alone.ancestors)
            assert torch.equal(rows.depths[row], alone.depths)
            width = alone.children.shape[1]
            assert torch.equal(rows.children[row, :, :width], alone.children)
            assert (rows.children[row, :, width:] == -1).all()


@pytest.mark.parametrize("kind", ["llamagen", "table"])
def test_rows_with_trees_of_their_own(model, kind):
    """Each row says what it says alone with its own tree, and keeps a path of its own."""
    generator = torch.Generator().manual_seed(5)
    drawn = model if kind == "llamagen" else DroppingTableModel(3, 6)
    vocabulary = drawn.vocab_size
    state, _ = drawn.start([0, 1, 2], 2.0)
    alone = [drawn.start([row], 2.0)[0] for row in range(3)]
    for _ in range(3):
        parents = torch.stack([random_parents(7, generator) for _ in range(3)])
        tokens = torch.randint(vocabulary, (3, 7), generator=generator)
        logits = state.extend(tokens, parents)
        counts = torch.randint(0, 3, (3,), generator=generator)
        kept = torch.zeros(3, 7, dtype=torch.int64)
        for row in range(3):
            own = alone[row].extend(tokens[row : row + 1], parents[row])
            assert_close(logits[row], own[0])
            shape = topology_of(parents[row])
            deep = [t for t in range(7) if int(shape.depths[t]) + 1 >= int(counts[row])]
            if not deep:
                counts[row] = 1
                deep = [0]
            path = shape.ancestors[deep[0]].nonzero()[: int(counts[row]), 0]
            kept[row, : len(path)] = path
            alone[row].commit(kept[row : row + 1], counts[row : row + 1])
        state.commit(kept, counts)
    if kind == "llamagen":
        with pytest.raises(InputError, match="candidate 2 has parent 2"):
            state.extend(tokens[:, :3], torch.tensor([[-1, 0, 1], [-1, 0, 2], [-1, 0, 0]]))
        state.extend(tokens[:, :3], torch.tensor([[-1, 0, 1], [-1, -1, 0], [-1, 0, 0]]))
        with pytest.raises(StateError, match="follow its parent"):
            state.commit(torch.tensor([[0, 1]] * 3), torch.tensor([2, 2, 2]))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_random_trees_and_ragged_commits(model, scale, seed):
    generator = torch.Generator().manual_seed(seed)

    def integers(high, shape):
        return torch.randint(high, shape, generator=generator)

    conditions = [0, 2, 1]
    state, _ = model.start(conditions, scale)
    prefixes: list[list[int]] = [[], [], []]
    while max(map(len, prefixes)) < 14:
        num = int(integers(6, ())) + 1
        is_tree = bool(integers(2, ()))
        parents = torch.tensor([int(integers(t + 1, ())) - 1 for t in range(num)])
        if not is_tree:
            parents = torch.arange(num) - 1
        tokens = integers(64, (3, num))
        logits = state.extend(tokens, parents if is_tree else None)
        kept = torch.zeros(3, num, dtype=torch.int64)
        counts = torch.zeros(3, dtype=torch.int64)
        for row in range(3):
            paths = []
            for t in range(num):
                path, node = [], t
                while node >= 0:
                    path.insert(0, node)
                    node = int(parents[node])
                paths.append(path)
                sequence = prefixes[row] + [int(tokens[row, node]) for node in path]
                expected = reference(model, conditions[row : row + 1], scale, sequence)
                assert_close(logits[row, t], expected)
            chosen = paths[int(integers(num, ()))]
            chosen = chosen[: int(integers(len(chosen) + 1, ()))]
            kept[row, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
            counts[row] = len(chosen)
            prefixes[row] += [int(tokens[row, node]) for node in chosen]
        state.commit(kept, counts)
        assert state.lengths.tolist() == [len(prefix) for prefix in prefixes]


def test_padded_captions_in_ragged_trees():
    model = tiny_llamagen(caption_dim=8, caption_length=5, num_classes=None).to(torch.float64)
    features = [torch.randn(n, 8, dtype=torch.float64) for n in (5, 2, 1)]
    state, _ = model.start(features, 2.0)
    tokens = torch.randint(64, (3, 4))
    state.extend(tokens)
    state.commit(torch.arange(4).expand(3, 4), torch.tensor([1, 3, 2]))
    parents = torch.tensor([-1, 0, 0, 2])
    more = torch.randint(64, (3, 4))
    logits = state.extend(more, parents)
    for row, count in enumerate([1, 3, 2]):
        prefix = [*tokens[row, :count].tolist(), *more[row, [0, 2, 3]].tolist()]
        expected = reference(model, features[row : row + 1], 2.0, prefix)
        assert_close(logits[row, 3], expected)


def test_dropped_rows_leave_the_others_alone(model):
    state, _ = model.start([0, 1, 2], 3.0)
    tokens = torch.randint(64, (3, 4))
    state.extend(tokens)
    state.commit(torch.arange(4).expand(3, 4), torch.tensor([4, 1, 2]))
    state.select(torch.tensor([0, 2]))
    logits = state.extend(torch.tensor([[5], [6]]))
    for row, prefix, condition in ((0, [*tokens[0].tolist(), 5], 0), (1, [*tokens[2, :2], 6], 2)):
        expected = reference(model, [condition], 3.0, [int(t) for t in prefix])
        assert_close(logits[row, 0], expected)


def test_candidates_past_the_end_do_no_harm(model):
    state, _ = model.start([0, 1], 1.0)
    tokens = torch.randint(64, (2, 18))
    state.extend(tokens)
    state.commit(torch.arange(18).expand(2, 18), torch.tensor([18, 3]))
    more = torch.randint(64, (2, 100))
    logits = state.extend(more)
    prefix = [*tokens[1, :3].tolist(), *more[1, :10].tolist()]
    expected = reference(model, [1], 1.0, prefix)
    assert_close(logits[1, 9], expected)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([-1, 1, 0], "candidate 1 has parent 1"),
        ([-1, 2, 0], "candidate 1 has parent 2"),
        ([-2, 0, 0], "candidate 0 has parent -2"),
        ([-1, 0], r"expected \[3\]"),
    ],
)
def test_parents_that_are_no_tree(model, parents, message):
    state, _ = model.start([0])
    with pytest.raises(InputError, match=message):
        state.extend(torch.zeros(1, 3, dtype=torch.int64), torch.tensor(parents))


def test_commits_that_are_no_path(model):
    state, _ = model.start([0])
    with pytest.raises(StateError, match="call extend first"):
        state.commit(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    state.extend(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([-1, 0, 0]))
    with pytest.raises(StateError, match="follow its parent"):
        state.commit(torch.tensor([[1]]), torch.tensor([1]))
    with pytest.raises(StateError, match=r"candidates 0\.\.2"):
        state.commit(torch.tensor([[0, 3]]), torch.tensor([2]))
    state.commit(torch.tensor([[0, 2]]), torch.tensor([2]))
    assert state.lengths.tolist() == [2]


def test_a_tree_that_does_not_fit(model):
    state, _ = model.start([0])
    with pytest.raises(StateError, match="does not fit"):
        state.extend(torch.zeros(1, 200, dtype=torch.int64), torch.full((200,), -1))


def test_the_cache_is_preallocated(model):
    state, _ = model.start([0], 1.0)
    address = state.cache.keys.data_ptr()
    for _ in range(19):
        state.extend(torch.zeros(1, 1, dtype=torch.int64))
        state.commit(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    assert state.cache.keys.data_ptr() == address
