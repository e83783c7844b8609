"""The demo: a detector of local edits that reads a photo, its spectral lines and its texture, and photos to try it on.

The model is trained on edits made in the photos that come inside the wheels of scikit-image and scikit-learn, see
`multicam.demo_training`. Each kind of edit is visible to one input by construction, so it is known where the evidence
ought to lie: the reason why this model exists. It is no forensic tool.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Generator, Tensor, nn

from multicam.errors import MulticamError, unknown
from multicam.modalities import dct, grey

SIDE = 128  # pixels of a crop; the smallest inputs are grids of 16 x 16 over it
CLASSES = ("colour", "frequency", "texture")  # what the three logits say was edited
LAYERS = {"rgb": "rgb_branch", "frequency": "frequency_branch", "texture": "texture_branch"}
WEIGHTS = Path(__file__).with_suffix(".safetensors")

# Training photos; tuning photos, on which every choice was made; and final photos, for the published figures only.
PHOTOS = {
    "training": {
        "astronaut": "skimage/data/astronaut.png",
        "flower": "sklearn/datasets/images/flower.jpg",
        "galaxies": "skimage/data/hubble_deep_field.jpg",
        "tissue": "skimage/data/ihc.png",
        "retina": "skimage/data/retina.jpg",
        "brick": "skimage/data/brick.png",
        "grass": "skimage/data/grass.png",
        "gravel": "skimage/data/gravel.png",
        "moon": "skimage/data/moon.png",
        "cell": "skimage/data/cell.png",
    },
    "tuning": {
        "coffee": "skimage/data/coffee.png",
        "motorcycle": "skimage/data/motorcycle_left.png",
        "coins": "skimage/data/coins.png",
    },
    "final": {
        "chelsea": "skimage/data/chelsea.png",
        "china": "sklearn/datasets/images/china.jpg",
        "rocket": "skimage/data/rocket.jpg",
        "camera": "skimage/data/camera.png",
    },
}

# Parts of the final photos worth a picture, by row and column of their top left pixel; chosen before any map was made.
VIEWS = {"chelsea": (60, 150), "china": (150, 260), "rocket": (120, 260), "camera": (60, 180)}


def _block(inward: int, outward: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inward, outward, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outward),
        nn.ReLU(inplace=True),
    )


class EditDetector(nn.Module):
    """Three logits, one a kind of edit: `(b 3)` in the order of `CLASSES`, above zero where it says "edited".

    Three small CNNs give 16 x 16 tokens each; the tokens of the photo query those of the two other inputs, every place
    votes, and log-mean-exp over the places gives the logits.

    Args:
        width: Channels of a token.

    Example:
        >>> model = EditDetector().eval()
        >>> model(torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 16, 16), torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3])
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.opponent = nn.Conv2d(3, 3, 1, bias=False)
        self.rgb_branch = nn.Sequential(_block(3, 24, 2), _block(24, 32), _block(32, width, 2), _block(width, width))
        self.frequency_branch = nn.Sequential(_block(64, width, kernel=1), _block(width, width))
        self.texture_branch = nn.Sequential(_block(3, 24), _block(24, width, 2), _block(width, width))
        self.position = nn.Parameter(_waves(width))
        self.frequency_attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.texture_attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(inplace=True), nn.Linear(width, len(CLASSES)))
        with torch.no_grad():
            # Edits of colour keep the luma, and photos vary far more in luma than in chroma.
            self.opponent.weight.copy_((YCC * torch.tensor([[1.0], [6.0], [6.0]]))[:, :, None, None])

    def forward(
        self,
        rgb: Float[Tensor, "b 3 64 64"],
        frequency: Float[Tensor, "b 64 16 16"],
        texture: Float[Tensor, "b 3 32 32"],
    ) -> Float[Tensor, "b 3"]:
        """The logits."""
        return self.pooled(self.votes(rgb, frequency, texture))

    def pooled(self, votes: Float[Tensor, "b n 3"]) -> Float[Tensor, "b 3"]:
        """Log-mean-exp over the places."""
        return votes.logsumexp(1) - math.log(votes.shape[1])

    def votes(
        self,
        rgb: Float[Tensor, "b 3 64 64"],
        frequency: Float[Tensor, "b 64 16 16"],
        texture: Float[Tensor, "b 3 32 32"],
    ) -> Float[Tensor, "b 256 3"]:
        """What each of the 16 x 16 places says, before pooling: training compares it with the edited region."""
        rgb = self.rgb_branch(self.opponent(rgb)).flatten(2).mT
        frequency = self.frequency_branch(frequency).flatten(2).mT
        texture = self.texture_branch(texture).flatten(2).mT
        query = rgb + self.position
        lines, _ = self.frequency_attention(query, frequency + self.position, frequency, need_weights=False)
        grain, _ = self.texture_attention(query, texture + self.position, texture, need_weights=False)
        votes: Tensor = self.head(torch.cat([rgb, lines, grain], dim=2))
        return votes


