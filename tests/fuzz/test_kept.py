"""Models that once failed, as small as they could be made."""

import pytest

from tests.fuzz.checks import failures
from tests.fuzz.models import Spec, Stream

KEPT = (
    # A list of lengths beside an image.
    Spec(1, 2, (Stream("rgb", "image"),), sides=("lengths",)),
    # The score in the batch is another one than alone, from which channels are ablated.
    Spec(500, 2, (Stream("rgb", "ids", ("last_row",)),)),
    # Only the second sample's score depends on its place in the batch.
    Spec(101631, 2, (Stream("rgb", "signal", ("relu",)),), fuse="stack", head=(("each_written", "replaced"), "relu")),
)


@pytest.mark.parametrize("spec", KEPT, ids=range(len(KEPT)))
def test_what_once_failed_does_not(spec: Spec) -> None:
    assert failures(spec) == []
