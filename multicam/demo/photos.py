"""The photos that the demo is trained on, tested with and shown on."""

from importlib.resources import files

import numpy as np
from jaxtyping import UInt8

from multicam.errors import MulticamError, unknown

SIDE = 128  # pixels of a crop; the smallest inputs are grids of 16 x 16 over it
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
