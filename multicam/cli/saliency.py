"""`multicam saliency`: where in each input the evidence lies, entry by entry."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from multicam.cli.arguments import LAYER, add_out, add_repeated, add_spectral, add_target, called, loaded, pair
from multicam.cli.help import Command
from multicam.cli.results import row_names, write
from multicam.errors import MulticamError
from multicam.printing import aligned

# What imports torch is imported by the functions themselves, so that --help need not wait for it.
if TYPE_CHECKING:
    import multicam.saliency.attributions

DESCRIPTION = """\
Draw, for each input, what every entry of it did for a score, and keep the numbers: the
attributions, the scores and the target go to an .npz file beside the picture.
"""
EXAMPLE = """\
methods, whatever their case, hyphens and underscores:
{attributions}

{targets}
example:
  multicam saliency nets.py:build --input rgb=photo.png --input depth=depth.npy \\
      --method integrated-gradients --option baseline=blur --target 3 --out saliency.png
"""


def add(command: Callable[..., Command]) -> None:
    """Add the command with `add_parser`, as argparse calls it."""
    saliency = command(
        "saliency",
        help="the same entry by entry: gradients, guided, smooth, integrated",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        parents=[called()],
    )
    saliency.add_argument("--method", default="gradient", help="see methods below (default: gradient)")
    add_repeated(
        saliency,
        "--option",
        "NAME=VALUE",
        "of the method: samples, std and seed; steps and baseline; patch, stride and baseline; batch_size; method, of "
        "guided_gradcam's map. A baseline is a number, mean, blur, or one for each input as in '{\"rgb\": 0.5}'; a patch "
        "a number of pixels or '(8, 16)'",
        pair,
    )
    layers = "of guided_gradcam, the layer of each input by the input's name, as `multicam layers` lists them"
    add_repeated(saliency, "--layer", LAYER, layers)
    saliency.add_argument("--wrt", metavar="NAME", action="append", help="an input to explain (default: every image)")
    add_target(saliency)
    saliency.add_argument(
        "--channels",
        choices=["sum", "max", "norm"],
        help="how channels are taken together (default: sum where the numbers are in units of the score, else max)",
    )
    add_spectral(saliency)
    add_out(saliency, "saliency.png")
    saliency.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import numpy as np

    from multicam.call.files import blame
    from multicam.cli.words import read_attribution, read_layers, read_options, read_target
    from multicam.figures.saliency import saliency_figure
    from multicam.saliency.gradients import guided_gradcam
    from multicam.watch.undisturbed import unwrapped

    function = read_attribution(args.method)
    options = read_options(function, args.option) | {"output": args.output}
    target = read_target(args.target)
    model, inputs = loaded(args)
    if (function is guided_gradcam) != bool(args.layer):
        raise MulticamError("guided_gradcam, and it alone, takes layers: --layer rgb=rgb.layer4")
    with blame("running the model"):
        if function is guided_gradcam:
            layers = read_layers(args.layer, unnamed="")
            found = guided_gradcam(model, inputs, layers.get("", layers), target, **options)
        else:
            found = function(model, inputs, target, wrt=args.wrt, **options)
    print(_summary(found))
    raw: dict[str, Any] = {name: values.cpu().numpy() for name, values in found.items()}
    scores = found.scores.float().cpu().numpy()
    numbers = args.out.with_suffix(".npz")
    write("numbers", numbers, lambda file: np.savez_compressed(file, scores=scores, target=args.target, **raw))
    call = inputs.bind(unwrapped(model))
    picture = saliency_figure(
        {name: call.leaves[call.name(name)] for name in found},
        found,
        channels=args.channels,
        spectral=args.spectral,
        quantity=function.__name__.replace("_", " "),
        rows=row_names(len(found.scores)),
        title=f"target {args.target}",
    )
    write("picture", args.out, picture.save)


def _summary(found: "multicam.saliency.attributions.Attributions") -> str:
    """A table of each sample's score, and of the evidence in each input where it has units."""
    columns = {"score": found.scores}
    if found.comparable:
        columns |= found.evidence
    if found.change is not None:
        columns |= {"change": found.change, "missing": found.error}
    lines = [["sample", *columns]]
    lines += [
        [str(i), *(f"{x[i]:.1%}" if name == "missing" else f"{x[i]:.4g}" for name, x in columns.items())]
        for i in range(len(found.scores))
    ]
    return aligned(lines, str.rjust)
