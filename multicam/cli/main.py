"""The `multicam` command."""

import argparse
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multicam import __version__
from multicam.cli import contribution, saliency
from multicam.cli.arguments import Command, add_out, called, debugging, loaded
from multicam.errors import MulticamError, unknown
from multicam.printing import aligned

# What imports torch is imported by the commands themselves, so that --help need not wait for it.
if TYPE_CHECKING:
    import multicam.maps
    import multicam.watch.trace

DESCRIPTION = """\
Explain a PyTorch model that takes several inputs, without editing it.

  multicam demo                         a first look: a three-input model on a photo
  multicam layers MODULE:FACTORY        which layers there are, and which inputs each sees
  multicam explain MODULE:FACTORY       where in each input the evidence for a score lies
  multicam saliency MODULE:FACTORY      the same entry by entry: gradients, guided, smooth, integrated
  multicam contribution MODULE:FACTORY  how much each input mattered
  multicam evaluate MODULE:FACTORY      which method explains the model best
  multicam features MODULE:FACTORY      what a layer returns, channel by channel
  multicam kernels MODULE:FACTORY       what a convolution looks for
  multicam dream MODULE:FACTORY         the input that a channel or a class responds to most
"""

LAYERS = """\
Run the model once per input and list every layer that is called: what it returns, the grid
of its map ("-" where nothing proves one), and the inputs it sees. Its map can be laid on any
of these.
"""

LAYERS_EXAMPLE = """\
example:
  multicam layers nets.py:build --input rgb=photo.png --input depth=depth.npy --find layer4
"""

EXPLAIN = """\
Draw where in each input a model found the evidence for a score, and keep the numbers: the
raw maps (float32), the scores and the target go to an .npz file beside the picture.
"""

EXPLAIN_EXAMPLE = """\
methods, whatever their case and hyphens:
{methods}

{targets}
{grids}
example:
  multicam explain nets.py:build --weights best.pt --input rgb=photo.png --input depth=depth.npy \\
      --layer rgb=rgb.layer4 --layer depth=depth.layer4 --method gradcam --target 3 --out panel.png
"""

DEMO = """\
Explain the bundled model, which sees a photo by its colours, its frequencies and its texture, and
write the pictures.
"""

