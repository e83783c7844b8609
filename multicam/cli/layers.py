"""`multicam layers`: which layers there are, and which inputs each sees."""

import argparse
from collections.abc import Callable

from multicam.cli.arguments import called, loaded
from multicam.cli.help import Command
from multicam.errors import unknown

DESCRIPTION = """\
Run the model once per input and list every layer that is called: what it returns, the grid
of its map ("-" where nothing proves one), and the inputs it sees. Its map can be laid on any
of these.
"""
EXAMPLE = """\
example:
  multicam layers nets.py:build --input rgb=photo.png --input depth=depth.npy --find layer4
"""


def add(command: Callable[..., Command]) -> None:
    """Add the command with `add_parser`, as argparse calls it."""
    layers = command(
        "layers",
        help="which layers there are, and which inputs each sees",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        parents=[called()],
    )
    layers.add_argument("--find", metavar="TEXT", help="only layers whose path or class contains TEXT")
    layers.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from multicam.call.files import blame
    from multicam.watch.layer_table import list_layers

    model, inputs = loaded(args)
    with blame("running the model"):
        table = list_layers(model, inputs)
    found = table.find(args.find or "")
    if not found:
        raise unknown("layer", args.find, (info.path for info in table))
    print(found)
