"""Where the samples of a batch lie in a tensor, and when two passes agree."""

import pytest
import torch

from multicam.watch.module_calls import Rows, alike


@pytest.mark.parametrize(("each", "apart"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_one_sample_wherever_they_lie(axis: int, each: int, apart: bool) -> None:
    one = [torch.rand(each, 2) for _ in range(4)]
    together = torch.stack(one, 1 if apart else 0).flatten(0, 1)
    copies = torch.stack([one[2]] * 5, 1 if apart else 0).flatten(0, 1)
    found = Rows(4, axis, each, apart).spread(together.movedim(0, axis), 2, 5)
    assert torch.equal(found, copies.movedim(0, axis))


def test_masks_filled_with_the_lowest_number_do_not_hide_a_difference() -> None:
    lowest = torch.finfo(torch.float32).min
    x, y = torch.tensor([0.0, 1.0, lowest]), torch.tensor([0.0, 1.1, lowest])
    assert alike(x, x.clone())
    assert not alike(x, y)
    assert alike(torch.tensor([1.0, torch.inf, torch.nan]), torch.tensor([1.0 + 1e-6, torch.inf, torch.nan]))
    assert not alike(torch.tensor([1, 2]), torch.tensor([1, 3]))
