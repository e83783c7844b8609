"""The commands that look into a model: `multicam saliency`, `features`, `kernels` and `dream`."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from multicam.cli.arguments import Command, add_out, called, loaded, loaded_model, pair, source
from multicam.errors import MulticamError
from multicam.printing import aligned

# What imports torch is imported by the commands themselves, so that --help need not wait for it.
if TYPE_CHECKING:
    import multicam.saliency.attributions

SALIENCY = """\
Draw, for each input, what every entry of it did for a score, and keep the numbers: the
attributions, the scores and the target go to an .npz file beside the picture.
"""

SALIENCY_EXAMPLE = """\
methods, whatever their case, hyphens and underscores:
{attributions}

{targets}
example:
  multicam saliency nets.py:build --input rgb=photo.png --input depth=depth.npy \\
      --method integrated-gradients --option baseline=blur --target 3 --out saliency.png
"""

FEATURES = """\
Draw the maps that a layer returns, channel by channel, and keep the numbers in an .npz file
beside the picture.
"""

FEATURES_EXAMPLE = """\
{grids}
example:
  multicam features nets.py:build --input rgb=photo.png --input depth=depth.npy \\
      --layer rgb=rgb.layer1 --most 16 --out features.png
"""

KERNELS = """\
Draw the kernels of a convolution: in colours where it reads three channels, else as signed maps.
"""

KERNELS_EXAMPLE = """\
example:
  multicam kernels nets.py:build --weights best.pt --layer rgb.stem.0 --out kernels.png
"""

DREAM = """\
Draw what a channel of a layer, a whole layer or a class responds to most, by changing one input
step by step while all others are held; with --octaves, as a deep dream of the given picture.
"""

DREAM_EXAMPLE = """\
{targets}
example:
  multicam dream nets.py:build --input rgb=photo.png --input depth=depth.npy \\
      --onto rgb --layer rgb.layer2 --channel 0,3,5 --out dream.png
  multicam dream nets.py:build --input rgb=photo.png --input depth=depth.npy \\
      --onto rgb --layer rgb.layer2 --octaves 4 --out dream.png
