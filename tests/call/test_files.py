import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from multicam import MulticamError
from multicam.call.files import find_object, load_inputs, load_model, load_weights, read_array, read_image, read_value

NETS = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Settings:
    width: int = 4

def build():
    return nn.Conv2d(3, Settings().width, 3)

ready = nn.Flatten()
number = 3

def broken():
    raise RuntimeError("no such backbone")

def wrong():
    return "a model"

def halved(given):
    return {name: value / 2 for name, value in given.items()}

def failing(given):
    return given["rbg"]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path


def pixels(*shape, seed=0, high=256, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


# models


def test_a_model_comes_from_a_file_a_module_or_is_one(here):
    (here / "nets_of_this_test.py").write_text(NETS)
    (here / "random.py").write_text(NETS)  # called as a module of the standard library is
    for address in ("nets.py:build", str(here / "nets.py:build"), "nets_of_this_test:build", "random.py:build"):
        assert isinstance(load_model(address), nn.Conv2d)
    assert isinstance(load_model("nets.py:ready"), nn.Flatten)
    assert find_object("nets.py:ready") is find_object(f"{here}/nets.py:ready")
    assert load_model("nets.py:build", dtype=torch.bfloat16, device="cpu").weight.dtype == torch.bfloat16


@pytest.mark.parametrize("address", ["{}.py:build", "{}:build"])
def test_a_model_may_import_its_neighbours_when_it_is_made_and_when_it_is_called(here, monkeypatch, address):
    """The module is loaded by then, and another directory may be the current one."""
    name = f"late_{'file' if '.py' in address else 'module'}"
    source = f"""
import torch
from torch import nn

def build():
    from made_{name} import width

    class Late(nn.Module):
        def forward(self, x):
            from called_{name} import factor
            return factor * x[:, :width]

    return Late()
"""
    (here / f"{name}.py").write_text(source)
    (here / f"made_{name}.py").write_text("width = 2")
    (here / f"called_{name}.py").write_text("factor = 3")
    model = load_model(address.format(name))
    (here / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert torch.equal(model(torch.ones(1, 5)), torch.full((1, 2), 3.0))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nets.py", "'nets.py' names no object: write MODULE:NAME"),
        ("nets.py:bild", "no object in nets.py 'bild'; did you mean 'build'"),
        ("net.py:build", "no file 'net.py'; did you mean 'nets.py'"),
        ("no_such_module:build", "importing no_such_module failed with ModuleNotFoundError: No module named"),
        ("nets.py:broken", "the factory nets.py:broken failed with RuntimeError: no such backbone"),
        ("nets.py:wrong", r"nets.py:wrong\(\) returned a str, not a torch.nn.Module"),
        ("nets.py:number", "nets.py:number is of type int, neither"),
        ("parses.py:build", "running parses.py failed with SystemExit: 2"),
    ],
)
def test_a_model_that_is_not_there(here, address, message):
    (here / "parses.py").write_text("import sys\nsys.exit(2)")
    with pytest.raises(MulticamError, match=message):
        load_model(address)


def test_a_device_that_is_not_there():
    with pytest.raises(MulticamError, match="moving the model failed with"):
        load_model("nets.py:build", device="gpu")


# weights