def _waves(width: int, side: int = 16) -> Float[Tensor, "n width"]:
    """Sines and cosines of each place's row and column, so that attention starts out knowing what is near."""
    place = (torch.arange(side) + 0.5) / side * 2 * math.pi
    angles = place[:, None] * torch.linspace(0.25, 3, width // 4)
    wave = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = wave[:, None].expand(side, side, -1), wave[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def load() -> EditDetector:
    """The trained detector, in eval mode."""
    from safetensors.torch import load_file

    model = EditDetector()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def photo(name: str) -> UInt8[np.ndarray, "h w 3"]:
    """A photo of `PHOTOS` by name; grey ones repeat their values in three channels.

    Raises:
        MulticamError: There is no such photo.

    Example:
        >>> photo("chelsea").shape
        (300, 451, 3)
    """
    from PIL import Image

    paths = {known: path for group in PHOTOS.values() for known, path in group.items()}
    if name not in paths:
        raise unknown("photo", name, paths)
    package, _, path = paths[name].partition("/")
    with (files(package) / path).open("rb") as file:
        return np.asarray(Image.open(file).convert("RGB"))


def crop_of(image: np.ndarray) -> UInt8[np.ndarray, "128 128 3"]:
    """The part of a photo `(h w 3)` that the detector looks at: its middle, pixel for pixel.

    Resizing would wipe out the traces it looks for, so only a photo with a side under 128 pixels is enlarged. To look
    elsewhere, cut that part out first.

    Raises:
        MulticamError: The photo is not a uint8 array `(h w 3)`.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise MulticamError(f"a photo is a uint8 array (h w 3), got {image.dtype} of shape {image.shape}")
    if min(image.shape[:2]) < SIDE:
        from PIL import Image

        scale = SIDE / min(image.shape[:2])
        height, width = (max(SIDE, round(side * scale)) for side in image.shape[:2])
        image = np.asarray(Image.fromarray(image).resize((width, height)))
    top, left = ((side - SIDE) // 2 for side in image.shape[:2])
    return image[top : top + SIDE, left : left + SIDE]


def inputs_of(image: np.ndarray) -> dict[str, Tensor]:
    """The three inputs, each with a batch axis of one, for `crop_of(image)`; every one of them covers the whole crop.

    Example:
        >>> {name: tuple(x.shape) for name, x in inputs_of(photo("chelsea")).items()}
        {'rgb': (1, 3, 64, 64), 'frequency': (1, 64, 16, 16), 'texture': (1, 3, 32, 32)}
    """
    crop = torch.from_numpy(crop_of(image).copy())
    return inputs_of_crops(rearrange(crop, "h w c -> 1 c h w").float())


def inputs_of_crops(crops: Float[Tensor, "b 3 128 128"]) -> dict[str, Tensor]:
    """The three inputs of crops with values 0..255.

    - `rgb`: the crop, smoothed, at half its size, in -1..1.
    - `frequency`: spectral lines. Of each block of 8 x 8 pixels, how far the log magnitude of each DCT coefficient
      rises above all its neighbours in the frequency plane; one channel a frequency. Periods make lines, noise none.
    - `texture`: mean log energy of fine detail along columns, along rows and along both, that is of `(-1 0 1)` across
      `(1 2 1) / 4`, the reverse, and across itself. The detail of photos is sparse and has directions, grain is dense
      and has none. No lattice of period 2 passes these filters, and luma is blind to edits of chroma.
    """
    luma = grey(crops / 255)
    # Coefficients below one grey level are rounding, and would make lines at random.
    magnitude = ((dct(luma, block=8) * 255).abs() + 1).log()
    spectra = rearrange(magnitude, "b 1 (h u) (w v) -> (b h w) 1 u v", u=8, v=8)
    lines = (spectra - _strongest_neighbour(spectra)).relu()
    down, across = (_difference(luma * 255, axis) for axis in (2, 3))
    detail = torch.cat([_smoothed(down, 3), _smoothed(across, 2), _difference(down, 3) / 2], dim=1)
    return {
        "rgb": F.avg_pool2d(blurred(crops), 2) / 127.5 - 1,
        "frequency": rearrange(lines, "(b h w) 1 u v -> b (u v) h w", h=16, w=16).contiguous(),
        "texture": F.avg_pool2d(detail.square().log1p(), 4) / 3,
    }


def _strongest_neighbour(x: Float[Tensor, "b 1 u v"]) -> Float[Tensor, "b 1 u v"]:
    around = F.unfold(F.pad(x, (1, 1, 1, 1), value=-1e9), 3).view(len(x), 9, *x.shape[2:])
    return torch.cat([around[:, :4], around[:, 5:]], dim=1).amax(1, keepdim=True)


def _beside(x: Float[Tensor, "b c h w"], axis: int) -> tuple[Tensor, Tensor]:
    """The pixels before and after each one along an axis, mirrored at the border."""
    size = x.shape[axis]
    padded = F.pad(x, (1, 1, 0, 0) if axis == 3 else (0, 0, 1, 1), mode="reflect")
    return padded.narrow(axis, 0, size), padded.narrow(axis, 2, size)


def _difference(x: Float[Tensor, "b c h w"], axis: int) -> Float[Tensor, "b c h w"]:
    """`x` filtered by (-1 0 1) along an axis."""
    before, after = _beside(x, axis)
    return after - before


def _smoothed(x: Float[Tensor, "b c h w"], axis: int) -> Float[Tensor, "b c h w"]:
    """`x` filtered by (1 2 1) / 4 along an axis."""
    before, after = _beside(x, axis)
    return (before + 2 * x + after) / 4


def blurred(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """`x` filtered by (1 2 1) / 4 along both axes."""
    return _smoothed(_smoothed(x, 3), 2)


# The edits. All of them work on crops (b 3 128 128) with values 0..255 and draw from a generator.

YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # JFIF
RGB: Tensor = torch.linalg.inv(YCC)


def to_ycc(crops: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Luma and the two chroma channels, chroma around zero."""
    return (YCC @ crops.flatten(2)).view_as(crops)


def to_rgb(ycc: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """The inverse of `to_ycc`."""
    return (RGB @ ycc.flatten(2)).view_as(ycc)


def uniform(generator: Generator, n: int, low: float, high: float) -> Float[Tensor, "n 1 1 1"]:
    """One number between `low` and `high` for each of `n` crops."""
    return torch.rand(n, 1, 1, 1, generator=generator) * (high - low) + low


def turned(ycc: Float[Tensor, "b 3 h w"], angle: Tensor) -> Float[Tensor, "b 3 h w"]:
    """The same luma with every hue turned by `angle`."""
    y, cb, cr = ycc.chunk(3, dim=1)
    return torch.cat([y, angle.cos() * cb - angle.sin() * cr, angle.sin() * cb + angle.cos() * cr], dim=1)


def recolour(generator: Generator, crops: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """The edit of colour: hues turned and chroma shifted, luma kept."""
    n = len(crops)
    angle = uniform(generator, n, 0.7, 2 * math.pi - 0.7)
    toward, far = uniform(generator, n, 0.0, 2 * math.pi), uniform(generator, n, 15.0, 32.0)
    shift = torch.cat([torch.zeros_like(far), far * toward.cos(), far * toward.sin()], dim=1)
    return to_rgb(turned(to_ycc(crops), angle) + shift)


def add_lattice(generator: Generator, crops: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """The edit of frequency: a faint lattice of period 2, as some upsampling leaves: rows, columns or a chequerboard."""
    n = len(crops)
    sign = 1.0 - 2 * (torch.arange(SIDE) % 2)
    rows, columns = sign[:, None].expand(SIDE, SIDE), sign[None].expand(SIDE, SIDE)
    kinds = torch.stack([rows, columns, rows * columns])[:, None]
    return crops + kinds[torch.randint(3, (n,), generator=generator)] * uniform(generator, n, 2.5, 5.0)


def add_grain(generator: Generator, crops: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """The edit of texture: fine grain on the luma."""
    noise = torch.randn(len(crops), 1, SIDE, SIDE, generator=generator)
    return crops + (noise - blurred(noise)) * uniform(generator, len(crops), 14.0, 22.0)


Edit = Callable[[Generator, Float[Tensor, "b 3 h w"]], Float[Tensor, "b 3 h w"]]
EDITS: dict[str, Edit] = dict(zip(CLASSES, (recolour, add_lattice, add_grain), strict=True))


def regions(generator: Generator, n: int) -> Float[Tensor, "n 1 128 128"]:
    """Soft masks: `n` blobs of a sixteenth to a sixth of a crop, feathered over 2 to 6 pixels, 1 inside."""
    radius = SIDE * (uniform(generator, n, 1 / 16, 1 / 6) / math.pi).sqrt()
    aspect, tilt = uniform(generator, n, -0.25, 0.25).exp(), uniform(generator, n, 0.0, 2 * math.pi)
    place = torch.arange(SIDE) + 0.5
    dx = place - radius - (SIDE - 2 * radius) * uniform(generator, n, 0.0, 1.0)
    dy = place[:, None] - radius - (SIDE - 2 * radius) * uniform(generator, n, 0.0, 1.0)
    u = (dx * tilt.cos() + dy * tilt.sin()) * aspect
    v = (dy * tilt.cos() - dx * tilt.sin()) / aspect
    around = torch.atan2(v, u)
    two, three = (uniform(generator, n, 0.0, 2 * math.pi) for _ in range(2))
    edge = radius * (1 + 0.15 * (2 * around + two).sin() + 0.12 * (3 * around + three).sin())
    return ((edge - torch.hypot(u, v)) / uniform(generator, n, 2.0, 6.0) + 0.5).clamp(0, 1)


def edited(
    generator: Generator, crops: Float[Tensor, "b 3 h w"], edit: Edit, region: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, "b 3 h w"]:
    """The crops with one edit inside the region, rounded as an 8-bit file would be."""
    return torch.lerp(crops, edit(generator, crops), region).round().clamp(0, 255)


@dataclass(frozen=True)
class Sample:
    """An edited crop and the truth about it.

    Attributes:
        image: The crop; `inputs_of(image)` makes the model's inputs of it.
        regions: Where each kind of edit was made, by class.
    """

    image: UInt8[np.ndarray, "128 128 3"]
    regions: dict[str, Bool[Tensor, "128 128"]]


def sample(
    name: str, edits: Sequence[str] = CLASSES, *, corner: tuple[int, int] | None = None, seed: int = 0
) -> Sample:
    """A crop of a named photo with one edit of each kind in `edits`, in disjoint regions; the same for the same `seed`.

    Args:
        name: A photo of `PHOTOS`.
        edits: Classes out of `CLASSES`; none of them leaves the photo as it is.
        corner: Row and column of the crop's top left pixel; None takes that of `VIEWS`, or the middle of the photo.
        seed: Decides about regions and edits.

    Raises:
        MulticamError: There is no such photo or class, or the crop reaches beyond the photo.

    Example:
        >>> edited = sample("chelsea", ["colour", "texture"])
        >>> edited.image.shape, list(edited.regions)
        ((128, 128, 3), ['colour', 'texture'])
    """
    for edit in edits:
        if edit not in EDITS:
            raise unknown("edit", edit, EDITS)
    image = photo(name)
    if corner is None:
        corner = VIEWS.get(name)
    if corner is not None:
        top, left = corner
        if not (0 <= top <= image.shape[0] - SIDE and 0 <= left <= image.shape[1] - SIDE):
            raise MulticamError(f"a crop of {SIDE} pixels at {corner} reaches beyond {name!r}, {image.shape[:2]}")
        image = image[top : top + SIDE, left : left + SIDE]
    crops = rearrange(torch.from_numpy(crop_of(image).copy()), "h w c -> 1 c h w").float()
    generator = Generator().manual_seed(seed)
    blobs = regions(generator, len(edits))
    while blobs.gt(0).sum(0).gt(1).any():
        blobs = regions(generator, len(edits))
    for edit, blob in zip(edits, blobs, strict=True):
        crops = edited(generator, crops, EDITS[edit], blob[None])
    return Sample(
        rearrange(crops, "1 c h w -> h w c").byte().numpy(),
        {edit: blob[0] > 0.5 for edit, blob in zip(edits, blobs, strict=True)},
    )
