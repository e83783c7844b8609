"""Names are imported when they are asked for, and a name that is elsewhere is pointed to."""

import subprocess
import sys

import pytest

import multicam
from tests.whole.test_architecture import ROOMS

OLD = {
    "Binary": "targets",
    "BoxScore": "targets",
    "deletion": "metrics",
    "pointing_game": "metrics",
    "figure": "figures",
    "query_figure": "figures",
    "AttentionCall": "attending",
    "flow_matrix": "attending",
    "Attributions": "saliency",
    "Kernels": "inside",
    "Contribution": "shares",
    "superpixels": "shares",
}


def test_every_name_of_a_face_is_there_in_a_fresh_interpreter() -> None:
    look = f"""
import importlib
for package in {["multicam", *ROOMS]}:
    face = importlib.import_module(package)
    for name in getattr(face, "__all__", ()):
        assert getattr(face, name) is not None and name in dir(face), (package, name)
"""
    subprocess.run([sys.executable, "-c", look], check=True)


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "import sys, multicam, multicam.cam; print([m for m in ('torch', 'numpy', 'cv2', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(("name", "part"), OLD.items())
def test_a_name_that_is_elsewhere_is_pointed_to(name: str, part: str) -> None:
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'; it is multicam\.{part}\.{name}$"):
        getattr(multicam, name)
    assert getattr(getattr(multicam, part), name).__name__ == name


def test_a_name_that_is_nowhere_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'multicam' has no attribute 'GradCam'$"):
        _ = multicam.GradCam
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from multicam import nothing  # noqa: F401


def test_the_front_page_is_short() -> None:
    assert len(set(multicam.__all__) - {room.removeprefix("multicam.") for room in ROOMS}) <= 75
