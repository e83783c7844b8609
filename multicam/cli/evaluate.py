"""`multicam evaluate`: which method explains the model best."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multicam.cli.arguments import (
    LAYER,
    add_grids,
    add_out,
    add_repeated,
    add_seed,
    add_signed,
    add_target,
    called,
    loaded,
    pair,
)
from multicam.cli.help import Command
from multicam.cli.results import write
from multicam.errors import MulticamError, unknown

# What imports torch is imported by the functions themselves, so that --help need not wait for it.
if TYPE_CHECKING:
    import torch

    import multicam.call.inputs
    import multicam.metrics.explanations

DESCRIPTION = """\
Compare methods by what becomes of the score, by where their maps point and by how they look. The
table is printed, and written with the intervals of its means as .csv or .md.
"""
EXAMPLE = """\
methods are those of `multicam explain` and of `multicam saliency`, which lists them.

metrics; more (up) or less (down) is better:
{metrics}

{targets}
{grids}
example:
  multicam evaluate nets.py:build --input rgb=photo.png --input depth=depth.npy \\
      --layer rgb=rgb.layer4 --layer depth=depth.layer4 --method hirescam --method gradient \\
      --metric deletion --metric energy --region rgb=mask.png --target 3 --out table.csv
"""


def add(command: Callable[..., Command]) -> None:
    """Add the command with `add_parser`, as argparse calls it."""
    evaluate = command(
        "evaluate",
        help="which method explains the model best",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        parents=[called()],
    )
    evaluate.add_argument(
        "--method", action="append", required=True, help="a method, see below; repeat it to compare several"
    )
    evaluate.add_argument("--metric", action="append", help="see below; repeat it (default: deletion and insertion)")
    add_repeated(evaluate, "--layer", LAYER, "as for `multicam explain`, for the methods that explain a layer")
    add_grids(evaluate)
    add_repeated(
        evaluate,
        "--region",
        "NAME=FILE",
        "where in an input the evidence is known to be: a picture or array of its size, all of which that is not "
        "black or zero lies inside. Repeat it for other inputs, or with the same name for further samples",
        pair,
    )
    add_signed(evaluate)
    add_target(evaluate)
    evaluate.add_argument(
        "--baseline", metavar="VALUE", help="as for `multicam contribution` (default: 0, for insertion blur)"
    )
    evaluate.add_argument("--steps", type=int, default=20, help="of each curve (default: 20)")
    add_seed(evaluate)
    add_out(evaluate, "evaluation.csv", "the table, .csv or .md")
    evaluate.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from multicam.call.files import blame, read_value
    from multicam.cli.words import read_metric, read_target
    from multicam.metrics.evaluation import Batch, evaluate

    if args.out.suffix.lower() not in (".csv", ".md"):
        raise unknown("kind of table", args.out.suffix, [".csv", ".md"])
    metrics = [read_metric(name) for name in args.metric or ["deletion", "insertion"]]
    target = read_target(args.target)
    model, inputs = loaded(args)
    methods = _methods(args, model, inputs)
    batch = Batch(inputs, target, _regions(args.region))
    baseline = None if args.baseline is None else read_value(args.baseline)
    with blame("running the model"):
        found = evaluate(
            model, methods, metrics, [batch], output=args.output, baseline=baseline, steps=args.steps, seed=args.seed
        )
    print(found)
    tables: dict[str, Callable[[Path], object]] = {
        ".csv": found.csv,
        ".md": lambda file: file.write_text(found.markdown(), encoding="utf-8"),
    }
    write("table", args.out, tables[args.out.suffix.lower()])


def _methods(
    args: argparse.Namespace, model: "torch.nn.Module", inputs: "multicam.call.inputs.Inputs"
) -> "dict[str, multicam.metrics.explanations.Explain]":
    """The methods by their names in Python."""
    from functools import partial

    from multicam.cam.base import CAM, InputCAM
    from multicam.cli.words import no_layer, read_explanation, read_layers
    from multicam.metrics.explanations import explainer
    from multicam.saliency.gradients import guided_gradcam
    from multicam.watch.undisturbed import unwrapped

    images = list(inputs.bind(unwrapped(model)).images)
    layers = read_layers(args.layer, args.grid, unnamed=images[0] if len(images) == 1 else "map")
    found: dict[str, multicam.metrics.explanations.Explain] = {}
    for word in args.method:
        method = read_explanation(word)
        layered = method is guided_gradcam or (isinstance(method, type) and issubclass(method, CAM))
        if layered and not layers:
            raise no_layer(method)
        if isinstance(method, type):
            places: Any = images if issubclass(method, InputCAM) else layers
            found[method.__name__] = explainer(method, places, output=args.output, signed=args.signed)
        elif layered:
            found[method.__name__] = lambda model, inputs, target: guided_gradcam(
                model, inputs, layers, target, output=args.output
            )
        else:
            found[method.__name__] = partial(method, output=args.output)
    return found


def _regions(files: list[tuple[str, str]]) -> "dict[str, torch.Tensor] | None":
    """The masks of each input: what is not black lies inside."""
    import torch

    from multicam.call.files import read_image

    masks: dict[str, list[torch.Tensor]] = {}
    for name, file in files:
        masks.setdefault(name, []).append((read_image(file) > 0).any(1))
    for name, several in masks.items():
        if len({mask.shape[1:] for mask in several}) > 1:
            raise MulticamError(
                f"the regions of input {name!r} must have one size, but these are {[tuple(mask.shape[1:]) for mask in several]}"
            )
    return {name: torch.cat(several) for name, several in masks.items()} or None