@pytest.mark.parametrize(
    "nested",
    [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}],
    ids=["flat", "lit", "model"],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_loaded_from_the_usual_checkpoints(nested, prefix):
    source, model = load_model("nets.py:build"), load_model("nets.py:build")
    torch.save(nested({prefix + name: value for name, value in source.state_dict().items()}), "best.pth")
    load_weights(model, "best.pth")
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_weights_are_loaded_from_safetensors():
    source = load_model("nets.py:build")
    save_file(source.state_dict(), "best.safetensors")
    assert torch.equal(load_model("nets.py:build", "best.safetensors").weight, source.weight)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"wieght": torch.ones(4), "bias": torch.ones(4)}, "fit Conv2d: 1 missing: weight; 1 unexpected: wieght"),
        ({"weight": torch.ones(4, 3, 5, 5), "bias": torch.ones(4)}, r"weight \(4, 3, 5, 5\) for \(4, 3, 3, 3\)"),
        ({f"layer{i}": torch.ones(1) for i in range(9)}, "9 unexpected: layer0, .*, layer5 and 3 more"),
        ({0: torch.ones(4)}, "2 missing: weight, bias; 1 unexpected: 0"),
        ([torch.ones(1)], "holds a list, not the state_dict"),
        (
            {"weight": torch.ones(4, 3, 3, 3, device="meta"), "bias": torch.ones(4)},
            "1 of another kind: weight meta for strided",
        ),
        ({"weight": torch.ones(4, 3, 3, 3).to_sparse(), "bias": torch.ones(4)}, "weight sparse_coo for strided"),
        ({"weight": torch.ones(4, 3, 3, 3) + 1j, "bias": torch.ones(4)}, "weight complex for strided"),
        ({"weight": [1.0], "bias": torch.ones(4)}, "weight list for strided"),
        (
            nn.Linear(2, 2),
            r"best.pt holds pickled objects, and reading these could run any code: .*model.state_dict\(\)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*sparse")
def test_weights_that_do_not_fit(state, message):
    torch.save(state, "best.pt")
    model = load_model("nets.py:build")
    before = model.weight.clone()
    with pytest.raises(MulticamError, match=message):
        load_weights(model, "best.pt")
    assert torch.equal(model.weight, before)


def test_weights_of_another_kind():
    with pytest.raises(MulticamError, match=r"no file that can be read here; these can: \.pt, \.pth, \.safetensors"):
        load_weights(nn.Flatten(), "best.npz")


# images


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "bmp", "webp", "tif"])
def test_pictures_are_rgb_between_0_and_1_as_pillow_reads_them(suffix):
    path = f"rgb.{suffix}"
    Image.fromarray(pixels(8, 6, 3)).save(path)
    expected = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    x = read_image(path)
    assert x.dtype == torch.float32
    assert torch.equal(x, expected.permute(2, 0, 1)[None] / 255)


def test_pictures_with_one_channel():
    grey, deep = pixels(8, 6), pixels(8, 6, high=60000, dtype=np.uint16)
    Image.fromarray(grey).save("grey.png")
    Image.fromarray(deep).save("deep.png")
    Image.fromarray(deep / np.float32(7)).save("metres.tif")
    assert torch.equal(read_image("grey.png"), torch.from_numpy(grey / np.float32(255)).expand(1, 3, 8, 6))
    assert torch.equal(read_image("grey.png:grey"), torch.from_numpy(grey / np.float32(255))[None, None])
    assert torch.equal(read_image("deep.png:raw"), torch.from_numpy(deep.astype(np.float32))[None, None])
    assert torch.equal(read_image("metres.tif"), torch.from_numpy(deep / np.float32(7))[None, None])


def test_alpha_is_left_out_and_photos_are_upright():
    rgba = pixels(8, 6, 4)
    Image.fromarray(rgba).save("alpha.png")
    assert torch.equal(read_image("alpha.png")[0] * 255, torch.from_numpy(rgba[..., :3]).permute(2, 0, 1).float())
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels(8, 6, 3)).save("turned.jpg", exif=turned)
    assert read_image("turned.jpg").shape == (1, 3, 6, 8)


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ((8, 6), (1, 1, 8, 6)),
        ((8, 6, 3), (1, 3, 8, 6)),
        ((8, 6, 1), (1, 1, 8, 6)),
        ((3, 8, 6), (1, 3, 8, 6)),
        ((12, 8, 6), (1, 12, 8, 6)),
        ((5, 6, 3), (1, 3, 5, 6)),
        ((4, 6, 3), (1, 4, 6, 3)),
        ((8, 6, 4), (1, 8, 6, 4)),
        ((2, 3, 8, 6), (2, 3, 8, 6)),
        ((2, 3, 4, 8, 6), (2, 3, 4, 8, 6)),
    ],
)
def test_arrays_get_a_batch_axis(stored, read):
    array = np.random.default_rng(0).random(stored)
    np.save("x.npy", array)
    x = read_image("x.npy")
    assert x.shape == read
    last = array.ndim == 3 and read[1:] != stored
    values = np.moveaxis(array, -1, 0) if last else array
    assert torch.equal(x.flatten(), torch.from_numpy(values.astype(np.float32)).flatten())


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((2, 2), 51, np.uint8), 0.2),
        (np.full((2, 2), 1500, np.uint16), 1500.0),
        (np.full((2, 2), 1500, ">i4"), 1500.0),
        (np.full((2, 2), True), 1.0),
        (np.full((2, 2), 1 + 2j), 1 + 2j),
    ],
)
def test_only_8_bit_values_are_scaled(array, expected):
    np.save("x.npy", array)
    x = read_image("x.npy")
    assert x.dtype == (torch.complex64 if isinstance(expected, complex) else torch.float32)
    assert torch.equal(x, torch.full((1, 1, 2, 2), expected))
    assert read_image("x.npy", torch.float64).dtype in (torch.float64, torch.complex128)


