"""`multicam kernels`: what a convolution looks for."""

import argparse
from collections.abc import Callable

from multicam.cli.arguments import add_channels, add_out, loaded_model, source
from multicam.cli.help import Command
from multicam.cli.results import write

DESCRIPTION = """\
Draw the kernels of a convolution: in colours where it reads three channels, else as signed maps.
"""
EXAMPLE = """\
example:
  multicam kernels nets.py:build --weights best.pt --layer rgb.stem.0 --out kernels.png
"""


def add(command: Callable[..., Command]) -> None:
    """Add the command with `add_parser`, as argparse calls it."""
    kernels = command(
        "kernels",
        help="what a convolution looks for",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        parents=[source()],
    )
    kernels.add_argument("--layer", metavar="PATH", required=True, help="a convolution's path in the model")
    add_channels(kernels, "--channels", "which output channels (default: those with the strongest kernels)")
    add_channels(kernels, "--in-channels", "which input channels, each drawn as a map")
    kernels.add_argument("--most", type=int, default=64, help="how many kernels are drawn (default: 64)")
    add_out(kernels, "kernels.png")
    kernels.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from multicam.figures.features import kernel_sheet
    from multicam.inside.features import kernels
    from multicam.watch.undisturbed import find_module

    found = kernels(find_module(loaded_model(args), args.layer))
    print(f"{args.layer}: {found}")
    sheet = kernel_sheet(found, channels=args.channels, in_channels=args.in_channels, most=args.most, title=args.layer)
    write("picture", args.out, sheet.save)
