"""`multicam demo`: a first look."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from multicam.cli.arguments import debugging
from multicam.cli.help import Command

DESCRIPTION = """\
Explain the bundled model, which sees a photo by its colours, its frequencies and its texture, and
write the pictures.
"""
EXAMPLE = """\
example:
  multicam demo --out pictures --image photo.jpg
"""


def add(command: Callable[..., Command]) -> None:
    """Add the command with `add_parser`, as argparse calls it."""
    demo = command(
        "demo",
        help="a first look: a three-input model on a photo",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        parents=[debugging()],
    )
    demo.add_argument("--out", metavar="DIR", type=Path, default=Path("multicam-demo"), help="default: multicam-demo")
    demo.add_argument("--image", metavar="FILE", type=Path, help="a photo of your own")
    demo.add_argument(
        "--train",
        action="store_true",
        help="instead, train the model again, write its weights to DIR and measure it: an hour or so",
    )
    demo.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
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
