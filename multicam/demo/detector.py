"""The demo: a detector of local edits that reads a photo, its spectral lines and its texture, and photos to try it on.

The model is trained on edits made in the photos that come inside the wheels of scikit-image and scikit-learn, see
`multicam.demo_training`. Each kind of edit is visible to one input by construction, so it is known where the evidence
ought to lie: the reason why this model exists. It is no forensic tool.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from multicam.call.modalities import dct, grey
from multicam.demo.edits import CLASSES, YCC, blurred, neighbours, smoothed
from multicam.demo.photos import crop_of

LAYERS = {"rgb": "rgb_branch", "frequency": "frequency_branch", "texture": "texture_branch"}
WEIGHTS = Path(__file__).with_name("demo.safetensors")


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


def inputs_of(image: np.ndarray) -> dict[str, Tensor]:
    """The three inputs, each with a batch axis of one, for `crop_of(image)`; every one of them covers the whole crop.

    Example:
        >>> from multicam.demo.photos import photo
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
    detail = torch.cat([smoothed(down, 3), smoothed(across, 2), _difference(down, 3) / 2], dim=1)
    return {
        "rgb": F.avg_pool2d(blurred(crops), 2) / 127.5 - 1,
        "frequency": rearrange(lines, "(b h w) 1 u v -> b (u v) h w", h=16, w=16).contiguous(),
        "texture": F.avg_pool2d(detail.square().log1p(), 4) / 3,
    }


def _strongest_neighbour(x: Float[Tensor, "b 1 u v"]) -> Float[Tensor, "b 1 u v"]:
    around = F.unfold(F.pad(x, (1, 1, 1, 1), value=-1e9), 3).view(len(x), 9, *x.shape[2:])
    return torch.cat([around[:, :4], around[:, 5:]], dim=1).amax(1, keepdim=True)


def _difference(x: Float[Tensor, "b c h w"], axis: int) -> Float[Tensor, "b c h w"]:
    """`x` filtered by (-1 0 1) along an axis."""
    before, after = neighbours(x, axis)
    return after - before
