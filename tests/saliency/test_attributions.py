import copy
import pickle

import pytest
import torch

from multicam import MulticamError
from multicam.saliency.attributions import Attributions


def two() -> dict[str, torch.Tensor]:
    return {"rgb": torch.randn(2, 3, 4, 6), "table": torch.randn(2, 5)}


def test_a_dict_that_knows_what_its_numbers_mean() -> None:
    values, scores = two(), torch.tensor([1.0, 2.0])
    found = Attributions(values, scores)
    assert found.keys() == values.keys()
    assert all(found[name] is values[name] for name in values)
    assert not found.comparable
    assert Attributions(values, scores, weights={"rgb": 1.0, "table": 1.0}).comparable
    assert repr(found) == "Attributions(rgb: (2, 3, 4, 6), table: (2, 5), comparable=False)"
    for again in (copy.copy(found), pickle.loads(pickle.dumps(found))):
        assert torch.equal(again["table"], values["table"])
        assert torch.equal(again.scores, scores)


def test_evidence_is_the_weighted_sum_of_each_input() -> None:
    values = {**two(), "age": torch.tensor([3.0, -1.0])}
    found = Attributions(values, torch.zeros(2), weights={"rgb": 1.0, "table": 0.5, "age": 2.0})
    assert torch.allclose(found.evidence["rgb"], values["rgb"].sum((1, 2, 3)), atol=1e-5)
    assert torch.allclose(found.evidence["table"], values["table"].sum(1) / 2, atol=1e-5)
    assert found.evidence["age"].tolist() == [6, -2]


def test_error_is_what_is_missing_of_the_change_as_a_share() -> None:
    values = {"a": torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([[1.0], [0.0], [1.0]])}
    found = Attributions(values, torch.zeros(3), weights={"a": 1.0, "b": 1.0}, change=torch.tensor([5.0, 0.0, -1.0]))
    # The second says that nothing changes, and nothing does.
    assert torch.allclose(found.error, torch.tensor([0.2, 0.0, 2.0]))


def test_what_has_no_units_has_no_evidence_and_no_error() -> None:
    with pytest.raises(MulticamError, match="not in units of the score, so they do not add up to evidence"):
        _ = Attributions(two(), torch.zeros(2)).evidence
    with pytest.raises(MulticamError, match="not measured against a baseline"):
        _ = Attributions(two(), torch.zeros(2), weights={"rgb": 1.0, "table": 1.0}).error


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_mean_of_a_density_is_the_evidence(weight: float) -> None:
    values = {"image": torch.randn(2, 3, 4, 6), "clip": torch.randn(2, 5, 3, 4, 6), "signal": torch.randn(2, 2, 9)}
    found = Attributions(values, torch.zeros(2), weights=dict.fromkeys(values, weight))
    maps = found.maps()
    assert maps.comparable
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        "image": (2, 4, 6),
        "clip": (2, 5, 4, 6),
        "signal": (2, 9),
    }
    for name, m in maps.items():
        assert torch.allclose(m.flatten(1).mean(1), found.evidence[name], atol=1e-5)


def test_ways_to_reduce_channels() -> None:
    values = two()
    found = Attributions(values, torch.zeros(2))
    assert found.maps().keys() == {"rgb"}  # a table has no places
    assert torch.equal(found.maps()["rgb"], values["rgb"].abs().amax(1))
    assert torch.equal(found.maps("max")["rgb"], values["rgb"].abs().amax(1))
    assert torch.allclose(found.maps("norm")["rgb"], values["rgb"].square().sum(1).sqrt())
    assert torch.allclose(found.maps("sum")["rgb"], values["rgb"].sum(1))
    assert not found.maps("sum").comparable
    weighted = Attributions(values, torch.zeros(2), weights={"rgb": 1.0, "table": 1.0})
    assert not weighted.maps("max").comparable
    assert not weighted.maps("norm").comparable


@pytest.mark.parametrize(("frames", "shape"), [(5, (2, 5, 3, 4, 6)), (5, (2, 3, 5, 4, 6))], ids=["t c", "c t"])
def test_clips_in_either_order(frames: int, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    expected = values.abs().amax(2 if shape[1] == frames else 1)
    assert torch.equal(Attributions({"clip": values}, torch.zeros(2)).maps()["clip"], expected)


def test_complex_gradients_count_by_their_size() -> None:
    values = torch.tensor([[[[3 + 4j, 1j]], [[0j, -2 + 0j]]]])
    found = Attributions({"spectrum": values}, torch.zeros(1))
    assert found.maps()["spectrum"].tolist() == [[[5, 2]]]
    assert torch.allclose(found.maps("norm")["spectrum"], torch.tensor([[[5.0, 5**0.5]]]))
