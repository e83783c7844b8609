"""Tables of text, and bars for what takes long."""

import pytest

from multicam.printing import aligned, percent, progress


def test_every_column_is_as_wide_as_its_longest_cell() -> None:
    rows = [("input", "share", "note"), ("rgb", "9 %", ""), ("depth map", "91 %", "most")]
    assert aligned(rows).splitlines() == ["input      share  note", "rgb        9 %", "depth map  91 %   most"]
    assert aligned(iter(rows), str.rjust).splitlines()[1] == "      rgb    9 %"


def test_rows_of_another_length_are_no_table() -> None:
    with pytest.raises(ValueError, match="zip"):
        aligned([("a", "b"), ("c",)])


@pytest.mark.parametrize(("seconds", "shown"), [(1.0, False), (3.0, True)])
def test_a_bar_comes_after_two_seconds(
    seconds: float, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    found = []
    for item in progress(iter("abcd"), 4, "letters"):
        found.append(item)
        clock[0] += seconds / 4
    assert found == list("abcd")
    written = capsys.readouterr()
    assert ("letters" in written.err) == shown
    assert written.out == ""


def test_items_come_one_at_a_time() -> None:
    taken = []
    for item in progress((taken.append(i) or i for i in range(3)), 3, "numbers"):
        assert taken[-1] == item
        if item == 1:
            break
    assert taken == [0, 1]


def test_a_share_is_told_with_its_sign() -> None:
    assert list(map(percent, (0.0, -0.0, -0.004, 0.005, -0.93, 1.0))) == ["0%", "0%", "0%", "0%", "-93%", "100%"]
