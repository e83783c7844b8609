"""`multicam contribution`: how much each input mattered."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from multicam.cli.arguments import add_out, add_repeated, add_seed, add_target, called, loaded
from multicam.cli.help import Command
from multicam.cli.results import write
from multicam.errors import MulticamError
from multicam.printing import aligned, percent

# What imports torch is imported by the functions themselves, so that --help need not wait for it.
if TYPE_CHECKING:
    import multicam.shares.regions
    import multicam.shares.shapley

SAMPLES = 16  # up to which each is printed

DESCRIPTION = """\
Say how much of the score is due to each input: its Shapley share, in units of the score. The
shares add up to the score less that of the baselines. A percentage is what an input brings,
divided by the sum of the absolute values of all, with its sign. Shares, interactions and scores
go to an .npz file beside the picture.
"""
EXAMPLE = """\
{targets}
example:
  multicam contribution nets.py:build --input rgb=photo.png --input depth=depth.npy \\
      --baseline blur --target 3 --out contribution.png
  multicam contribution nets.py:build --input image=photo.png --value ids=@ids.npy --value mask=@mask.npy \\
      --player image --player text=ids,mask --baseline '{"ids": 0, "mask": 1}'
  multicam contribution nets.py:build --input rgb=photo.png --input depth=depth.npy --regions rgb=4x3
"""


def add(command: Callable[..., Command]) -> None:
    """Add the command with `add_parser`, as argparse calls it."""
    contribution = command(
        "contribution",
        help="how much each input mattered",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        parents=[called()],
    )
    add_repeated(
        contribution,
        "--player",
        "[LABEL=]NAME[,NAME…]",
        "an input that has a share, or several with one share together (default: every image, and what --baseline "
        "names); all others stay as they are",
    )
    contribution.add_argument(
        "--baseline",
        metavar="VALUE",
        default="0",
        help="what stands for an input that is not there: a number, mean, blur, or one for each input as in "
        '\'{"rgb": "blur", "ids": 0}\' (default: 0)',
    )
    add_repeated(
        contribution,
        "--regions",
        "[NAME=]N|ROWSxCOLUMNS",
        "share the score among the regions of an input, cut into so many, or of all images without a NAME; repeat it. All "
        "other inputs stay as they are",
    )
    add_target(contribution)
    contribution.add_argument(
        "--permutations", type=int, default=100, help="random orders, above 12 players or regions (default: 100)"
    )
    contribution.add_argument("--budget", type=int, help="instead, random coalitions for shapiq to fit a regression to")
    add_seed(contribution, "either")
    add_out(contribution, "contribution.png")
    contribution.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import numpy as np

    from multicam.call.files import blame, read_value
    from multicam.cli.words import read_cuts, read_players, read_target
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
        "output": args.output,
        "permutations": args.permutations,
        "budget": args.budget,
        "seed": args.seed,
    }
    title = f"target {args.target}"
    raw: dict[str, Any] = {}
    with blame("running the model"):
        if cuts:
            regions = region_contribution(model, inputs, target, regions=cuts.get("", cuts), **options)
            found, table = regions.contribution, _of_regions(regions)
            raw |= {f"map of {name}": m.cpu().numpy() for name, m in regions.maps.items()}
            raw |= {f"share of {name}": each.numpy() for name, each in zip(regions.maps, regions.shares.T, strict=True)}
            call = inputs.bind(unwrapped(model))
            picture = panel({name: call.leaves[name] for name in regions.maps}, regions.maps, title=title)
        else:
            found = contribution(model, inputs, target, players=players or None, **options)
            table, picture = _table(found), contribution_figure(found, title=title)
    print(table)
    fields = ("shapley", "shares", "single", "without", "scores", "nothing", "interactions", "error")
    known = {name: getattr(found, name) for name in fields}
    raw |= {name: values.numpy() for name, values in known.items() if values is not None}
    raw |= {"players": np.array(found.players), "target": args.target}
    write("numbers", args.out.with_suffix(".npz"), lambda file: np.savez_compressed(file, **raw))
    write("picture", args.out, picture.save)


def _table(found: "multicam.shares.shapley.Contribution") -> str:
    """The summary, and behind it the shares of each sample if there are not many."""
    if len(found.scores) > SAMPLES:
        return repr(found)
    lines = [["sample", "score", "nothing", *found.players]]
    for i, (score, nothing) in enumerate(zip(found.scores.tolist(), found.nothing.tolist(), strict=True)):
        lines.append([str(i), *(f"{x:.4g}" for x in (score, nothing, *found.shapley[i].tolist()))])
    return f"{found!r}\n{aligned(lines, str.rjust)}"


def _of_regions(found: "multicam.shares.regions.RegionContribution") -> str:
    """The table of the regions, and below it what all regions of an input bring together, as the picture's captions say."""
    if len(found.shares) > SAMPLES:
        rows = {"mean": found.shares.mean(0)}
    else:
        rows = {str(i): each for i, each in enumerate(found.shares)}
    lines = [["sample", *found.labels], *([name, *map(percent, each.tolist())] for name, each in rows.items())]
    return (
        f"{_table(found.contribution)}\nshares of the inputs, all their regions together\n{aligned(lines, str.rjust)}"
    )
