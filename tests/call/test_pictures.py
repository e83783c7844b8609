"""Pictures lose nothing on the way in, and a file that lies about its size is refused before it is unpacked."""

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from multicam import MulticamError
from multicam.call.files import read_image
from multicam.call.pictures import ALLOWED, MOST_PIXELS, read_picture


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ALLOWED, raising=False)
    return tmp_path


def numbers(*shape: int, kind: Any, high: int | None = None) -> np.ndarray:
    values = np.random.default_rng(0).random(shape)
    if np.issubdtype(kind, np.floating):
        return (100 * values - 50).astype(kind)
    return (values * (high or np.iinfo(kind).max)).astype(kind)


# what is stored is what is read


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_stay_sixteen_bits(suffix: str, channels: int) -> None:
    stored = numbers(7, 5, channels, kind=np.uint16).squeeze()
    stored.flat[:2] = 65535, 65534  # 8 bits could not tell them apart
    cv2.imwrite(f"deep.{suffix}", stored)
    planes = np.moveaxis(np.atleast_3d(stored)[..., 2::-1], 2, 0)
    raw = read_image(f"deep.{suffix}:raw", torch.float64)
    assert torch.equal(raw[0], torch.from_numpy(planes.astype(np.float64)))
    assert torch.equal(read_image(f"deep.{suffix}:raw")[0], torch.from_numpy(planes.astype(np.float32)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* has 16 bits")
        scaled = read_image(f"deep.{suffix}")
    assert torch.equal(scaled[0], torch.from_numpy(planes.astype(np.float32)) / 65535)
    assert scaled.max() == 1


def test_the_range_of_a_deep_picture_is_said_unless_the_caller_says_it() -> None:
    stored = numbers(7, 5, kind=np.uint16, high=4000)
    cv2.imwrite("depth.png", stored)
    low, high = stored.min(), stored.max()
    with pytest.warns(
        UserWarning, match=rf"16 bits: its numbers, {low} to {high}, are divided by 65535 .*depth.png:raw"
    ):
        found = read_image("depth.png")
    assert torch.equal(found, read_image("depth.png:grey"))
    assert torch.equal(found * 65535, read_image("depth.png:raw"))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int16, np.int32])
@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3), (3, 5, 3)])
def test_other_numbers_stay_as_they_are(kind: Any, shape: tuple[int, ...]) -> None:
    stored = numbers(*shape, kind=kind, high=30000)
    cv2.imwrite("x.tif", stored, [cv2.IMWRITE_TIFF_COMPRESSION, 1])  # the default of floating-point colours loses some
    planes = np.moveaxis(np.atleast_3d(stored)[..., ::-1], 2, 0)
    assert torch.equal(read_image("x.tif", torch.float64)[0], torch.from_numpy(planes.astype(np.float64)))
    assert torch.equal(read_image("x.tif:raw", torch.float64), read_image("x.tif", torch.float64))


