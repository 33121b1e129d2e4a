"""The window with the most tokens per second: followed, repeatable, measured once."""

from __future__ import annotations

import json
import time
import warnings

import pytest
import torch
from forms import by_draws

from arvision import InputError, get_sampler
from arvision.decoding import window
from arvision.decoding.window import (
    CostTable,
    GoodputWindow,
    RowGoodput,
    clamp_window,
    measured_costs,
)
from arvision.testing import DroppingTableModel, draw_joint, law_p_value, tiny_llamagen


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch):
    monkeypatch.setattr(window, "MAX_SECONDS", 0.02)


@pytest.fixture(scope="module")
def model():
    return tiny_llamagen(grid=(6, 6)).to(torch.float64)


def run(model, num=3, **options):
    sampler = get_sampler("sjd", window="auto", **options)
    seeds, classes = [(2, k) for k in range(num)], [k % 3 for k in range(num)]
    return sampler(model, classes, seeds=seeds, guidance_scale=2.0)


def steep(best):
    """Costs that make one window the best by far."""
    return {window: 1.0 if window <= best else 100.0 for window in (1, 4, 8, 16, 32, 64)}


@pytest.mark.parametrize("best", [1, 4, 8, 16])
def test_a_clear_optimum_is_followed(model, best):
    # Every window gives its length in tokens, so the longest cheap one is best.
    table = [[1, window, seconds, window] for window, seconds in steep(best).items()]
    windows = run(model, cost_table=table).stats.windows
    assert set(windows[:3]) == {best}
    assert max(windows) == best
    assert set(run(model, cost_table=steep(1)).stats.windows) == {1}


def test_costs_may_differ_with_the_batch():
    policy = GoodputWindow(CostTable([[1, 1, 1], [1, 8, 1], [16, 1, 1], [16, 8, 50]]))
    assert policy.next(1, 64) == 8
    assert policy.next(16, 64) == 1
    assert policy.next(1, 5) == 5, "at most what the image still needs"


def test_the_window_follows_the_acceptances_of_the_run():
    costs = CostTable([[1, 1, 1.0, 1], [1, 4, 1.5, 2], [1, 16, 2.4, 3]])
    easy, hard, even = (GoodputWindow(costs) for _ in range(3))
    assert easy.next(1, 64) == 4
    for _ in range(20):
        easy.observe(4, [4], [4])
        hard.observe(4, [1], [4])
        even.observe(4, [2], [4])
        # Near the end of an image a pass could not give more.
        even.observe(4, [1], [1])
    assert (easy.next(1, 64), hard.next(1, 64), even.next(1, 64)) == (16, 1, 4)
    assert even.goodput(1, 4) == pytest.approx(2 / 1.5)


def test_interpolation():
    table = CostTable([[1, 1, 1], [1, 5, 3], [9, 1, 5]])
    assert table.seconds(1, 3) == 2
    assert table.seconds(5, 1) == 3
    assert table.seconds(99, 99) == 5
    assert table.tokens(1) == 1
    assert table.tokens(2) == pytest.approx(1 + window.PRIOR_ACCEPTANCE)


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_a_run_repeats_with_its_table_and_reads_no_clock(model, tmp_path, monkeypatch, coupling):
    first = run(model, coupling=coupling, cost_file=str(tmp_path / "costs.json"))
    table = json.loads(json.dumps(first.stats.cost_table))

    def no_clock():
        raise AssertionError("the clock was read")

    monkeypatch.setattr(time, "perf_counter", no_clock)
    again = run(model, coupling=coupling, cost_table=table)
    assert torch.equal(again.tokens, first.tokens)
    assert again.stats.windows == first.stats.windows
    if coupling == "gumbel":
        seeds = [(2, k) for k in range(3)]
        expected = get_sampler("ar")(model, [0, 1, 2], seeds=seeds, guidance_scale=2.0)
        assert torch.equal(first.tokens, expected.tokens)


@by_draws
@pytest.mark.parametrize("coupling", ["gumbel", "maximal", "independent"])
def test_a_window_that_adapts_keeps_the_law(coupling, num):
    table = [[1, 1, 1.0, 1], [1, 2, 1.2, 1.5], [1, 4, 1.6, 2.0]]
    sampler = get_sampler("sjd", window="auto", coupling=coupling, cost_table=table)
    model = DroppingTableModel(seed=1)
    samples = draw_joint(sampler, model, num, seed=3)
    assert law_p_value(samples, model.joint(sampler.shaping())) > 1e-4


