"""What was said of parts of a call, and what it means."""

from typing import Any

import pytest

from multicam.call.marks import Marks, covered, find, within
from multicam.errors import MulticamError

CALL: dict[str, Any] = {"image": 0, "batch": {"lengths": [12, 9], "image": [1]}, "sizes": [[1, 2], [3, 4]]}


@pytest.mark.parametrize(
    ("short", "full"),
    [("image", "image"), ("lengths", "batch.lengths"), ("lengths.1", "batch.lengths.1"), ("sizes", "sizes"),
     ("sizes.1", "sizes.1"), ("sizes.1.0", "sizes.1.0"), ("batch", "batch"), ("batch.image", "batch.image")],
)  # fmt: skip
def test_a_name_means_a_leaf_or_else_a_container(short: str, full: str) -> None:
    assert find(CALL, short) == full


def test_a_name_of_nothing_or_of_several_is_refused() -> None:
    with pytest.raises(MulticamError, match=r"no input 'length'\. There are: 'image', 'batch\.lengths\.0'"):
        find(CALL, "length")
    with pytest.raises(MulticamError, match=r"'0' is ambiguous"):
        find(CALL, "0")


def test_a_container_stands_for_all_leaves_in_it() -> None:
    assert covered(CALL, ["sizes.1", "image"]) == {"sizes.1.0", "sizes.1.1", "image"}
    assert covered(CALL, []) == set()
    assert not within("image2", "image")


def test_marks_are_added_and_follow_new_names() -> None:
    marks = Marks().adding(rows=["0.lengths"], held=["1"]).adding(rows=["2"])
    assert marks.renamed({"0": "batch", "1": "x"}) == Marks(
        held=frozenset({"x"}), rows=frozenset({"batch.lengths", "2"})
    )
