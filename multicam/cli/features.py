"""`multicam features`: what a layer returns, channel by channel."""

import argparse
from collections.abc import Callable

from multicam.cli.arguments import LAYER, add_channels, add_grids, add_out, called, loaded
from multicam.cli.help import Command
from multicam.cli.results import write

DESCRIPTION = """\
Draw the maps that a layer returns, channel by channel, and keep the numbers in an .npz file
beside the picture.
"""
EXAMPLE = """\
{grids}
example:
  multicam features nets.py:build --input rgb=photo.png --input depth=depth.npy \\
      --layer rgb=rgb.layer1 --most 16 --out features.png
"""


def add(command: Callable[..., Command]) -> None:
    """Add the command with `add_parser`, as argparse calls it."""
    features = command(
        "features",
        help="what a layer returns, channel by channel",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        parents=[called()],
    )
    features.add_argument(
        "--layer",
        metavar=LAYER,
        required=True,
        help="a layer as `multicam layers` lists it; a NAME that is an input's shows that input as well",
    )
    add_grids(features)
    features.add_argument("--sample", type=int, default=0, help="which sample, counted from 0 (default: 0)")
    add_channels(features, "--channels", "which channels (default: the most active)")
    features.add_argument("--most", type=int, default=32, help="how many of the most active are drawn (default: 32)")
    features.add_argument(
        "--scale", choices=["shared", "each"], default="shared", help="one scale for all channels, or one each"
    )
    add_out(features, "features.png")
    features.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import numpy as np

    from multicam.call.files import blame
    from multicam.cli.words import read_layers
    from multicam.figures.features import feature_sheet
    from multicam.inside.features import feature_maps
    from multicam.watch.undisturbed import unwrapped

    model, inputs = loaded(args)
    [(name, layer)] = read_layers([args.layer], args.grid, unnamed="").items()
    with blame("running the model"):
        maps = feature_maps(model, inputs, layer)
    images = inputs.bind(unwrapped(model)).images
    seen = [image for image in images if f".{image}".endswith(f".{name}")] if name else list(images)[: len(images) == 1]
    picture = feature_sheet(
        maps,
        channels=args.channels,
        most=args.most,
        sample=args.sample,
        image=images[seen[0]][args.sample] if seen else None,
        scale=args.scale,
        title=args.layer,
    )
    numbers = args.out.with_suffix(".npz")
    write("maps", numbers, lambda file: np.savez_compressed(file, maps=maps.cpu().numpy()), tuple(maps.shape))
    write("picture", args.out, picture.save)
