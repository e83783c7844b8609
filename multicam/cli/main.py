"""The `multicam` command."""

import sys
import traceback
import warnings
from collections.abc import Sequence

from multicam import __version__
from multicam.cli import contribution, demo, dream, evaluate, explain, features, kernels, layers, saliency
from multicam.cli.help import Command
from multicam.errors import MulticamError

DESCRIPTION = """\
Explain a PyTorch model that takes several inputs, without editing it. A first look:

  multicam demo

Each command shows an example of its own with --help.
"""
# As the help lists them. None imports torch before it runs.
COMMANDS = (demo, layers, explain, saliency, contribution, evaluate, features, kernels, dream)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0, or 1 with a message on stderr; argparse itself exits with 2 for wrong usage."""
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            args.run(args)
        except (MulticamError, OSError) as error:
            hint = ""
            if args.debug:
                traceback.print_exc()
            elif error.__cause__ is not None:  # some other code failed, which the message does not show
                hint = " (--debug shows where)"
            print(f"multicam: {' '.join(str(error).split())}{hint}", file=sys.stderr)
            return 1
    return 0


def _parser() -> Command:
    parser = Command("multicam", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"multicam {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands.add_parser)
    return parser
