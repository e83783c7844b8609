"""The commands that answer with numbers: `multicam contribution` and `multicam evaluate`."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from multicam.cli.arguments import Command, add_out, called, loaded, pair
from multicam.errors import MulticamError, unknown
from multicam.printing import aligned

# What imports torch is imported by the commands themselves, so that --help need not wait for it.
if TYPE_CHECKING:
    import torch

    import multicam.call.inputs
    import multicam.metrics.explanations
    import multicam.shares.shapley

SAMPLES = 16  # up to which each is printed

CONTRIBUTION = """\
Say how much of the score is due to each input: its Shapley share, in units of the score. The
shares add up to the score less that of the baselines. Shares, interactions and scores go to an
.npz file beside the picture.
"""

CONTRIBUTION_EXAMPLE = """\
{targets}
example:
  multicam contribution nets.py:build --input rgb=photo.png --input depth=depth.npy \\
      --baseline blur --target 3 --out contribution.png
  multicam contribution nets.py:build --input image=photo.png --value ids=@ids.npy --value mask=@mask.npy \\
      --player image --player text=ids,mask --baseline '{"ids": 0, "mask": 1}'
  multicam contribution nets.py:build --input rgb=photo.png --input depth=depth.npy --regions rgb=4x3
"""

EVALUATE = """\
Compare methods by what becomes of the score, by where their maps point and by how they look. The
table is printed, and written with the intervals of its means as .csv or .md.
"""

EVALUATE_EXAMPLE = """\
methods are those of `multicam explain` and of `multicam saliency`, which lists them.

metrics; more (up) or less (down) is better:
  deletion, insertion  down, up: the score while the marked places go, or come
  road, road-least     down, up: ROAD, the most or the least relevant places first
  average-drop, increase   down, up: of the probability, seen through the maps
  infidelity, correlation  down, up: what maps predict for random rectangles, and what happens
  sensitivity          down: how much maps change under slight noise
  randomization        down: how much they stay the same as the weights become random
  pointing, energy     up: the peak of all maps, and how much of the evidence, lies in a region
  pointing-within, energy-within   up: the same in the map of the input that has the region
  names-input          up: the largest map is that of the input that has the region
  sparseness, complexity   up, down: how few places hold the evidence
  seconds              down: of the explanation of a sample

{targets}
{grids}
example:
  multicam evaluate nets.py:build --input rgb=photo.png --input depth=depth.npy \\
      --layer rgb=rgb.layer4 --layer depth=depth.layer4 --method hirescam --method gradient \\
      --metric deletion --metric energy --region rgb=mask.png --target 3 --out table.csv
