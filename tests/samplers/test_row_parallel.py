"""Rows in parallel: plain sampling where nothing is approximated, the right context elsewhere."""

from __future__ import annotations

import pytest
import torch

from arvision import InputError, get_sampler
from arvision.decoding.noise import Noise
from arvision.decoding.row_parallel import _FirstTokens
from arvision.decoding.verify import gumbel_draw
from arvision.testing import TableModel, tiny_llamagen

SIDE = 6


@pytest.fixture(scope="module")
def model():
    return tiny_llamagen(grid=(SIDE, SIDE)).to(torch.float64)


def run(name, model, num=4, on_step=None, **options):
    sampler = get_sampler(name, **options)
    seeds, classes = [(7, k) for k in range(num)], [k % 3 for k in range(num)]
    return sampler(model, classes, seeds=seeds, guidance_scale=2.0, on_step=on_step)


class Spy:
    """A model whose state writes down every call of `extend_at`."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def start(self, conditions, guidance_scale=1.0):
        state, logits = self.model.start(conditions, guidance_scale)
        inner = state.extend_at

        def extend_at(tokens, positions, visible):
            self.calls.append((tokens.clone(), positions.clone(), visible.clone()))
            return inner(tokens, positions, visible)

        state.extend_at = extend_at
        return state, logits


def test_extend_at_agrees_with_extend_in_any_order(model):
    tokens = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
    reference = model.start([0, 2], 3.0)[0].extend(tokens)
    state, _ = model.start([0, 2], 3.0)
    causal = torch.ones(SIDE**2, SIDE**2, dtype=torch.bool).tril()
    # Position 3 first holds another token; padding stands in the middle of a call.
    for places in ([0, 1], [2, -1, 3], [3], [6, 5, 4], list(range(7, 20))):
        positions = torch.tensor(places).expand(2, -1)
        inside = positions.clamp(min=0)
        fed = tokens.gather(1, inside)
        if places == [2, -1, 3]:
            fed = (fed + 1) % 64
            fed[:, 0] = tokens[:, 2]
        logits = state.extend_at(fed, positions, causal[inside])
        for column, place in enumerate(places):
            if place >= 0 and places != [2, -1, 3]:
                # float64 rounding in another order of operations
                torch.testing.assert_close(
                    logits[:, column], reference[:, place], rtol=0.0, atol=1e-9
                )


def test_bad_positions(model):
    state, _ = model.start([0], 1.0)
    token, sees = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, SIDE**2).bool()
    with pytest.raises(InputError, match="positions: expected -1"):
        state.extend_at(token, token + SIDE**2, sees)
    with pytest.raises(InputError, match="visible"):
        state.extend_at(token, token, sees[..., :3])
    with pytest.raises(InputError, match=r"expected \[1, T\] both"):
        state.extend_at(token, token.expand(1, 2), sees)


@pytest.mark.parametrize("local_window", [SIDE, 1000])
@pytest.mark.parametrize(
    ("name", "options"),
    [("zipar", {}), ("pjd", {"window": 2}), ("pjd", {"window": 4}), ("pjd", {"window": 99})],
)
def test_one_row_at_a_time_is_plain_sampling(model, name, options, local_window):
    expected = run("ar", model)
    out = run(name, model, local_window=local_window, **options)
    assert torch.equal(out.tokens, expected.tokens)
    if name == "zipar":
        assert out.stats.commit_pass == expected.stats.commit_pass
    else:
        assert out.stats.forward_passes < expected.stats.forward_passes
        assert torch.equal(out.tokens, run("sjd", model).tokens)


def test_padded_captions():
    model = tiny_llamagen(grid=(3, 4), caption_dim=8, caption_length=5, num_classes=None).to(
        torch.float64
    )
    generator = torch.Generator().manual_seed(2)
    features = [torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (5, 2)]
    options = {"seeds": [3, 4], "guidance_scale": 2.0}
    expected = get_sampler("ar")(model, features, **options)
    for name in ("zipar", "pjd"):
        out = get_sampler(name, local_window=4)(model, features, **options)
        assert torch.equal(out.tokens, expected.tokens)


@pytest.mark.parametrize("local_window", [1, 2, 4])
def test_a_window_of_one_is_zipar(model, local_window):
    zipar = run("zipar", model, local_window=local_window)
    pjd = run("pjd", model, local_window=local_window, window=1)
    assert torch.equal(zipar.tokens, pjd.tokens)
    assert zipar.stats.commit_pass == pjd.stats.commit_pass


@pytest.mark.parametrize("local_window", range(1, SIDE + 1))
def test_schedule(model, local_window):
    out = run("zipar", model, local_window=local_window)
    assert out.stats.forward_passes == 2 * SIDE - 1 + (SIDE - 2) * local_window
    commit = torch.tensor(out.stats.commit_pass[0]).view(SIDE, SIDE)
    assert commit[0].tolist() == list(range(SIDE))
    assert (commit.diff(dim=1) == 1).all()
    assert (commit[2:, 0] == commit[1:-1, local_window - 1] + 1).all()
    expected = run("ar", model).tokens
    assert torch.equal(out.tokens[:, :SIDE], expected[:, :SIDE]), "the first row is drawn alone"
    assert torch.equal(out.tokens, expected) == (local_window == SIDE)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 3}, {"window": 6}])
@pytest.mark.parametrize("local_window", [1, 3])
def test_candidates_see_final_tokens_and_drafts_of_their_own_row(model, options, local_window):
    spy = Spy(model)
    final = run("pjd", spy, 1, local_window=local_window, **options).tokens[0].tolist()
    held: dict[int, int] = {}
    stand_ins = 0
    for tokens, positions, visible in spy.calls:
        fed = dict(zip(positions[0].tolist(), tokens[0].tolist(), strict=True))
        assert len(fed) == positions.shape[1], "no position is fed twice in a pass"
        held |= fed
        for column, place in enumerate(positions[0].tolist()):
            seen = visible[0, column].nonzero()[:, 0].tolist()
            assert max(seen) <= place
            # A position predicts the next one, so a row's chain starts one place before it.
            row = (place + 1) // SIDE
            for other in seen:
                is_last = other % SIDE == SIDE - 1
                stand_ins += is_last and held[other] != final[other]
                is_own = (other + 1) // SIDE == row
                assert is_own or is_last or held[other] == final[other]
            # Everything final that is above or to the left, fed by now, is visible.
            for other in range(place):
                if (other + 1) // SIDE < row and held.get(other) == final[other]:
                    assert other in seen or (other in fed and other % SIDE != SIDE - 1)
    assert stand_ins > 0
    # The image may be finished before the last rows' drafts are fed again.
    settled = range(SIDE * (SIDE - 2))
    assert all(held[place] == final[place] for place in settled), "stand-ins were replaced"


def test_pjd_takes_fewer_passes_than_zipar(model):
    zipar, pjd = (run(name, model, 8).stats for name in ("zipar", "pjd"))
    assert pjd.tokens_per_pass > zipar.tokens_per_pass
    assert zipar.lossless is False


def test_stopping_from_the_callback(model):
    out = run("zipar", model, on_step=lambda step, figures: step == 3)
    assert out.stats.forward_passes == 3
    assert out.tokens[:, 4:].eq(0).all()


@pytest.mark.parametrize("name", ["zipar", "pjd"])
def test_bad_input(model, name):
    with pytest.raises(InputError, match=f"'{name}' draws rows.*has no grid"):
        get_sampler(name)(TableModel(), [None], seeds=[0])
    with pytest.raises(InputError, match=r"TableModel cannot be fed.*no `extend_at`"):
        get_sampler(name)(TableModel(grid=(2, 2)), [None], seeds=[0])
    for value in (0, 2.5, True):
        with pytest.raises(InputError, match="local_window"):
            get_sampler(name, local_window=value)
    with pytest.raises(InputError, match="window 0"):
        get_sampler("pjd", window=0)
    with pytest.raises(InputError, match="window 'wide'"):
        get_sampler("zipar", window="wide")


def test_an_adaptive_window_of_a_whole_row_is_plain_sampling(model):
    out = run("zipar", model, window="adaptive", local_window=SIDE)
    assert torch.equal(out.tokens, run("ar", model).tokens)


def test_an_adaptive_window_is_one_per_row(model):
    out = run("zipar", model, 8, window="adaptive")
    least = run("zipar", model, 8, local_window=1).stats.forward_passes
    assert least < out.stats.forward_passes <= run("ar", model, 8).stats.forward_passes
    leads = set()
    for commit in torch.tensor(out.stats.commit_pass).view(-1, SIDE, SIDE):
        assert (commit.diff(dim=1) == 1).all()
        found = commit[2:, 0] - commit[1:-1, 0]
        # A guess needs one more token above to be judged.
        assert found.min() >= 2
        leads |= set(found.tolist())
    assert len(leads) > 1
    alone = get_sampler("zipar", window="adaptive")(model, [2], seeds=[(7, 5)], guidance_scale=2.0)
    assert torch.equal(alone.tokens[0], out.tokens[5]), "a function of the identity"


@pytest.mark.parametrize("spoilt", [False, True])
def test_guesses_that_were_judged_have_the_newest_law(spoilt):
    """Rejection sampling from p_k to p_k+1; a guess that always stays keeps the older law."""
    num, generator = 20_000, torch.Generator().manual_seed(0)
    older, newer = torch.randn(2, 5, generator=generator).log_softmax(-1)
    counts = torch.tensor([[4, 2, 0]]).expand(num, -1)
    first = _FirstTokens(counts, 4, older.expand(num, -1))
    images, rows = torch.arange(num), torch.full((num,), 2)
    noise = Noise([(3, k) for k in range(num)])
    guess = gumbel_draw(older.expand(num, 1, 5), rows[:, None], noise)[:, 0]
    same, final = first.judge(images, rows, older.expand(num, 5), guess, counts, noise)
    assert torch.equal(same, guess)
    assert not final.any()
    counts = counts + torch.tensor([0, 1, 0])
    law = older if spoilt else newer
    judged, final = first.judge(images, rows, law.expand(num, 5), guess, counts, noise)
    share = torch.bincount(judged, minlength=5) / num
    error = (share - newer.exp()).abs().max()
    assert error > 0.02 if spoilt else error < 0.02  # five standard deviations
    overlap = float(torch.minimum(older.exp(), law.exp()).sum())
    assert float(final.double().mean()) == pytest.approx(overlap, abs=0.02)
