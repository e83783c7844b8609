"""What bounds the releases that the tests are run with."""

import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[2]


def names(lines: str) -> set[str]:
    """The libraries of requirements, of which `;` or a line's end comes after each."""
    return {match[0] for line in re.split("[;\n]", lines) if (match := re.match(r"[\w-]+", line))}


def test_every_library_that_setup_names_is_bound() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    assert names("\n".join(named)) - {"multicam-torch"} <= names((ROOT / "tests/constraints.txt").read_text())
