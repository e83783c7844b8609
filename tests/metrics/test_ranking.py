"""Means with their intervals, comparisons, and the table in every form."""

import csv

import pytest
import torch

from multicam import MulticamError
from multicam.metrics.ranking import Comparison, Evaluation, Row


def table(values, better="up"):
    return Evaluation({name: {"m": x} for name, x in values.items()}, {"m": better}, frozenset())


def test_a_paired_difference_is_surer_than_two_intervals():
    hard = torch.arange(30.0)
    noise = torch.randn(30, generator=torch.Generator().manual_seed(0))
    found = table({"a": hard + 0.5 + 0.3 * noise, "b": hard})
    a, b = found.table()
    assert a.low < b.high  # they overlap
    compared = found.compare("a", "b", "m")
    assert compared.sure
    assert compared.mean == pytest.approx((0.5 + 0.3 * noise).mean().item(), abs=1e-5)
    assert compared.wins == pytest.approx((0.5 + 0.3 * noise > 0).double().mean().item())
    assert repr(compared).endswith("of 30 samples; a is better")
    noisy = table({"a": hard + noise, "b": hard}).compare("a", "b", "m")
    assert not noisy.sure
    assert repr(noisy).endswith("either may be better")


def test_less_may_be_better_and_one_sample_proves_nothing():
    found = table({"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}, "down")
    compared = found.compare("a", "b", "m")
    assert compared == Comparison("a", "b", "m", "down", -1.0, -1.0, -1.0, 1.0, 1)
    assert not compared.sure
    assert found.table() == [Row("a", "m", 1.0, 1.0, 1.0), Row("b", "m", 2.0, 2.0, 2.0)]


def test_the_table_shows_direction_interval_best_and_what_has_no_meaning(tmp_path):
    values = {
        "long name": {"up": torch.tensor([1.0, 3.0]), "down": torch.tensor([5.0, 5.0]), "own": torch.zeros(2)},
        "b": {"up": torch.full((2,), torch.nan), "down": torch.tensor([5.0, 7.0]), "own": torch.ones(2)},
    }
    found = Evaluation(values, {"up": "up", "down": "down", "own": None}, frozenset(["b"]))
    assert repr(found).splitlines()[:4] == [
        "                 up ↑        down ↓           own",
        "long name  2 (1 to 3)    5 (5 to 5) *  0 (0 to 0)",
        "b †                 -    6 (5 to 7)    1 (1 to 1)",
        "2 samples, * the best",
    ]
    assert found.markdown().splitlines()[:4] == [
        "|  | up ↑ | down ↓ | own |",
        "| --- | ---: | ---: | ---: |",
        "| long name | 2 (1 to 3) | **5 (5 to 5)** | 0 (0 to 0) |",
        "| b † | - | 6 (5 to 7) | 1 (1 to 1) |",
    ]
    found.csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "method": "long name", "metric": "down", "better": "down", "mean": "5.0", "low": "5.0", "high": "5.0", "samples": "2"
    }  # fmt: skip
    assert [(row["method"], row["mean"]) for row in rows if row["metric"] == "up"] == [
        ("long name", "2.0"),
        ("b", "nan"),
    ]
    assert repr(table({"a": torch.tensor([0.5])})).splitlines() == ["   m ↑", "a  0.5", "1 sample"]
    with pytest.raises(MulticamError, match="has no number for every sample of 'long name' and 'b'"):
        found.compare("long name", "b", "up")
    with pytest.raises(MulticamError, match="nothing says which direction of 'own' is better"):
        found.compare("long name", "b", "own")
    with pytest.raises(MulticamError, match="no method 'c'"):
        found.mean("c", "up")
    with pytest.raises(MulticamError, match="no metric 'upp'; did you mean 'up'"):
        found.mean("b", "upp")