"""


def add(command: Callable[[str, str, str, Command, str], Command]) -> None:
    """Add the two commands; `command` is called with name, description, example, parent and summary."""
    contribution = command(
        "contribution", CONTRIBUTION, CONTRIBUTION_EXAMPLE, called(), "say how much each input mattered"
    )
    contribution.add_argument(
        "--player",
        metavar="[LABEL=]NAME[,NAME…]",
        action="append",
        default=[],
        help="an input that has a share, or several with one share together (default: every image, and what --baseline "
        "names); all others stay as they are",
    )
    contribution.add_argument(
        "--baseline",
        metavar="VALUE",
        default="0",
        help="what stands for an input that is not there: a number, mean, blur, or one for each input as in "
        '\'{"rgb": "blur", "ids": 0}\' (default: 0)',
    )
    contribution.add_argument(
        "--regions",
        metavar="[NAME=]N|ROWSxCOLUMNS",
        action="append",
        default=[],
        help="share the score among the regions of an input, cut into so many, or of all images without a NAME; repeat it. All "
        "other inputs stay as they are",
    )
    _add_target(contribution)
    contribution.add_argument(
        "--permutations", type=int, default=100, help="random orders, above 12 players or regions (default: 100)"
    )
    contribution.add_argument("--budget", type=int, help="instead, random coalitions for shapiq to fit a regression to")
    contribution.add_argument("--seed", type=int, default=0, help="of either (default: 0)")
    add_out(contribution, "contribution.png")
    contribution.set_defaults(run=_contribution)

    evaluate = command("evaluate", EVALUATE, EVALUATE_EXAMPLE, called(), "compare methods by whether they are true")
    evaluate.add_argument(
        "--method", action="append", required=True, help="a method, see below; repeat it to compare several"
    )
    evaluate.add_argument("--metric", action="append", help="see below; repeat it (default: deletion and insertion)")
    evaluate.add_argument(
        "--layer",
        metavar="[NAME=]PATH[#CALL][:PICK]",
        action="append",
        default=[],
        help="as for `multicam explain`, for the methods that explain a layer",
    )
    evaluate.add_argument("--grid", metavar="[NAME=]GRID", action="append", default=[], help="see grids below")
    evaluate.add_argument(
        "--region",
        metavar="NAME=FILE",
        type=pair,
        action="append",
        default=[],
        help="where in an input the evidence is known to be: a picture or array of its size, all of which that is not "
        "black or zero lies inside. Repeat it for other inputs, or with the same name for further samples",
    )
    evaluate.add_argument("--signed", action="store_true", help="keep the evidence against the target")
    _add_target(evaluate)
    evaluate.add_argument(
        "--baseline", metavar="VALUE", help="as for `multicam contribution` (default: 0, for insertion blur)"
    )
    evaluate.add_argument("--steps", type=int, default=20, help="of each curve (default: 20)")
    evaluate.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    add_out(evaluate, "evaluation.csv", "the table, .csv or .md")
    evaluate.set_defaults(run=_evaluate)


def _add_target(parser: Command) -> None:
    parser.add_argument("--target", default="top", help="what to explain, see targets below (default: top)")
    parser.add_argument("--output", metavar="PATH", help="which of several outputs the target sees")


def _contribution(args: argparse.Namespace) -> None:
    import numpy as np

    from multicam.call.files import blame, read_value
    from multicam.cli.words import read_cuts, read_output, read_players, read_target
    from multicam.figures.panels import panel
    from multicam.figures.shares import contribution_figure
    from multicam.shares.regions import region_contribution
    from multicam.shares.shapley import contribution
    from multicam.watch.undisturbed import unwrapped

    players, cuts, target = read_players(args.player), read_cuts(args.regions), read_target(args.target)
    if players and cuts:
        raise MulticamError("the score is shared among inputs or among regions: give --player or --regions, not both")
    model, inputs = loaded(args)
    options: dict[str, Any] = {
        "baseline": read_value(args.baseline),
        "output": None if args.output is None else read_output(args.output),
        "permutations": args.permutations,
        "budget": args.budget,
        "seed": args.seed,
    }
    title = f"target {args.target}"
    raw: dict[str, Any] = {}
    with blame("running the model"):
        if cuts:
            regions = region_contribution(model, inputs, target, regions=cuts.get("", cuts), **options)
            found = regions.contribution
            raw |= {f"map of {name}": m.cpu().numpy() for name, m in regions.maps.items()}
            call = inputs.bind(unwrapped(model))
            picture = panel({name: call.leaves[name] for name in regions.maps}, regions.maps, title=title)
        else:
            found = contribution(model, inputs, target, players=players or None, **options)
            picture = contribution_figure(found, title=title)
    print(_table(found))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    numbers = args.out.with_suffix(".npz")
    fields = ("shapley", "shares", "single", "without", "scores", "nothing", "interactions", "error")
    known = {name: getattr(found, name) for name in fields}
    raw |= {name: values.numpy() for name, values in known.items() if values is not None}
    np.savez_compressed(numbers, players=np.array(found.players), target=args.target, **raw)
    print(f"numbers  {numbers}")
    picture.save(args.out)
    print(f"picture  {args.out}")


def _table(found: "multicam.shares.shapley.Contribution") -> str:
    """The summary, and behind it the shares of each sample if there are not many."""
    if len(found.scores) > SAMPLES:
        return repr(found)
    lines = [["sample", "score", "nothing", *found.players]]
    for i, (score, nothing) in enumerate(zip(found.scores.tolist(), found.nothing.tolist(), strict=True)):
        lines.append([str(i), *(f"{x:.4g}" for x in (score, nothing, *found.shapley[i].tolist()))])
    return f"{found!r}\n{aligned(lines, str.rjust)}"


def _evaluate(args: argparse.Namespace) -> None:
    from multicam.call.files import blame, read_value
    from multicam.cli.words import read_metric, read_output, read_target
    from multicam.metrics.evaluation import Batch, evaluate

    if args.out.suffix.lower() not in (".csv", ".md"):
        raise unknown("kind of table", args.out.suffix, [".csv", ".md"])
    metrics = [read_metric(name) for name in args.metric or ["deletion", "insertion"]]
    target = read_target(args.target)
    output = None if args.output is None else read_output(args.output)
    model, inputs = loaded(args)
    methods = _methods(args, model, inputs, output)
    batch = Batch(inputs, target, _regions(args.region))
    baseline = None if args.baseline is None else read_value(args.baseline)
    with blame("running the model"):
        found = evaluate(
            model, methods, metrics, [batch], output=output, baseline=baseline, steps=args.steps, seed=args.seed
        )
    print(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.suffix.lower() == ".csv":
        found.csv(args.out)
    else:
        args.out.write_text(found.markdown(), encoding="utf-8")
    print(f"table    {args.out}")


def _methods(
    args: argparse.Namespace, model: "torch.nn.Module", inputs: "multicam.call.inputs.Inputs", output: str | int | None
) -> "dict[str, multicam.metrics.explanations.Explain]":
    """The methods by their names in Python."""
    from functools import partial

    from multicam.cam.base import CAM, InputCAM
    from multicam.cli.words import read_explanation, read_layers
    from multicam.metrics.explanations import explainer
    from multicam.saliency.gradients import guided_gradcam
    from multicam.watch.undisturbed import unwrapped

    images = list(inputs.bind(unwrapped(model)).images)
    layers = read_layers(args.layer, args.grid, unnamed=images[0] if len(images) == 1 else "map")
    found: dict[str, multicam.metrics.explanations.Explain] = {}
    for word in args.method:
        method = read_explanation(word)
        name = method.__name__
        layered = method is guided_gradcam or (isinstance(method, type) and issubclass(method, CAM))
        if layered and not layers:
            raise MulticamError(f"{name} explains a layer: give one with --layer, as `multicam layers` lists them")
        if isinstance(method, type):
            places: Any = images if issubclass(method, InputCAM) else layers
            found[name] = explainer(method, places, output=output, signed=args.signed)
        elif layered:
            found[name] = lambda model, inputs, target: guided_gradcam(model, inputs, layers, target, output=output)
        else:
            found[name] = partial(method, output=output)
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
