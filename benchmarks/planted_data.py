"""Three inputs made from real photos, and evidence of a class planted at a known place of one of them.

Photos for training, for tuning (on which every setting was chosen) and for the final figures are those of `multicam.demo.photos.PHOTOS`.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from multicam.call.modalities import grey, haar, local_binary_pattern
from multicam.demo.photos import PHOTOS, photo

INPUTS = ("rgb", "frequency", "texture")
SIDE, CLASSES = 64, 4
STRENGTH = 1.0  # mean square of what is planted, where the inputs have a standard deviation of one
PERIODS = 2.5  # of a wave along the side of a square
FEATHER = 1 / 8  # of the side of a square

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """Inputs and the truth about them.

    Attributes:
        inputs: By name, standardised.
        label: The class of each sample.
        where: Which of `INPUTS` the class is written in.
        regions: Where in that input, by input: False everywhere in the samples whose evidence is elsewhere.
        photos: The photo that each sample is from.
    """

    inputs: dict[str, Float[Tensor, "b _ _ _"]]
    label: Int[Tensor, " b"]
    where: Int[Tensor, " b"]
    regions: dict[str, Bool[Tensor, "b _ _"]]
    photos: Int[Tensor, " b"]

    def first(self, n: int) -> "Samples":
        """The first `n` samples; the photos take turns, so all of them are among these."""
        inputs, regions = ({name: x[:n] for name, x in some.items()} for some in (self.inputs, self.regions))
        return Samples(inputs, self.label[:n], self.where[:n], regions, self.photos[:n])


def crops(group: str, n: int, generator: Generator) -> tuple[Float[Tensor, "n 3 64 64"], Int[Tensor, " n"]]:
    """Crops of the photos of a group in turn, at random places and flipped at random, in 0..1; and whose they are."""
    photos = [rearrange(torch.tensor(photo(name)), "h w c -> c h w") / 255 for name in PHOTOS[group]]
    found = []
    for i in range(n):
        image = photos[i % len(photos)]
        top, left = (int(torch.randint(side - SIDE + 1, (), generator=generator)) for side in image.shape[1:])
        crop = image[:, top : top + SIDE, left : left + SIDE]
        flips = [axis for axis in (1, 2) if torch.rand((), generator=generator) < 0.5]
        found.append(crop.flip(flips))
    return torch.stack(found), torch.arange(n) % len(photos)


def companions(images: Float[Tensor, "b 3 64 64"]) -> Batch:
    """The three inputs: the photo, its Haar details at half its size, and its local binary pattern."""
    return {
        "rgb": images,
        "frequency": haar(images)[:, 3:],  # without the first band, which is the photo itself, smaller
        "texture": local_binary_pattern(grey(images)),
    }


def statistics(inputs: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """The mean and the standard deviation of each channel of each input."""
    return {
        name: (x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True).clamp(min=1e-6))
        for name, x in inputs.items()
    }


def standardised(inputs: Batch, known: dict[str, tuple[Tensor, Tensor]]) -> Batch:
    """The inputs with the statistics that training photos have at zero and one."""
    return {name: (x - known[name][0]) / known[name][1] for name, x in inputs.items()}


def gratings(label: Int[Tensor, " n"], side: int, generator: Generator) -> Float[Tensor, "n side side"]:
    """Waves across a square at an angle that is the class, at random phases."""
    angle = label[:, None] * math.pi / CLASSES
    return _waves(angle, side, generator)


def distraction(n: int, side: int, generator: Generator) -> Float[Tensor, "n side side"]:
    """Waves of the same length at random angles all at once: noise whose spectrum is a ring."""
    return _waves(math.pi * torch.rand(n, 16, generator=generator), side, generator)


def _waves(angle: Float[Tensor, "n k"], side: int, generator: Generator) -> Float[Tensor, "n side side"]:
    """The sum of k waves, soft at the border of the square, with a mean square of `STRENGTH`."""
    phase = 2 * math.pi * torch.rand(*angle.shape, 1, 1, generator=generator)
    place = 2 * math.pi * PERIODS * torch.arange(side) / side
    x, y = angle.cos()[..., None, None] * place, angle.sin()[..., None, None] * place[:, None]
    depth = torch.minimum(torch.arange(side) + 1, side - torch.arange(side))
    soft = (depth / (FEATHER * side + 1)).clamp(max=1)
    waves = (x + y + phase).cos().sum(1) * soft * soft[:, None]
    return waves * (STRENGTH / waves.square().mean((1, 2), keepdim=True)).sqrt()


def planted(inputs: Batch, photos: Int[Tensor, " b"], generator: Generator) -> Samples:
    """The inputs with a class written in one of them, and as much that belongs to no class in each of the two others."""
    n = len(photos)
    label = torch.randint(CLASSES, (n,), generator=generator)
    where = torch.randint(len(INPUTS), (n,), generator=generator)
    out, regions = {}, {}
    for i, name in enumerate(INPUTS):
        side = inputs[name].shape[-1]
        square = side // 4
        here = (where == i)[:, None, None]
        pattern = torch.where(here, gratings(label, square, generator), distraction(n, square, generator))
        start = torch.randint(side - square + 1, (n, 2, 1), generator=generator)
        rows, columns = (start + torch.arange(square)).unbind(1)
        at = torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None]
        out[name] = inputs[name].clone()
        out[name].movedim(1, 3)[at] += pattern[..., None]
        regions[name] = torch.zeros(n, side, side, dtype=torch.bool)
        regions[name][at] = here.expand(n, square, square)
    return Samples(out, label, where, regions, photos)
