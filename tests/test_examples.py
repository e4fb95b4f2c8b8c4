"""Every example runs, prints its numbers and draws its picture."""

import importlib.util
import pathlib
import re
import runpy
import socket
import sys

import keras
import numpy as np
import pytest

EXAMPLES = sorted((pathlib.Path(__file__).parent.parent / "examples").glob("*.py"))
EXAMPLES = [example for example in EXAMPLES if example.stem != "multi_worker"]  # test_multi_worker.py runs it
NEEDS = {
    "japanese_vowels": "aeon",
    "hopper": "dm_control",
    "latent_hopper": "dm_control",
    "regularized_depth": "mnist1d",
}


def parameters():
    """The examples, with those left out whose data are in a package that is not installed."""
    for example in EXAMPLES:
        package = NEEDS.get(example.stem)
        missing = package is not None and importlib.util.find_spec(package) is None
        mark = pytest.mark.skipif(missing, reason=f"the data of {example.name} need {package}")
        yield pytest.param(example, id=example.stem, marks=mark)


@pytest.fixture(autouse=True)
def as_before():
    """Leaves no figure open and Keras as it was: an example may set the dtype policy and names many layers."""
    plt = pytest.importorskip("matplotlib.pyplot")
    policy, backend = keras.config.dtype_policy(), plt.get_backend()
    yield
    plt.close("all")
    plt.switch_backend(backend)
    keras.config.set_dtype_policy(policy)
    keras.utils.clear_session()


# A script of its own may warn; what pytest makes of warnings is about the package.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("example", list(parameters()))
def test_an_example_prints_its_numbers_and_draws_its_picture(example, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "picture.png"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    # As with `python example.py`, the directory of the script is where its imports are looked for first.
    monkeypatch.syspath_prepend(str(example.parent))
    monkeypatch.setattr(sys, "argv", [str(example), "--quick", "--out", str(picture)])
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert str(picture) in printed
    # The path of the picture has digits as well.
    assert re.search(r"\d\.\d", printed.replace(str(picture), ""))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


@pytest.mark.filterwarnings("default")
def test_the_signals_of_mnist1d_are_generated_without_a_network(monkeypatch):
    pytest.importorskip("mnist1d")
    load = runpy.run_path(str(EXAMPLES[0].parent / "regularized_depth.py"))["load"]

    def refuse(*args, **kwargs):
        raise AssertionError("an example must not download anything")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    x, x_test, labels, labels_test = load("MNIST-1D", validate=False)
    assert x.shape == (4000, 40) and x_test.shape == (1000, 40)
    assert set(labels) == set(labels_test) == set(range(10))
    np.testing.assert_array_equal(load("MNIST-1D", validate=False)[0], x)