def test_measured_once_and_saved(model, tmp_path, monkeypatch):
    file, made = tmp_path / "cache" / "costs.json", []

    def make(window):
        made.append(window)
        return get_sampler("sjd", window=window)

    def costs(num, file=file):
        return measured_costs(make, "sjd", model, [0] * num, 2.0, file)

    table = costs(1)
    assert [entry[:2] for entry in table] == [[1, w] for w in (1, 4, 8, 16, 32, 36)]
    assert table[0][3] == 1.0
    assert all(len(entry) == 4 and min(entry) > 0 for entry in table)
    assert made == [1, 4, 8, 16, 32, 36]
    assert costs(1) == table
    monkeypatch.setattr(window, "_MEASURED", {})
    assert costs(1) == table, "read from the file"
    assert len(made) == 6
    wider = costs(3)
    assert wider[:6] == table
    assert [entry[0] for entry in wider[6:]] == [4] * 6
    assert len(made) == 12
    assert costs(1) == table, "what other batches add changes nothing"
    [(key, saved)] = json.loads(file.read_text())["tables"].items()
    assert model.cost_key in key
    assert "guided" in key
    assert sorted(saved) == ["1", "4"]
    assert [path.name for path in file.parent.iterdir()] == ["costs.json"]


def test_a_broken_cache_file_costs_a_warning(model, tmp_path, monkeypatch):
    file = tmp_path / "costs.json"
    file.write_text("{")
    with pytest.warns(UserWarning, match="cannot be read"):
        run(model, 1, cost_file=str(file))
    assert json.loads(file.read_text())
    monkeypatch.setattr(window, "_MEASURED", {})
    with pytest.warns(UserWarning, match="not saved"):
        run(model, 1, cost_file=str(file / "below.json"))


def test_a_model_without_a_cost_key_is_not_saved(tmp_path):
    file = tmp_path / "costs.json"
    sampler = get_sampler("sjd", window="auto", cost_file=str(file))
    sampler(DroppingTableModel(), [None], seeds=[0])
    assert not file.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "best"}, "window 'best': expected an integer >= 1 or \"auto\""),
        ({"window": 8, "cost_table": {1: 1.0}}, 'cost_table with window 8: expected window "auto"'),
        ({"window": "auto", "cost_table": []}, "empty cost table"),
        ({"window": "auto", "cost_table": [[1, 2]]}, r"entry \[1, 2\]: expected"),
        ({"window": "auto", "cost_table": {4: -1.0}}, "all positive"),
        ({"window": "auto", "cost_table": 3}, "cost table 3: expected"),
        ({"window": "auto", "cost_table": {"four": 1.0}}, "expected"),
        ({"window": "auto", "cost_table": {4: float("nan")}}, "finite"),
        ({"window": "auto", "cost_table": {4: float("inf")}}, "finite"),
        ({"window": "auto", "cost_table": {0: 1.0}}, "from 1 on"),
        ({"window": "auto", "cost_table": [[1, 0.5, 1.0]]}, "from 1 on"),
        ({"window": "auto", "cost_table": [[0, 4, 1.0]]}, "from 1 on"),
        ({"window": "auto", "cost_table": [[True, 4, 1.0]]}, "from 1 on"),
        ({"window": "auto", "cost_table": [[1, 4, "1"]]}, "all positive"),
        ({"window": "auto", "cost_table": [[1, 4, 10**400, None]]}, "all positive"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        get_sampler("sjd", **options)


def test_a_window_larger_than_the_image_is_cut_with_one_warning(model):
    clamp_window.cache_clear()
    sampler = get_sampler("sjd", window=50)
    with pytest.warns(UserWarning, match="window 50: the image has 36 tokens"):
        out = sampler(model, [0], seeds=[0])
    assert max(out.stats.windows) <= 36
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(model, [0], seeds=[0])


SERVED = [[rows, w, 1 + rows * w / 40, 1 + 0.7 * (w - 1)] for rows in (1, 4) for w in (1, 4, 8)]
"""Passes whose candidates cost, and of which seven in ten were accepted when they were measured."""


def test_each_row_gets_what_its_own_acceptances_pay_for():
    policy = RowGoodput(CostTable(SERVED))
    assert policy.next_of([5, 6, 7, 8], 8) == [8, 8, 8, 8]
    for _ in range(12):
        own = policy.next_of([5, 6, 7, 8], 8)
        # Drafts of row 5 are always right, those of row 6 never.
        counts = [own[0], 1, 1 + round(0.7 * (own[2] - 1)), 1 + round(0.7 * (own[3] - 1))]
        policy.observe_of([5, 6, 7, 8], own, counts, [50] * 4)
    own = policy.next_of([5, 6, 7, 8], 8)
    assert (own[0], own[1]) == (8, 1)
    assert own[2] == own[3] == 8
    # A row that drafted nothing for long is tried again, and rows may leave.
    for _ in range(60):
        policy.observe_of([6], [1], [1], [50])
    assert policy.next_of([6], 8) == [8]
    # One row decides as the policy for whole batches does.
    one, whole = RowGoodput(CostTable(SERVED)), GoodputWindow(CostTable(SERVED))
    assert one.next_of([0], 8) == [whole.next(1, 8)]
    # No row is longer than what pays for all of them together.
    dear = RowGoodput(CostTable([[4, 1, 1.0, 1.0], [4, 8, 9.0, 3.0]]))
    assert dear.next_of([0, 1, 2, 3], 8) == [1] * 4
