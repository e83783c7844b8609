"""The demo's photos: apart from each other, readable, and cut to one size."""

import numpy as np
import pytest

from multicam import demo
from multicam.demo.photos import PHOTOS, SIDE
from multicam.errors import MulticamError


def test_photos_are_kept_apart_and_all_can_be_read():
    names = [name for group in PHOTOS.values() for name in group]
    paths = [path for group in PHOTOS.values() for path in group.values()]
    assert len(set(names)) == len(set(paths)) == len(names)
    for name in names:
        assert min(demo.photo(name).shape[:2]) >= 2 * SIDE


def test_unknown_photo():
    with pytest.raises(MulticamError, match=r"no photo 'chelsey'; did you mean 'chelsea'\?"):
        demo.photo("chelsey")


def test_a_large_photo_is_cropped_and_a_small_one_enlarged():
    image = demo.photo("china")
    h, w = image.shape[:2]
    assert np.array_equal(demo.crop_of(image), image[h // 2 - 64 : h // 2 + 64, w // 2 - 64 : w // 2 + 64])
    for small in (image[:40, :300], image[:300, :1], image[:128, :127]):
        assert demo.crop_of(np.ascontiguousarray(small)).shape == (SIDE, SIDE, 3)


def test_what_is_no_photo_is_refused():
    for wrong in (np.zeros((300, 300), np.uint8), np.zeros((3, 300, 300), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(MulticamError, match=r"uint8 array \(h w 3\), got uint8 of shape"):
            demo.crop_of(wrong)