DEMO_EXAMPLE = """\
example:
  multicam demo --out pictures --image photo.jpg
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command: 0, or 1 with a message on stderr; argparse itself exits with 2 for wrong usage."""
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            args.run(args)
        except (MulticamError, OSError) as error:
            if args.debug:
                traceback.print_exc()
            print(f"multicam: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    debug, model = debugging(), called()

    parser = Command("multicam", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"multicam {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, description: str, example: str, parent: Command, summary: str) -> Command:
        return commands.add_parser(
            name,
            description=description,
            epilog=example,
            parents=[parent],
            help=summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    layers = command("layers", LAYERS, LAYERS_EXAMPLE, model, "list the layers of a model and the inputs they see")
    layers.add_argument("--find", metavar="TEXT", help="only layers whose path or class contains TEXT")
    layers.set_defaults(run=_layers)

    explain = command("explain", EXPLAIN, EXPLAIN_EXAMPLE, model, "draw where in each input the evidence lies")
    explain.add_argument(
        "--layer",
        metavar="[NAME=]PATH[#CALL][:PICK]",
        action="append",
        default=[],
        help="a layer as `multicam layers` lists it; a NAME that is an input's lays its map on that input. #CALL is one "
        "call of a shared module, counted from 0, :PICK one tensor of several that the layer returns. Repeat it with "
        "other names. Only rise and the fullgrads go without",
    )
    explain.add_argument("--grid", metavar="[NAME=]GRID", action="append", default=[], help="see grids below")
    explain.add_argument(
        "--method",
        action="append",
        help="see methods below (default: gradcam); repeat it for several, all from one pass and side by side in one "
        "picture, each on a scale of its own",
    )
    explain.add_argument("--target", default="top", help="what to explain, see targets below (default: top)")
    explain.add_argument(
        "--output", metavar="PATH", help="which of several outputs the target sees, as in logits, 1 or heads.0"
    )
    explain.add_argument("--signed", action="store_true", help="keep the evidence against the target")
    explain.add_argument(
        "--scale",
        choices=["shared", "each"],
        help="divide all maps of a method by one number, so that an ignored input looks ignored, or each by its own "
        "(default: shared where the method's maps compare)",
    )
    explain.add_argument(
        "--spectral",
        metavar="NAME",
        action="append",
        default=[],
        help="an input whose axes are frequencies: its map is shown alone",
    )
    add_out(explain, "panel.png")
    explain.set_defaults(run=_explain)

    saliency.add(command)
    contribution.add(command)

    demo = command("demo", DEMO, DEMO_EXAMPLE, debug, "a first look: explain the bundled model")
    demo.add_argument("--out", metavar="DIR", type=Path, default=Path("multicam-demo"), help="default: multicam-demo")
    demo.add_argument("--image", metavar="FILE", type=Path, help="a photo of your own")
    demo.add_argument(
        "--train",
        action="store_true",
        help="instead, train the model again, write its weights to DIR and measure it: an hour or so",
    )
    demo.set_defaults(run=_demo)
    return parser


def _layers(args: argparse.Namespace) -> None:
    from multicam.call.files import blame
    from multicam.watch.survey import list_layers

    model, inputs = loaded(args)
    with blame("running the model"):
        table = list_layers(model, inputs)
    found = table.find(args.find or "")
    if not found:
        raise unknown("layer", args.find, (info.path for info in table))
    print(found)


def _explain(args: argparse.Namespace) -> None:
    import numpy as np

    from multicam.call.files import blame
    from multicam.cam.base import CAM
    from multicam.cli.words import read_layers, read_method, read_output, read_target
    from multicam.maps import Maps
    from multicam.watch.trace import Trace
    from multicam.watch.undisturbed import unwrapped

    methods = [read_method(name) for name in args.method or ["gradcam"]]
    layered = [method.__name__ for method in methods if issubclass(method, CAM)]
    if layered and not args.layer:
        raise MulticamError(f"{layered[0]} explains a layer: give one with --layer, as `multicam layers` lists them")
    target = read_target(args.target)
    output = None if args.output is None else read_output(args.output)
    model, inputs = loaded(args)
    call = inputs.bind(unwrapped(model))
    images = list(call.images)
    layers = read_layers(args.layer, args.grid, unnamed=images[0] if len(images) == 1 else "map")
    with blame("running the model"):
        trace = Trace(model, call, layers, target, output)
        maps = {}
        for method in methods:
            if issubclass(method, CAM):
                maps[method.__name__] = method(model, layers).maps(trace, signed=args.signed)
            else:
                found = method(model, images, output=output)(call, trace.target, signed=args.signed)
                assert isinstance(found, Maps)  # since the inputs are named
                maps[method.__name__] = found
    print(_summary(trace, maps, args.target))

    args.out.parent.mkdir(parents=True, exist_ok=True)
    raw: dict[str, Any] = {
        name if len(maps) == 1 else f"{method}.{name}": values.float().cpu().numpy()
        for method, named in maps.items()
        for name, values in named.items()
    }
    numbers = args.out.with_suffix(".npz")
    np.savez_compressed(numbers, scores=trace.scores.float().cpu().numpy(), target=args.target, **raw)
    print(f"maps     {numbers}")
    _draw(trace, maps, args)
    print(f"picture  {args.out}")


def _summary(trace: "multicam.watch.trace.Trace", maps: "Mapping[str, multicam.maps.Maps]", target: str) -> str:
    """A table of each sample's score and of the share that each input has in the evidence for it."""
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
                columns[prefix + name] = [f"{share:.0%}" for share in shares]
    table = [[name, *values] for name, values in columns.items()]
    return "\n".join([aligned(zip(*table, strict=True), str.rjust), *notes])


def _draw(
    trace: "multicam.watch.trace.Trace", maps: "Mapping[str, multicam.maps.Maps]", args: argparse.Namespace
) -> None:
    """Writes the picture: the panel of one method, or the comparison of several."""
    from multicam.figures.panels import compare, panel
    from multicam.figures.tiles import Scale
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
    rows = [f"sample {i}" for i in range(len(trace.scores))] if len(trace.scores) > 1 else []
    spectral = [full(name) for name in args.spectral]
    if len(shown) == 1:
        [(method, only)] = shown.items()
        title = f"{method}, target {args.target}"
        picture = panel(images, only, scale=args.scale, spectral=spectral, rows=rows, title=title)
    else:
        scale: Scale | None = "column" if args.scale == "shared" else args.scale
        picture = compare(images, shown, scale=scale, spectral=spectral, rows=rows, title=f"target {args.target}")
    picture.save(args.out)


def _demo(args: argparse.Namespace) -> None:
    if args.train:
        from multicam.demo import training

        args.out.mkdir(parents=True, exist_ok=True)
        weights = args.out / "demo.safetensors"
        print(training.table(training.train_and_measure(out=weights)))
        print(f"weights  {weights}")
        return
    from tqdm import tqdm

    from multicam.demo import pictures

    count = 4 + (args.image is not None)
    paths = list(tqdm(pictures.write(args.out, args.image), "pictures", count, leave=False, file=sys.stderr))
    print(*paths, sep="\n")
