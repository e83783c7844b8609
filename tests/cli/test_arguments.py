import pytest

from multicam.cli.arguments import add_channels, add_output, pair
from multicam.cli.help import Command


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("-1", -1), ("logits", "logits"), ("heads.0", "heads.0"), ("1x", "1x")]
)
def test_outputs_are_positions_or_paths(text, value):
    parser = Command()
    add_output(parser)
    assert parser.parse_args(["--output", text]).output == value
    assert parser.parse_args([]).output is None


def test_channels_are_numbers_with_commas_between(capsys):
    parser = Command()
    add_channels(parser, "--channels", "which")
    assert parser.parse_args(["--channels", "3"]).channels == [3]
    assert parser.parse_args(["--channels", "3,0"]).channels == [3, 0]
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--channels", "1,x"])
    assert "'1,x' is not a number" in capsys.readouterr().err


def test_only_the_first_sign_of_equality_parts_a_name_from_its_value():
    assert pair("rgb=a=b.png") == ("rgb", "a=b.png")
