"""Pictures as they are stored: their pixels, and how many a file says that it has, before any is unpacked."""

import os
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from multicam.errors import MulticamError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
# A few bytes can claim any number of pixels, and be unpacked to them. No model takes a photo as large as this.
MOST_PIXELS = 2**26
ALLOWED = "MULTICAM_MAX_PIXELS"  # in the environment, because a command has no other place for it
# What whole numbers of a picture are divided by; those of other types stay as they are.
FULL = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
LUMA = (0.114, 0.587, 0.299)  # of blue, green and red: ITU-R BT.601, as for pictures of 8 bits


def read_picture(path: Path, key: str | None = None) -> tuple[Shaped[Tensor, "c h w"], int]:
    """The pixels of a picture as they are stored, and the number that they are divided by to lie in 0..1.

    Photos are upright and RGB, without alpha; a picture of one channel and more than 8 bits keeps its channel.

    Args:
        path: A .png, .jpg, .bmp, .webp or .tif, of 8 or 16 bits or floating point.
        key: `"grey"` for one channel, `"raw"` for numbers that stay as they are, None for neither.

    Raises:
        MulticamError: If the key is another, or the file is broken, too large, or of several pages.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = cv2.imwrite(f"{folder}/deep.png", np.full((4, 6, 3), 1500, np.uint16))
        ...     pixels, full = read_picture(Path(folder, "deep.png"))
        >>> pixels.shape, pixels.dtype, full
        (torch.Size([3, 4, 6]), torch.uint16, 65535)
    """
    if key not in (None, "grey", "raw"):
        raise MulticamError(
            f"a picture is read as it is, as {path}:grey (one channel) or as {path}:raw (numbers as they are stored), "
            f"not as {path}:{key}"
        )
    data = path.read_bytes()
    _refuse_broken(path, data)
    pixels = _decoded(path, data, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR)
    full = 1 if key == "raw" else FULL.get(pixels.dtype, 1)
    if pixels.ndim == 2 and key is None:
        if pixels.dtype == np.uint8:
            pixels = np.stack([pixels] * 3, 2)
        elif full > 1:
            warnings.warn(
                f"{path} has 16 bits: its numbers, {pixels.min()} to {pixels.max()}, are divided by 65535 to lie in 0..1. A model "
                f"that was given them as they are, in millimetres say, wants {path}:raw; {path}:grey says that 0..1 is meant",
                stacklevel=3,
            )
    elif pixels.ndim == 3 and key == "grey":
        pixels = _decoded(path, data, cv2.IMREAD_GRAYSCALE) if pixels.dtype == np.uint8 else pixels @ np.array(LUMA)
    channels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels[..., ::-1], 2, 0)
    return torch.from_numpy(np.ascontiguousarray(channels)), full


def _decoded(path: Path, data: bytes, flags: int) -> np.ndarray:
    try:
        found: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise _broken(path) from error
    if found is None:
        raise _broken(path)
    pixels: np.ndarray = found
    return pixels


def _broken(path: Path) -> MulticamError:
    return MulticamError(f"{path} cannot be read as a picture: it is broken or of another kind than its name says")


def _refuse_broken(path: Path, data: bytes) -> None:
    """Refuse what says that it has no pixels, or more than fit in memory, or several pages, before it is unpacked."""
    try:
        header = next(read(data) for start, read in _HEADERS.items() if data.startswith(start))
    except (StopIteration, struct.error, LookupError) as error:
        raise _broken(path) from error
    allowed = os.environ.get(ALLOWED, str(MOST_PIXELS))
    if not allowed.isdecimal():
        raise MulticamError(f"{ALLOWED} is the number of pixels that a picture may have, not {allowed!r}")
    for width, height in header.sizes:
        if width < 1 or height < 1:
            raise MulticamError(f"{path} says that it has {width} x {height} pixels: it is broken")
        if width * height > int(allowed):
            raise MulticamError(
                f"{path} says that it has {width} x {height} pixels, and pictures of more than {int(allowed):,} are not unpacked: "
                f"make it smaller, or allow as many with {ALLOWED}={width * height} in the environment"
            )
    if header.pages > 1:
        raise MulticamError(
            f"{path} has {header.pages} pages, and a picture is one: store them one by one, or together as an array (.npy)"
        )


class Header(NamedTuple):
    """What a file says of itself: the sizes, width and height, that are unpacked at once, and how many pictures it holds."""

    sizes: list[tuple[int, int]]
    pages: int = 1


def _png(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 16)
    return Header([(width, height)])


def _bmp(data: bytes) -> Header:
    [length] = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if length == 12 else "<ii", data, 18)
    return Header([(width, abs(height))])  # below zero: from the top to the bottom


def _jpeg(data: bytes) -> Header:
    at = 2
    while True:
        mark, length = struct.unpack_from(">HH", data, at)
        # 0xFFC0 to 0xFFCF start a frame, but for those of tables.
        if 0xFFC0 <= mark <= 0xFFCF and mark not in (0xFFC4, 0xFFC8, 0xFFCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return Header([(width, height)])
        at += 1 if mark == 0xFFFF else 2 + length  # 0xFF may fill


def _webp(data: bytes) -> Header:
    match data[12:16]:
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return Header([(width & 0x3FFF, height & 0x3FFF)])
        case b"VP8L":
            [bits] = struct.unpack_from("<I", data, 21)
            return Header([(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))])
        case b"VP8X":
            [width], [height] = (struct.unpack("<I", data[at : at + 3] + b"\0") for at in (24, 27))
            return Header([(1 + width, 1 + height)])
    raise LookupError(data[12:16])


def _tiff(data: bytes) -> Header:
    """Its tiles are unpacked as a whole, however little of them the picture needs."""
    pages = list(_directories(data))
    whole = [page for page in pages if not page.get(SUBFILE, 0) & 0b101]  # the others are small copies, or masks
    first = pages[0]
    return Header([(first[WIDTH], first[HEIGHT]), (first.get(TILE_WIDTH, 1), first.get(TILE_HEIGHT, 1))], len(whole))


SUBFILE, WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT = 254, 256, 257, 322, 323  # tags of TIFF
NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # the types of their values


def _directories(data: bytes) -> Iterator[dict[int, int]]:
    """The sizes that each page of a TIFF tells, by tag."""
    order, big = "<" if data.startswith(b"II") else ">", data[2:4] in (b"+\0", b"\0+")
    count, entry, offset = (
        (order + "Q", order + "HHQ", order + "Q") if big else (order + "H", order + "HHI", order + "I")
    )
    [at] = struct.unpack_from(offset, data, 8 if big else 4)
    seen = set()
    while at:
        if at in seen:
            raise LookupError("the pages are a circle")
        seen.add(at)
        [entries] = struct.unpack_from(count, data, at)
        at += struct.calcsize(count)
        page = {}
        for _ in range(entries):
            tag, kind, _many = struct.unpack_from(entry, data, at)
            if tag in (SUBFILE, WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT):
                [page[tag]] = struct.unpack_from(order + NUMBERS[kind], data, at + struct.calcsize(entry))
            at += struct.calcsize(entry) + struct.calcsize(offset)
        yield page
        [at] = struct.unpack_from(offset, data, at)


_HEADERS: dict[bytes, Callable[[bytes], Header]] = {
    b"\x89PNG\r\n\x1a\n": _png,
    b"\xff\xd8\xff": _jpeg,
    b"BM": _bmp,
    b"RIFF": _webp,
    b"II*\0": _tiff,
    b"MM\0*": _tiff,
    b"II+\0": _tiff,
    b"MM\0+": _tiff,
}
