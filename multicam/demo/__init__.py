"""The bundled three-input detector of local edits, its photos and its pictures."""

from multicam.demo.detector import LAYERS, EditDetector, inputs_of, inputs_of_crops, load
from multicam.demo.edits import CLASSES, EDITS, Sample, edited, regions, sample
from multicam.demo.photos import PHOTOS, SIDE, VIEWS, crop_of, photo

__all__ = [
    "CLASSES",
    "EDITS",
    "LAYERS",
    "PHOTOS",
    "SIDE",
    "VIEWS",
    "EditDetector",
    "Sample",
    "crop_of",
    "edited",
    "inputs_of",
    "inputs_of_crops",
    "load",
    "photo",
    "regions",
    "sample",
]
