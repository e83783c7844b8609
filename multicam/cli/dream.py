"""`multicam dream`: the input that a channel or a class responds to most."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from multicam.cli.arguments import add_channels, add_out, add_output, add_repeated, add_seed, called, loaded
from multicam.cli.help import Command
from multicam.cli.results import write
from multicam.errors import MulticamError

# What imports torch is imported by the functions themselves, so that --help need not wait for it.
if TYPE_CHECKING:
    import torch

    import multicam.call.inputs
    import multicam.inside.dream

DESCRIPTION = """\
Draw what a channel of a layer, a whole layer or a class responds to most, by changing one input
step by step while all others are held; with --octaves, as a deep dream of the given picture.
"""
EXAMPLE = """\
{targets}
example:
  multicam dream nets.py:build --input rgb=photo.png --input depth=depth.npy \\
      --onto rgb --layer rgb.layer2 --channel 0,3,5 --out dream.png
  multicam dream nets.py:build --input rgb=photo.png --input depth=depth.npy \\
      --onto rgb --layer rgb.layer2 --octaves 4 --out dream.png
"""


def add(command: Callable[..., Command]) -> None:
    """Add the command with `add_parser`, as argparse calls it."""
    dream = command(
        "dream",
        help="the input that a channel or a class responds to most",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        parents=[called()],
    )
    dream.add_argument("--onto", metavar="NAME", help="the input that is changed (default: the only image)")
    dream.add_argument("--layer", metavar="PATH[#CALL][:PICK]", help="a layer as `multicam layers` lists it")
    add_repeated(dream, "--grid", "GRID", "as for `multicam features`")
    add_channels(dream, "--channel", "its channel, or several: a picture each (default: all at once)")
    dream.add_argument("--target", help="instead of a layer, the class or score to maximise, see targets below")
    add_output(dream)
    dream.add_argument("--steps", type=int, help="how many steps (default: 128, or 10 for each octave)")
    dream.add_argument("--octaves", type=int, help="start from the picture and enlarge it so many times, less one")
    add_seed(dream)
    add_out(dream, "dream.png")
    dream.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from multicam.call.files import blame
    from multicam.figures.dreams import dream_figure, history_figure

    model, inputs = loaded(args)
    with blame("running the model"):
        dream = _dreamt(args, model, inputs)
    for label, start, end in zip(dream.labels, dream.start.tolist(), dream.objective.tolist(), strict=True):
        print(f"{label}: {start:.4g} to {end:.4g}")
    write("picture", args.out, dream_figure(dream).save)
    write("history", args.out.with_stem(f"{args.out.stem}-history"), history_figure(dream).save)


def _dreamt(
    args: argparse.Namespace, model: "torch.nn.Module", inputs: "multicam.call.inputs.Inputs"
) -> "multicam.inside.dream.Dream":
    """The dream: from the given picture if there are octaves, else from noise."""
    from multicam.cli.words import read_layers, read_target
    from multicam.inside.dream import activation_maximization, deep_dream

    layer = None if args.layer is None else next(iter(read_layers([args.layer], args.grid).values()))
    options = {"onto": args.onto, "seed": args.seed} | ({} if args.steps is None else {"steps": args.steps})
    if args.octaves is None:
        target = None if args.target is None else read_target(args.target)
        return activation_maximization(model, inputs, layer, args.channel, target=target, output=args.output, **options)
    if layer is None or args.target is not None:
        raise MulticamError("a deep dream is of a layer: give --layer and no --target")
    channels = args.channel or [None]
    if len(channels) > 1:
        raise MulticamError(f"a deep dream is of one channel, not of {len(channels)}")
    return deep_dream(model, inputs, layer, channels[0], octaves=args.octaves, **options)