"""


def add(command: Callable[[str, str, str, Command, str], Command]) -> None:
    """Add the four commands; `command` is called with name, description, example, parent and summary."""
    saliency = command("saliency", SALIENCY, SALIENCY_EXAMPLE, called(), "draw what every entry of an input did")
    saliency.add_argument("--method", default="gradient", help="see methods below (default: gradient)")
    saliency.add_argument(
        "--option",
        metavar="NAME=VALUE",
        type=pair,
        action="append",
        default=[],
        help="of the method: samples, std and seed; steps and baseline; patch, stride and baseline; batch_size; method, of "
        "guided_gradcam's map. A baseline "
        "is a number, mean, blur, or one for each input as in '{\"rgb\": 0.5}'; a patch a number of pixels or '(8, 16)'",
    )
    saliency.add_argument(
        "--layer",
        metavar="[NAME=]PATH[#CALL][:PICK]",
        action="append",
        default=[],
        help="of guided_gradcam, the layer of each input by the input's name, as `multicam layers` lists them",
    )
    saliency.add_argument("--wrt", metavar="NAME", action="append", help="an input to explain (default: every image)")
    saliency.add_argument("--target", default="top", help="what to explain, see targets below (default: top)")
    saliency.add_argument("--output", metavar="PATH", help="which of several outputs the target sees")
    saliency.add_argument(
        "--channels",
        choices=["sum", "max", "norm"],
        help="how channels are taken together (default: sum where the numbers are in units of the score, else max)",
    )
    saliency.add_argument(
        "--spectral", metavar="NAME", action="append", default=[], help="an input whose axes are frequencies"
    )
    add_out(saliency, "saliency.png")
    saliency.set_defaults(run=_saliency)

    features = command("features", FEATURES, FEATURES_EXAMPLE, called(), "draw what a layer returns")
    features.add_argument(
        "--layer",
        metavar="[NAME=]PATH[#CALL][:PICK]",
        required=True,
        help="a layer as `multicam layers` lists it; a NAME that is an input's shows that input as well",
    )
    features.add_argument("--grid", metavar="[NAME=]GRID", action="append", default=[], help="see grids below")
    features.add_argument("--sample", type=int, default=0, help="which sample, counted from 0 (default: 0)")
    _add_channels(features, "--channels", "which channels (default: the most active)")
    features.add_argument("--most", type=int, default=32, help="how many of the most active are drawn (default: 32)")
    features.add_argument(
        "--scale", choices=["shared", "each"], default="shared", help="one scale for all channels, or one each"
    )
    add_out(features, "features.png")
    features.set_defaults(run=_features)

    kernels = command("kernels", KERNELS, KERNELS_EXAMPLE, source(), "draw the kernels of a convolution")
    kernels.add_argument("--layer", metavar="PATH", required=True, help="a convolution's path in the model")
    _add_channels(kernels, "--channels", "which output channels (default: those with the strongest kernels)")
    _add_channels(kernels, "--in-channels", "which input channels, each drawn as a map")
    kernels.add_argument("--most", type=int, default=64, help="how many kernels are drawn (default: 64)")
    add_out(kernels, "kernels.png")
    kernels.set_defaults(run=_kernels)

    dream = command("dream", DREAM, DREAM_EXAMPLE, called(), "draw what a channel or a class responds to")
    dream.add_argument("--onto", metavar="NAME", help="the input that is changed (default: the only image)")
    dream.add_argument("--layer", metavar="PATH[#CALL][:PICK]", help="a layer as `multicam layers` lists it")
    dream.add_argument("--grid", metavar="GRID", action="append", default=[], help="as for `multicam features`")
    _add_channels(dream, "--channel", "its channel, or several: a picture each (default: all at once)")
    dream.add_argument("--target", help="instead of a layer, the class or score to maximise, see targets below")
    dream.add_argument("--output", metavar="PATH", help="which of several outputs the target sees")
    dream.add_argument("--steps", type=int, help="how many steps (default: 128, or 10 for each octave)")
    dream.add_argument("--octaves", type=int, help="start from the picture and enlarge it so many times, less one")
    dream.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    add_out(dream, "dream.png")
    dream.set_defaults(run=_dream)


def _add_channels(parser: Command, flag: str, text: str) -> None:
    parser.add_argument(flag, metavar="N[,N…]", type=_numbers, help=text)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, nor several with commas between") from None


def _saliency(args: argparse.Namespace) -> None:
    import numpy as np

    from multicam.call.files import blame
    from multicam.cli.words import read_attribution, read_layers, read_options, read_output, read_target
    from multicam.figures.saliency import saliency_figure
    from multicam.saliency.gradients import guided_gradcam
    from multicam.watch.undisturbed import unwrapped

    function = read_attribution(args.method)
    options = read_options(function, args.option) | {"output": args.output and read_output(args.output)}
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
    args.out.parent.mkdir(parents=True, exist_ok=True)
    numbers = args.out.with_suffix(".npz")
    raw: dict[str, Any] = {name: values.cpu().numpy() for name, values in found.items()}
    np.savez_compressed(numbers, scores=found.scores.float().cpu().numpy(), target=args.target, **raw)
    print(f"numbers  {numbers}")
    call, samples = inputs.bind(unwrapped(model)), len(found.scores)
    picture = saliency_figure(
        {name: call.leaves[call.name(name)] for name in found},
        found,
        channels=args.channels,
        spectral=args.spectral,
        quantity=function.__name__.replace("_", " "),
        rows=[f"sample {i}" for i in range(samples)] if samples > 1 else [],
        title=f"target {args.target}",
    )
    picture.save(args.out)
    print(f"picture  {args.out}")


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


def _features(args: argparse.Namespace) -> None:
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
    args.out.parent.mkdir(parents=True, exist_ok=True)
    numbers = args.out.with_suffix(".npz")
    np.savez_compressed(numbers, maps=maps.cpu().numpy())
    print(f"maps     {numbers} {tuple(maps.shape)}")
    picture.save(args.out)
    print(f"picture  {args.out}")


def _kernels(args: argparse.Namespace) -> None:
    from multicam.figures.features import kernel_sheet
    from multicam.inside.features import kernels
    from multicam.watch.undisturbed import find_module

    found = kernels(find_module(loaded_model(args), args.layer))
    print(f"{args.layer}: {found}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet = kernel_sheet(found, channels=args.channels, in_channels=args.in_channels, most=args.most, title=args.layer)
    sheet.save(args.out)
    print(f"picture  {args.out}")


def _dream(args: argparse.Namespace) -> None:
    from multicam.call.files import blame
    from multicam.cli.words import read_layers, read_output, read_target
    from multicam.figures.dreams import dream_figure, history_figure
    from multicam.inside.dream import activation_maximization, deep_dream

    model, inputs = loaded(args)
    layer = None if args.layer is None else next(iter(read_layers([args.layer], args.grid).values()))
    options = {"onto": args.onto, "seed": args.seed} | ({} if args.steps is None else {"steps": args.steps})
    with blame("running the model"):
        if args.octaves is None:
            target = None if args.target is None else read_target(args.target)
            output = None if args.output is None else read_output(args.output)
            dream = activation_maximization(model, inputs, layer, args.channel, target=target, output=output, **options)
        elif layer is None or args.target is not None:
            raise MulticamError("a deep dream is of a layer: give --layer and no --target")
        else:
            channel = None if args.channel is None else args.channel[0]
            if args.channel is not None and len(args.channel) > 1:
                raise MulticamError(f"a deep dream is of one channel, not of {len(args.channel)}")
            dream = deep_dream(model, inputs, layer, channel, octaves=args.octaves, **options)
    for label, start, end in zip(dream.labels, dream.start.tolist(), dream.objective.tolist(), strict=True):
        print(f"{label}: {start:.4g} to {end:.4g}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    dream_figure(dream).save(args.out)
    print(f"picture  {args.out}")
    history = args.out.with_stem(f"{args.out.stem}-history")
    history_figure(dream).save(history)
    print(f"history  {history}")
