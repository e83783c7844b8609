import subprocess
import sys
from pathlib import Path

import pytest

import multicam
import multicam.cli
from multicam.cli.main import COMMANDS, main
from tests.helpers.commands import INPUTS, LAYERED, TWO, help_has_an_example_and_its_lists, help_of

pytestmark = pytest.mark.usefixtures("here")
NAMES = [command.__name__.rpartition(".")[2] for command in COMMANDS]
# Prints what of the heavy libraries is imported after the help of each command that is named in the arguments.
HELPS = """
import sys
from multicam.cli.main import main
for name in sys.argv[1:]:
    try:
        main([*name.split(), "--help"])
    except SystemExit:
        print(name, {"torch", "cv2", "numpy", "matplotlib"} & {*sys.modules} or "nothing", file=sys.stderr)
"""


def test_every_file_of_a_command_is_in_the_list_and_in_the_help(capsys):
    files = {path.stem for path in Path(multicam.cli.__file__).parent.glob("*.py")}
    assert set(NAMES) == files - {"__init__", "main", "arguments", "help", "results", "words"}
    assert len(set(NAMES)) == len(NAMES)
    listed = help_of(capsys).partition("COMMAND\n")[2].splitlines()
    assert [line.split()[0] for line in listed if line.startswith("    ") and line[4] != " "] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example_and_its_lists(capsys, name):
    help_has_an_example_and_its_lists(capsys, name)


def test_only_a_help_that_lists_methods_or_metrics_waits_for_torch():
    light = ["", *(name for name in NAMES if name not in ("explain", "saliency", "evaluate"))]
    done = subprocess.run([sys.executable, "-c", HELPS, *light], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [f"{name} nothing" for name in light]


def test_a_directory_that_cannot_be_written(run):
    Path("taken").touch()
    code, _, err = run("explain", *TWO, *LAYERED, "--out", "taken/panel.png")
    assert code == 1
    assert err.startswith("multicam: [Errno")


def test_debug_shows_where(run):
    code, _, err = run("layers", "nets.py:broken", *INPUTS, "--debug")
    assert code == 1
    assert "Traceback" in err
    assert 'raise FileNotFoundError("no backbone here")' in err
    assert err.endswith("\nmulticam: the factory nets.py:broken failed with FileNotFoundError: no backbone here\n")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nets.py:broken", "the factory nets.py:broken failed with FileNotFoundError: no backbone here (--debug shows where)"),
        ("nets.py:brokn", "no object in nets.py 'brokn'; did you mean 'broken'? There are: "),
    ],
    ids=["their code", "their words"],
)  # fmt: skip
def test_debug_is_advised_where_there_is_more_to_see(run, model, message):
    code, _, err = run("layers", model, *INPUTS)
    assert code == 1
    assert err.startswith(f"multicam: {message}")
    assert ("--debug" in err) == ("--debug" in message)


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line_on_stderr(run):
    code, _, err = run("explain", "nets.py:dark", "--input", "input=rgb.png", "--layer", "0.layer2")
    assert code == 0
    assert err.startswith("warning: the GradCAM map of layer 'input' ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["explian"], "invalid choice: 'explian'"),
        (["explain", "nets.py:build", "--input", "rgb.png", *LAYERED], "'rgb.png' is not of the form NAME=…"),
        (["explain", *TWO, "--scale", "shard"], "invalid choice: 'shard'"),
    ],
)
def test_wrong_usage_exits_with_2(capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert message in capsys.readouterr().err


def test_help_has_an_example(capsys):
    assert "\n  multicam demo\n" in help_of(capsys)


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "multicam", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"multicam {multicam.__version__}\n"