@pytest.mark.parametrize(("kind", "full"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_grey_is_the_luma_of_a_picture_of_colours(kind: Any, full: int) -> None:
    stored = numbers(7, 5, 3, kind=kind)
    cv2.imwrite("x.tif", stored, [cv2.IMWRITE_TIFF_COMPRESSION, 1])
    luma = (stored.astype(np.float64) @ np.array([0.114, 0.587, 0.299])) / full
    rounding = 0.6 / 255 if kind is np.uint8 else 1e-6 * max(1, abs(luma).max())  # OpenCV rounds 8 bits to 8 bits
    found = read_image("x.tif:grey", torch.float64)
    assert found.shape == (1, 1, 7, 5)
    torch.testing.assert_close(found[0, 0], torch.from_numpy(luma), rtol=0, atol=rounding)


def test_raw_numbers_of_eight_bits_keep_their_channels() -> None:
    grey, colours = numbers(7, 5, kind=np.uint8), numbers(7, 5, 3, kind=np.uint8)
    cv2.imwrite("grey.png", grey)
    cv2.imwrite("colours.png", colours)
    assert torch.equal(read_image("grey.png:raw")[0, 0], torch.from_numpy(grey).float())
    assert torch.equal(
        read_image("colours.png:raw")[0], torch.from_numpy(colours[..., ::-1].copy()).permute(2, 0, 1).float()
    )


def test_a_picture_lower_than_four_rows_has_its_channels_first() -> None:
    Image.fromarray(numbers(3, 8, 3, kind=np.uint8)).save("low.png")
    assert read_image("low.png").shape == (1, 3, 3, 8)


# what lies


def encoded(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(numbers(6, 8, 3, kind=np.uint8)).save(file, kind, **options)
    return file.getvalue()


def patched(data: bytes, at: int, form: str, *values: int) -> bytes:
    part = struct.pack(form, *values)
    return data[:at] + part + data[at + len(part) :]


def tagged(data: bytes, **values: int) -> bytes:
    """A TIFF with other values, as 32 bits, in the entries of these tags."""
    [start] = struct.unpack_from("<I", data, 4)
    [entries] = struct.unpack_from("<H", data, start)
    for at in range(start + 2, start + 2 + 12 * entries, 12):
        [tag] = struct.unpack_from("<H", data, at)
        if f"tag{tag}" in values:
            data = patched(data, at, "<HHII", tag, 4, 1, values[f"tag{tag}"])
    return data


def frame(data: bytes) -> int:
    """Where a JPEG tells its size."""
    return next(i for i in range(2, len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2)) + 5


PNG, BMP, JPEG, TIFF = (encoded(kind) for kind in ("PNG", "BMP", "JPEG", "TIFF"))
LOSSY, LOSSLESS, WITH_ALPHA = (
    encoded("WEBP"),
    encoded("WEBP", lossless=True),
    encoded("WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
)
HUGE = patched(JPEG, frame(JPEG), ">HH", 60000, 50000)
LIARS: dict[str, tuple[bytes, str]] = {
    "huge.png": (patched(PNG, 16, ">II", 60000, 60000), "60000 x 60000"),
    "wide.png": (patched(PNG, 16, ">II", 2**31 - 1, 1), "2147483647 x 1 "),
    "empty.png": (patched(PNG, 16, ">II", 0, 6), "0 x 6 pixels: it is broken"),
    "huge.bmp": (patched(BMP, 18, "<ii", 60000, 60000), "60000 x 60000"),
    "upside-down.bmp": (patched(BMP, 18, "<ii", 60000, -60000), "60000 x 60000"),
    "least.bmp": (patched(BMP, 18, "<ii", 8, -(2**31)), "8 x 2147483648"),
    "negative.bmp": (patched(BMP, 18, "<ii", -8, 6), "-8 x 6 pixels: it is broken"),
    "old.bmp": (patched(patched(BMP, 14, "<I", 12), 18, "<HH", 60000, 60000), "60000 x 60000"),
    "huge.jpg": (HUGE, "50000 x 60000"),
    "filled.jpg": (HUGE[:2] + b"\xff" + HUGE[2:], "50000 x 60000"),
    "thumbnail.jpg": (HUGE[:2] + struct.pack(">HH", 0xFFE1, 2 + len(JPEG)) + JPEG + HUGE[2:], "50000 x 60000"),
    "unknown.jpg": (patched(JPEG, frame(JPEG), ">HH", 0, 8), "8 x 0 pixels: it is broken"),
    "huge.tif": (tagged(TIFF, tag256=60000, tag257=60000), "60000 x 60000"),
    "negative.tif": (tagged(TIFF, tag256=2**32 - 8), "4294967288 x 6"),
    "empty.tif": (tagged(TIFF, tag257=0), "8 x 0 pixels: it is broken"),
    "lossy.webp": (patched(LOSSY, 26, "<HH", 16383, 16383), "16383 x 16383"),
    "lossless.webp": (patched(LOSSLESS, 21, "<I", 0x0FFFFFFF), "16384 x 16384"),
    "canvas.webp": (patched(WITH_ALPHA, 24, "<HBHB", 59999 & 0xFFFF, 0, 59999 & 0xFFFF, 0), "60000 x 60000"),
    "other.png": (patched(BMP, 18, "<ii", 60000, 60000), "60000 x 60000"),  # what is inside counts, not the name
}


@pytest.mark.parametrize("name", LIARS)
def test_a_lie_about_the_size_is_refused_before_anything_is_unpacked(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, message = LIARS[name]
    (here / name).write_bytes(data)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(MulticamError, match=message):
        read_image(name)


@pytest.mark.parametrize("kind", ["png", "bmp", "jpg", "tif"])
def test_a_size_that_is_wrong_but_not_large_is_an_error_of_ours_or_a_picture(kind: str, here: Path) -> None:
    data = {
        "png": patched(PNG, 16, ">II", 900, 700),
        "bmp": patched(BMP, 18, "<ii", 900, 700),
        "jpg": patched(JPEG, frame(JPEG), ">HH", 700, 900),
        "tif": tagged(TIFF, tag256=900, tag257=700),
    }[kind]
    (here / f"x.{kind}").write_bytes(data)
    try:
        assert read_image(f"x.{kind}").shape == (1, 3, 700, 900)
    except MulticamError as error:
        assert "broken" in str(error)


KINDS = {"png": PNG, "bmp": BMP, "jpeg": JPEG, "tiff": TIFF, "lossy": LOSSY, "lossless": LOSSLESS, "alpha": WITH_ALPHA}


@pytest.mark.parametrize("data", KINDS.values(), ids=KINDS)
def test_a_file_that_ends_early_or_is_garbled_is_an_error_of_ours(data: bytes, here: Path) -> None:
    generator = np.random.default_rng(0)
    for n in range(60):
        garbled = bytearray(data)
        for at in generator.integers(0, min(len(data), 120), 3):
            garbled[at] = generator.integers(256)
        (here / "x.png").write_bytes(data[: len(data) * n // 60] if n % 2 else garbled)
        try:
            assert read_image("x.png:raw").ndim == 4
        except MulticamError as error:
            assert "x.png" in str(error)


def test_pages_are_not_dropped(here: Path) -> None:
    Image.new("L", (8, 6)).save("two.tif", save_all=True, append_images=[Image.new("L", (8, 6))])
    with pytest.raises(MulticamError, match=r"two.tif has 2 pages, and a picture is one: store them one by one"):
        read_image("two.tif")
    data = (here / "two.tif").read_bytes()
    [first] = struct.unpack_from("<I", data, 4)
    [entries] = struct.unpack_from("<H", data, first)
    (here / "circle.tif").write_bytes(patched(data, first + 2 + 12 * entries, "<I", first))  # follows itself
    with pytest.raises(MulticamError, match="cannot be read as a picture"):
        read_image("circle.tif")


def page(tags: dict[int, int], *, order: str = "<", big: bool = False) -> bytes:
    """The header and the only directory of a TIFF."""
    mark = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    form, count = (order + "HHQQ", order + "Q") if big else (order + "HHII", order + "H")
    mark += struct.pack(order + "HHQ", 8, 0, 16) if big else struct.pack(order + "I", 8)
    entries = b"".join(struct.pack(form, tag, 16 if big else 4, 1, value) for tag, value in tags.items())
    return mark + struct.pack(count, len(tags)) + entries + bytes(8)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_every_kind_of_tiff_tells_its_size_and_that_of_its_tiles(order: str, big: bool, here: Path) -> None:
    (here / "x.tif").write_bytes(page({256: 60000, 257: 50000}, order=order, big=big))
    with pytest.raises(MulticamError, match="60000 x 50000"):
        read_image("x.tif")
    (here / "x.tif").write_bytes(page({256: 8, 257: 8, 322: 2**20, 323: 2**20}, order=order, big=big))
    with pytest.raises(MulticamError, match="1048576 x 1048576"):
        read_image("x.tif")


def test_a_small_copy_beside_a_picture_is_no_page(here: Path) -> None:
    Image.new("L", (8, 6), 51).save("two.tif", save_all=True, append_images=[Image.new("L", (4, 3))])
    data = (here / "two.tif").read_bytes()
    [first] = struct.unpack_from("<I", data, 4)
    [entries] = struct.unpack_from("<H", data, first)
    [second] = struct.unpack_from("<I", data, first + 2 + 12 * entries)
    (here / "copy.tif").write_bytes(patched(data, second + 2, "<HHII", 254, 4, 1, 1))
    assert read_image("copy.tif:grey").unique().tolist() == pytest.approx([0.2])


def test_the_limit_is_the_callers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cv2.imwrite("x.png", numbers(30, 40, 3, kind=np.uint8))
    assert MOST_PIXELS > 1200
    monkeypatch.setenv(ALLOWED, "1199")
    with pytest.raises(
        MulticamError, match=r"40 x 30 pixels, .* more than 1,199 are not unpacked: .*MULTICAM_MAX_PIXELS=1200"
    ):
        read_image("x.png")
    monkeypatch.setenv(ALLOWED, "1200")
    assert read_image("x.png").shape == (1, 3, 30, 40)
    monkeypatch.setenv(ALLOWED, "many")
    with pytest.raises(MulticamError, match=r"MULTICAM_MAX_PIXELS is the number of pixels .* not 'many'"):
        read_image("x.png")


def test_what_opencv_raises_is_told_as_ours(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise cv2.error("no memory")

    (here / "x.png").write_bytes(PNG)
    monkeypatch.setattr(cv2, "imdecode", failing)
    with pytest.raises(MulticamError, match=r"x.png cannot be read as a picture") as raised:
        read_picture(Path("x.png"))
    assert isinstance(raised.value.__cause__, cv2.error)