@pytest.mark.parametrize("suffix", ["npz", "pt", "safetensors"])
def test_files_with_several_arrays(suffix):
    arrays = {"depth.map": torch.rand(1, 8, 6), "rgb": torch.rand(3, 8, 6)}
    save = {
        "npz": lambda p, a: np.savez(p, **a),
        "pt": lambda p, a: torch.save(a, p),
        "safetensors": lambda p, a: save_file(a, p),
    }
    save[suffix](f"x.{suffix}", arrays)
    assert torch.equal(read_image(f"x.{suffix}:depth.map"), arrays["depth.map"][None])
    with pytest.raises(MulticamError, match=r"holds 2 arrays; say which one with .*:KEY, KEY being one of: .*rgb"):
        read_image(f"x.{suffix}")
    with pytest.raises(MulticamError, match=r"no array in .* 'rbg'; did you mean 'rgb'"):
        read_image(f"x.{suffix}:rbg")
    save[suffix](f"one.{suffix}", {"rgb": arrays["rgb"]})
    assert torch.equal(read_image(f"one.{suffix}"), arrays["rgb"][None])


def test_a_file_with_one_tensor():
    torch.save(torch.ones(3, 8, 6, dtype=torch.float64), "x.pt")
    assert torch.equal(read_image("x.pt"), torch.ones(1, 3, 8, 6))
    with pytest.raises(MulticamError, match="holds one array without a name; leave out :rgb"):
        read_image("x.pt:rgb")


@pytest.mark.filterwarnings("ignore:.*(beta|prototype|sparse|TypedStorage|quantized|deprecated)")
@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (lambda x: {"rgb": x.to("meta")}, "the array in x.pt is on the meta device and has no values"),
        (torch.Tensor.to_sparse, r"the array in x.pt is sparse \(sparse_coo\): give x.to_dense\(\)"),
        (lambda x: x[0, 0].to_sparse_csr(), "the array in x.pt is sparse"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "the array in x.pt is quantised"),
        (lambda x: torch.nested.nested_tensor(list(x)), "the array in x.pt is a nested tensor"),
        (lambda x: x.numpy(), "x.pt holds pickled objects, and reading these could run any code"),
        (lambda x: nn.Linear(2, 2), "x.pt holds pickled objects"),
        (lambda x: "text", "x.pt holds no array, but a str"),
        (lambda x: x.tolist(), "x.pt holds no array, but a list"),
    ],
    ids=range(9),
)
def test_what_is_no_plain_tensor_is_refused(stored, message):
    torch.save(stored(torch.rand(2, 3, 4, 4)), "x.pt")
    for read in (read_image, read_array, lambda file: read_value(f"@{file}")):
        with pytest.raises(MulticamError, match=message):
            read("x.pt")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("rbg.png", "no file 'rbg.png'; did you mean 'rgb.png'"),
        ("data/rgb.png", "no file 'data/rgb.png': there is no directory 'data'"),
        ("rgb.gif", r"'rgb.gif' is no file that can be read here; these can: \.png, .*\.npy, .*\.safetensors"),
        ("rgb.png:red", r"as rgb.png:grey \(one channel\) or as rgb.png:raw .*, not as rgb.png:red"),
        ("text.png", "text.png cannot be read as a picture"),
        ("empty.png", "empty.png cannot be read as a picture"),
        ("text.npy", "reading text.npy failed with"),
        ("text.safetensors", "reading text.safetensors failed with"),
        ("objects.npy", "reading objects.npy failed with ValueError: Object arrays cannot be loaded"),
        ("words.npy", "reading words.npy failed with TypeError"),
        ("line.npy", r"line.npy has the shape \(5,\), which is no image; --value NAME=@line.npy"),
    ],
)
def test_a_file_that_cannot_be_read(here, file, message):
    Image.fromarray(pixels(8, 6, 3)).save("rgb.png")
    for name in ("text.png", "text.npy", "text.safetensors"):
        (here / name).write_text("no image at all")
    (here / "empty.png").touch()
    np.save("objects.npy", np.array([{}]))
    np.save("words.npy", np.array([["a", "b"]]))
    np.save("line.npy", np.arange(5))
    with pytest.raises(MulticamError, match=message):
        read_image(file)


