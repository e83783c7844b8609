"""`multicam explain`: where in each input the evidence for a score lies."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from multicam.cli.arguments import (
    LAYER,
    add_grids,
    add_out,
    add_repeated,
    add_signed,
    add_spectral,
    add_target,
    called,
    loaded,
)
from multicam.cli.help import Command
from multicam.cli.results import row_names, write
from multicam.printing import aligned, percent

# What imports torch is imported by the functions themselves, so that --help need not wait for it.
if TYPE_CHECKING:
    from collections.abc import Mapping

    import multicam.figures.page
    import multicam.maps
    import multicam.watch.trace

DESCRIPTION = """\
Draw where in each input a model found the evidence for a score, and keep the numbers: the
raw maps (float32), the scores and the target go to an .npz file beside the picture.
"""
EXAMPLE = """\
methods, whatever their case and hyphens:
{methods}

{targets}
{grids}
example:
  multicam explain nets.py:build --weights best.pt --input rgb=photo.png --input depth=depth.npy \\
      --layer rgb=rgb.layer4 --layer depth=depth.layer4 --method gradcam --target 3 --out panel.png
"""


def add(command: Callable[..., Command]) -> None:
    """Add the command with `add_parser`, as argparse calls it."""
    explain = command(
        "explain",
        help="where in each input the evidence for a score lies",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        parents=[called()],
    )
    add_repeated(
        explain,
        "--layer",
        LAYER,
        "a layer as `multicam layers` lists it; a NAME that is an input's lays its map on that input. #CALL is one "
        "call of a shared module, counted from 0, :PICK one tensor of several that the layer returns. Repeat it with "
        "other names. Methods of whole inputs go without",
    )
    add_grids(explain)
    explain.add_argument(
        "--method",
        action="append",
        help="see methods below (default: gradcam); repeat it for several, all from one pass and side by side in one "
        "picture, each on a scale of its own",
    )
    add_target(explain)
    add_signed(explain)
    explain.add_argument(
        "--scale",
        choices=["shared", "each"],
        help="divide all maps of a method by one number, so that an ignored input looks ignored, or each by its own "
        "(default: shared where the method's maps compare)",
    )
    add_spectral(explain)
    add_out(explain, "panel.png")
    explain.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import numpy as np

    from multicam.call.files import blame
    from multicam.cam.base import CAM
    from multicam.cli.words import no_layer, read_layers, read_method, read_target
    from multicam.maps import Maps
    from multicam.watch.trace import Trace
    from multicam.watch.undisturbed import unwrapped

    methods = [read_method(name) for name in args.method or ["gradcam"]]
    layered = [method for method in methods if issubclass(method, CAM)]
    if layered and not args.layer:
        raise no_layer(layered[0])
    target = read_target(args.target)
    model, inputs = loaded(args)
    call = inputs.bind(unwrapped(model))
    images = list(call.images)
    layers = read_layers(args.layer, args.grid, unnamed=images[0] if len(images) == 1 else "map")
    with blame("running the model"):
        trace = Trace(model, call, layers, target, args.output)
        maps = {}
        for method in methods:
            if issubclass(method, CAM):
                maps[method.__name__] = method(model, layers).maps(trace, signed=args.signed)
            else:
                found = method(model, images, output=args.output)(call, trace.target, signed=args.signed)
                assert isinstance(found, Maps)  # since the inputs are named
                maps[method.__name__] = found
    print(_summary(trace, maps, args.target, args.signed))

    raw: dict[str, Any] = {
        name if len(maps) == 1 else f"{method}.{name}": values.float().cpu().numpy()
        for method, named in maps.items()
        for name, values in named.items()
    }
    scores = trace.scores.float().cpu().numpy()
    numbers = args.out.with_suffix(".npz")
    write("maps", numbers, lambda file: np.savez_compressed(file, scores=scores, target=args.target, **raw))
    write("picture", args.out, _picture(trace, maps, args).save)


def _summary(
    trace: "multicam.watch.trace.Trace", maps: "Mapping[str, multicam.maps.Maps]", target: str, signed: bool
) -> str:
    """A table of each sample's score and of the share that each input has in the evidence for it, and what that is a share of."""
    from multicam.maps import shares_of

    columns = {"sample": [str(i) for i in range(len(trace.scores))]}
    if target == "top":
        columns["class"] = [str(i) for i in trace.output.argmax(1).tolist()]
    columns["score"] = [f"{score:.4g}" for score in trace.scores.tolist()]
    notes = []
    for method, named in maps.items():
        if not named.comparable:
            notes.append(f"{method} tells no shares: the scale of its maps means nothing")
        elif len(named) > 1:
            prefix = f"{method} " if len(maps) > 1 else ""
            for name, shares in zip(named, named.shares().T.tolist(), strict=True):
                columns[prefix + name] = [percent(share) for share in shares]
    table = [[name, *values] for name, values in columns.items()]
    whole = shares_of({method: named for method, named in maps.items() if named.comparable and len(named) > 1})
    if whole:
        notes.append(whole if signed else f"{whole}; --signed keeps what speaks against the target, too")
    return "\n".join([aligned(zip(*table, strict=True), str.rjust), *notes])


def _picture(
    trace: "multicam.watch.trace.Trace", maps: "Mapping[str, multicam.maps.Maps]", args: argparse.Namespace
) -> "multicam.figures.page.Picture":
    """The panel of one method, or the comparison of several."""
    from multicam.figures.panels import compare, panel
    from multicam.figures.plan import Scale
    from multicam.maps import Maps

    images = {name: leaf for name, leaf in trace.inputs.images.items() if leaf.ndim in (4, 5)}

    def full(name: str) -> str:
        return next((image for image in images if image == name or image.endswith(f".{name}")), name)

    # A signal's map (b l) is drawn as a strip.
    shown = {
        method: Maps(
            {
                full(name): values[:, None].expand(-1, max(1, values.shape[1] // 8), -1) if values.ndim == 2 else values
                for name, values in named.items()
            },
            named.comparable,
        )
        for method, named in maps.items()
    }
    rows = row_names(len(trace.scores))
    spectral = [full(name) for name in args.spectral]
    if len(shown) == 1:
        [(method, only)] = shown.items()
        title = f"{method}, target {args.target}"
        return panel(images, only, scale=args.scale, spectral=spectral, rows=rows, title=title)
    scale: Scale | None = "column" if args.scale == "shared" else args.scale
    return compare(images, shown, scale=scale, spectral=spectral, rows=rows, title=f"target {args.target}")
