from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("here")


def test_the_demo_is_called(run, monkeypatch):
    calls = []

    def answer(*args, **options):
        calls.append((args, options))
        return [Path("a.png"), Path("b.png")]

    monkeypatch.setattr("multicam.demo.pictures.write", answer)
    code, out, _ = run("demo", "--out", "x", "--image", "rgb.png")  # a progress bar goes to stderr
    assert (code, out) == (0, "a.png\nb.png\n")
    monkeypatch.setattr("multicam.demo.training.train_and_measure", lambda out: {"AUC": [0.5]})
    code, out, _ = run("demo", "--out", "x", "--train")
    assert code == 0
    assert "| AUC | 0.500 |" in out
    assert out.endswith(f"weights  {Path('x/demo.safetensors')}\n")
    assert calls == [((Path("x"), Path("rgb.png")), {})]
