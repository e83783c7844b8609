"""What the commands of `multicam` have in common: how they are told of a model, its inputs and a target."""

import argparse
from pathlib import Path

import torch

import multicam.call.inputs

TARGETS = """\
targets:
  top                  the highest-scoring class of each sample (the default)
  3   or   3,1,0       the score of a class counted from 0; one class per sample
  prob:3               its probability
  contrast:3,5,7       class 3 rather than 5 and 7
  binary, binary:no    the only logit, and its negative
  regression           the only predicted number; regression:2 is the third
  MODULE:FUNC          your own function from the output to one score per sample
"""
GRIDS = """\
grids, for layers of tokens where nothing proves the grid:
  rgb=14x14            the tokens of layer rgb are a grid of 14 rows and 14 columns
  rgb=14x14+1          behind one class or register token
  rgb=14x14@197        from token 197 on, counted from 0, in a longer sequence
  rgb=14x14,sequence-first   for a layer that returns (n b c); may follow any of these
  rgb=channels-last    the layer returns (b h w c)
  rgb=as-it-is         the layer returns (b c h w), or a signal (b c l)
  Without "rgb=" for a layer without a name.
"""


class Command(argparse.ArgumentParser):
    """A parser whose help has lists in it; only a help that lists methods waits for torch."""

    def format_help(self) -> str:
        """The help, with the lists in their places."""
        text = super().format_help().replace("{targets}", TARGETS).replace("{grids}", GRIDS)
        if "{methods}" not in text and "{attributions}" not in text:
            return text
        from multicam.cli.words import describe_attributions, describe_methods

        return text.replace("{methods}", describe_methods()).replace("{attributions}", describe_attributions())


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


def add_out(parser: Command, name: str, kinds: str = "the picture") -> None:
    """Add where the result goes."""
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path(name), help=f"{kinds} (default: {name})")


def called() -> Command:
    """The arguments that say which model, and what it is given."""
    model = Command(add_help=False, parents=[source()])
    model.add_argument(
        "--input",
        metavar="NAME=FILE",
        type=pair,
        action="append",
        default=[],
        help="an image input by its name in forward(); repeat it for other inputs, or with the same name for further "
        "samples. Pictures (.png .jpg .bmp .webp .tif) are RGB; FILE:grey reads one channel, and one-channel pictures "
        "of more than 8 bits keep theirs. Arrays (.npy .npz .pt .safetensors; FILE:KEY where there are several) of the "
        "shapes (h w), (h w 1), (h w 3) and (c h w) are one sample; with more axes the first is the batch. 8-bit values "
        "are scaled to 0..1, others stay as they are",
    )
    model.add_argument(
        "--value",
        metavar="NAME=VALUE",
        type=pair,
        action="append",
        default=[],
        help="any other argument: a number, true, false, none, a string, or @FILE for an array exactly as it is stored",
    )
    model.add_argument(
        "--preprocess",
        metavar="MODULE:FUNC",
        help="a function called with the dict of all inputs and values; it returns what the model takes: a dict of "
        "keyword arguments, a tuple of positional ones, or multicam.Inputs",
    )
    return model


def pair(text: str) -> tuple[str, str]:
    """The two sides of `NAME=…`."""
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=…")
    return name, value


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
