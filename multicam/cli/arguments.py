"""What the commands of `multicam` have in common at their start: how they are told of a model, its inputs and a target."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multicam.cli.help import Command

# What imports torch is imported by the functions themselves, so that --help need not wait for it.
if TYPE_CHECKING:
    import torch

    import multicam.call.inputs

LAYER = "[NAME=]PATH[#CALL][:PICK]"


def debugging() -> Command:
    """The argument of every command."""
    parser = Command(add_help=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def source() -> Command:
    """The arguments that say which model."""
    model = Command(add_help=False, parents=[debugging()])
    model.add_argument(
        "model",
        metavar="MODULE:FACTORY",
        help="where the model comes from: MODULE is the path of a .py file or can be imported from here, FACTORY a "
        "function without arguments that returns the torch.nn.Module, or the module itself",
    )
    model.add_argument(
        "--weights", metavar="FILE", help="a checkpoint (.pt, .pth, .safetensors) whose names fit exactly"
    )
    model.add_argument("--device", help="where to run: cpu, cuda, cuda:1 … (default: where the model is)")
    model.add_argument(
        "--dtype",
        choices=["float32", "float64", "bfloat16", "float16"],
        help="of the weights; image inputs follow (default: the model's own)",
    )
    return model


def called() -> Command:
    """The arguments that say which model, and what it is given."""
    model = Command(add_help=False, parents=[source()])
    add_repeated(
        model,
        "--input",
        "NAME=FILE",
        "an image input by its name in forward(); repeat it for other inputs, or with the same name for further "
        "samples. Pictures (.png .jpg .bmp .webp .tif) are RGB, and their 8 or 16 bits are scaled to 0..1; FILE:grey reads one "
        "channel, which pictures of one channel and more than 8 bits keep without it, and FILE:raw the numbers as they are "
        "stored, such as millimetres. Arrays (.npy .npz .pt .safetensors; FILE:KEY where there are several) of the "
        "shapes (h w), (h w 1), (h w 3) and (c h w) are one sample; with more axes the first is the batch. 8-bit arrays "
        "are scaled to 0..1, others stay as they are",
        pair,
    )
    add_repeated(
        model,
        "--value",
        "NAME=VALUE",
        "any other argument: a number, true, false, none, a string, or @FILE for an array exactly as it is stored",
        pair,
    )
    model.add_argument(
        "--preprocess",
        metavar="MODULE:FUNC",
        help="a function called with the dict of all inputs and values; it returns what the model takes: a dict of "
        "keyword arguments, a tuple of positional ones, or multicam.Inputs",
    )
    return model


def add_repeated(parser: Command, flag: str, metavar: str, text: str, read: Callable[[str], Any] = str) -> None:
    """Add an argument that may come several times: a list, empty if it does not come at all."""
    parser.add_argument(flag, metavar=metavar, type=read, action="append", default=[], help=text)


def add_grids(parser: Command) -> None:
    """Add the grids of layers whose grid nothing proves."""
    add_repeated(parser, "--grid", "[NAME=]GRID", "see grids below")


def add_target(parser: Command) -> None:
    """Add what is explained: a score of one of the outputs."""
    parser.add_argument("--target", default="top", help="what to explain, see targets below (default: top)")
    add_output(parser)


def add_output(parser: Command) -> None:
    """Add which of several outputs is explained."""
    text = "which of several outputs the target sees, as in logits, 1 or heads.0"
    parser.add_argument("--output", metavar="PATH", type=_position_or_path, help=text)


def add_signed(parser: Command) -> None:
    """Add whether evidence keeps its sign."""
    parser.add_argument("--signed", action="store_true", help="keep the evidence against the target")


def add_spectral(parser: Command) -> None:
    """Add which inputs are spectra."""
    add_repeated(parser, "--spectral", "NAME", "an input whose axes are frequencies: its map is shown alone")


def add_channels(parser: Command, flag: str, text: str) -> None:
    """Add numbers of channels."""
    parser.add_argument(flag, metavar="N[,N…]", type=_numbers, help=text)


def add_seed(parser: Command, of: str = "all that is random") -> None:
    """Add the seed."""
    parser.add_argument("--seed", type=int, default=0, help=f"of {of} (default: 0)")


def add_out(parser: Command, name: str, kinds: str = "the picture") -> None:
    """Add where the result goes."""
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path(name), help=f"{kinds} (default: {name})")


def pair(text: str) -> tuple[str, str]:
    """The two sides of `NAME=…`."""
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=…")
    return name, value


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, nor several with commas between") from None


def _position_or_path(text: str) -> str | int:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def loaded(args: argparse.Namespace) -> "tuple[torch.nn.Module, multicam.call.inputs.Inputs]":
    """The model and its inputs."""
    from multicam.call.files import load_inputs

    model = loaded_model(args)
    return model, load_inputs(model, args.input, args.value, args.preprocess)


def loaded_model(args: argparse.Namespace) -> "torch.nn.Module":
    """The model."""
    import torch

    from multicam.call.files import load_model

    dtype = getattr(torch, args.dtype) if args.dtype else None
    return load_model(args.model, args.weights, args.device, dtype)