# whole calls


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("-0.5", -0.5), ("[1, 2]", [1, 2]), ("True", True), ("none", None), ("a, b", "a, b"), ("'3'", "3")],
)
def test_values_are_literals_or_strings(text, value):
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)


def test_an_array_as_it_is_stored():
    np.save("ids.npy", np.array([[3, 1]]))
    assert torch.equal(read_value("@ids.npy"), torch.tensor([[3, 1]]))
    assert torch.equal(read_array("ids.npy"), torch.tensor([[3, 1]]))


def test_files_of_one_name_are_samples():
    first, second = (pixels(8, 6, 3, seed=seed) for seed in (1, 2))
    cv2.imwrite("a.png", first)
    cv2.imwrite("b.png", second)
    call = load_inputs(nn.Flatten(), [("rgb", "a.png"), ("rgb", "b.png")], [("scale", "2")])
    assert list(call.kwargs) == ["rgb", "scale"]
    assert torch.equal(call.kwargs["rgb"], torch.cat([read_image("a.png"), read_image("b.png")]))
    np.save("c.npy", np.ones((3, 4, 4)))
    with pytest.raises(MulticamError, match=r"'rgb' must have one shape, .*'c.npy': \(3, 4, 4\)"):
        load_inputs(nn.Flatten(), [("rgb", "a.png"), ("rgb", "c.npy")])
    with pytest.raises(MulticamError, match="the argument 'rgb' is given twice"):
        load_inputs(nn.Flatten(), [("rgb", "a.png")], [("rgb", "2")])


def test_images_follow_the_model_and_values_do_not():
    np.save("x.npy", np.ones((3, 8, 6)))
    model = nn.Conv2d(3, 4, 3).to(torch.bfloat16)
    call = load_inputs(model, [("rgb", "x.npy")], [("prior", "@x.npy")])
    assert call.kwargs["rgb"].dtype == torch.bfloat16
    assert call.kwargs["prior"].dtype == torch.float64


def test_preprocessing_has_the_last_word(here):
    np.save("x.npy", np.ones((3, 8, 6)))
    given = [("rgb", "x.npy")]
    call = load_inputs(nn.Flatten(), given, [("scale", "3")], "nets.py:halved")
    assert torch.equal(call.kwargs["rgb"], torch.full((1, 3, 8, 6), 0.5))
    assert call.kwargs["scale"] == 1.5
    (here / "shapes.py").write_text(
        "from multicam import Inputs\n"
        "def positional(given): return tuple(given.values())\n"
        "def batch(given): return Inputs(dict(given))\n"
    )
    assert load_inputs(nn.Flatten(), given, preprocess="shapes.py:positional").args[0].shape == (1, 3, 8, 6)
    assert list(load_inputs(nn.Flatten(), given, preprocess="shapes.py:batch").leaves) == ["0.rgb"]
    with pytest.raises(MulticamError, match=r"the preprocessing nets.py:failing failed with KeyError: 'rbg'"):
        load_inputs(nn.Flatten(), given, preprocess="nets.py:failing")
