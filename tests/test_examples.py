"""Every example runs, prints its numbers and draws its picture."""

import gzip
import importlib.util
import json
import pathlib
import re
import runpy
import socket
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

EXAMPLES = sorted((pathlib.Path(__file__).parent.parent / "examples").glob("*.py"))
EXAMPLES = [example for example in EXAMPLES if example.stem != "multi_worker"]  # test_multi_worker.py runs it
NEEDS = {
    "irregular_series": "aeon",
    "japanese_vowels": "aeon",
    "hopper": "dm_control",
    "latent_hopper": "dm_control",
    "mnist_1d": "mnist1d",
    "regularized_depth": "mnist1d",
}


def parameters():
    """The examples, with those left out whose data are in a package that is not installed."""
    for example in EXAMPLES:
        package = NEEDS.get(example.stem)
        missing = package is not None and importlib.util.find_spec(package) is None
        mark = pytest.mark.skipif(missing, reason=f"the data of {example.name} need {package}")
        yield pytest.param(example, id=example.stem, marks=mark)


def example(name, monkeypatch):
    """The names that an example defines. It may import from the examples beside it."""
    monkeypatch.syspath_prepend(str(EXAMPLES[0].parent))
    return runpy.run_path(str(EXAMPLES[0].parent / f"{name}.py"))


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
    load = example("regularized_depth", monkeypatch)["load"]

    def refuse(*args, **kwargs):
        raise AssertionError("an example must not download anything")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    x, x_test, labels, labels_test = load("MNIST-1D", validate=False)
    assert x.shape == (4000, 40) and x_test.shape == (1000, 40)
    assert set(labels) == set(labels_test) == set(range(10))
    np.testing.assert_array_equal(load("MNIST-1D", validate=False)[0], x)


@pytest.mark.filterwarnings("default")
def test_the_networks_for_images_have_the_sizes_of_the_paper(monkeypatch):
    names = example("image_digits", monkeypatch)
    # Counted by hand from the layers of the authors' example: 3x3 and 4x4 convolutions of 64 channels, with biases
    # except in residual blocks; group normalizations; the time as a 65th channel.
    stem = 9 * 64 + 64 + 2 * (16 * 64 * 64 + 64) + 2 * 128
    head = 128 + 64 * 10 + 10
    sizes = {kind: names["network"](kind, 64).count_params() for kind in names["KINDS"]}
    assert sizes == {
        "residual, 6 blocks": stem + 6 * (2 * 9 * 64 * 64 + 2 * 128) + head,
        "residual, 1 block": stem + 2 * 9 * 64 * 64 + 2 * 128 + head,
        "continuous": stem + 2 * (9 * 65 * 64 + 64) + 3 * 128 + head,
    }
    assert round(sizes["continuous"] / 1e6, 1) == 0.2 and round(sizes["residual, 6 blocks"] / 1e6, 1) == 0.6


@pytest.mark.filterwarnings("default")
def test_the_readers_of_digits_and_clothes_return_what_is_in_the_files(monkeypatch, tmp_path):
    names = example("image_digits", monkeypatch)
    # Rank 3 of bytes, with the shape (2, 1, 3).
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (2, 1, 3))
    (tmp_path / "file.gz").write_bytes(gzip.compress(header + bytes([1, 2, 3, 4, 5, 255])))
    assert names["read_idx"](tmp_path / "file.gz").tolist() == [[[1, 2, 3]], [[4, 5, 255]]]

    for digit in range(10):
        pixels = [digit / 10] * 784 + [0.0] * 784
        (tmp_path / f"{digit}.json").write_text(json.dumps({"data": pixels[: 784 * (1 + digit % 2)]}))
    pictures, labels = names["load_mnist"](tmp_path)
    assert pictures.shape == (15, 28, 28, 1)
    np.testing.assert_array_equal(labels, [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9])
    np.testing.assert_allclose(pictures[:, 0, 0, 0][labels == 7], [0.7, 0.0])


@pytest.mark.filterwarnings("default")
def test_balls_and_shells_have_the_radii_and_values_of_the_paper(monkeypatch):
    points, values = example("augmented_spheres", monkeypatch)["ball_and_shell"](np.random.default_rng(0), 10, 300, 600)
    radii = np.linalg.norm(points, axis=1)
    assert points.shape == (900, 10) and values.shape == (900, 1)
    assert np.all(values[:300] == -1) and np.all(values[300:] == 1)
    assert radii[:300].max() < 0.5 and radii[300:].min() > 1 and radii[300:].max() < 1.5
    # u ** (1 / 10) has the median 0.933.
    assert np.median(radii[:300]) == pytest.approx(0.5 * 0.933, abs=0.01)
    assert np.median(radii[300:]) == pytest.approx(1 + 0.5 * 0.933, abs=0.01)


@pytest.mark.filterwarnings("default")
def test_dropped_values_are_marked_and_their_last_values_are_those_before(monkeypatch):
    names = example("irregular_series", monkeypatch)
    rng = np.random.default_rng(0)
    whole = 3 + 5 * rng.normal(size=(30, 12, 2))
    series = names["drop"](whole, 0.6, rng)
    seen = ~np.isnan(series)
    assert 0.3 < seen.mean() < 0.5 and np.all(seen.any(axis=1))
    np.testing.assert_array_equal(series[seen], whole[seen])
    # More can be dropped, another share of each series, but never the last value of a channel.
    fewer = names["drop"](series, np.linspace(0, 1, 30)[:, None, None], rng)
    np.testing.assert_array_equal(fewer[0], series[0])
    assert not np.any(~np.isnan(fewer) & ~seen) and np.all((~np.isnan(fewer)).any(axis=1))
    first, second = names["scaled"]([series, whole])
    np.testing.assert_allclose([np.nanmean(first, (0, 1)), np.nanvar(first, (0, 1))], [[0, 0], [1, 1]], atol=1e-6)
    np.testing.assert_allclose(second[seen], first[seen])

    values, times, marks, before, since = names["inputs"](first)
    np.testing.assert_allclose(times, np.tile(np.arange(12) / 4, (30, 1)))
    np.testing.assert_array_equal(marks, seen)
    np.testing.assert_allclose(values, np.where(seen, first, 0), rtol=1e-6)
    for n, channel in np.ndindex(3, 2):
        last, at = 0.0, 0
        for i in range(12):
            assert before[n, i, channel] == last and since[n, i, channel] == i - at
            if marks[n, i, channel]:
                last, at = values[n, i, channel], i


@pytest.mark.filterwarnings("default")
def test_the_hopper_is_predicted_from_what_was_observed_before(monkeypatch):
    names = example("hopper", monkeypatch)
    task = names["TASKS"]["extrapolation"]
    rng = np.random.default_rng(0)
    falls = rng.normal(size=(3, 200, 14))
    seen = names["observed"](3, task, [0.1, 0.5, 0.02], rng)
    np.testing.assert_array_equal(seen.sum(axis=1), [7, 33, 1])
    assert not seen[:, 66:].any()
    values, waits = names["hide"](falls, seen)
    guesses = names["repeat"](falls, seen, np.full(14, 9.0))
    for n in range(3):
        last, at = np.full(14, 9.0), 0
        for i in range(200):
            np.testing.assert_allclose(waits[n, i, 0], 0.03 * (i - at), rtol=1e-5)
            if i:
                np.testing.assert_array_equal(guesses[n, i - 1], last)
            expected = np.append(falls[n, i], np.ones(14)) if seen[n, i] else np.zeros(28)
            np.testing.assert_allclose(values[n, i], expected, rtol=1e-6)
            if seen[n, i]:
                last, at = falls[n, i], i
    # The encoder of the other example reads the same observations, one after the other.
    others = example("latent_hopper", monkeypatch)
    times, observations, mask = others["show"](falls, seen, 33)
    lines = others["lines"](falls, seen)
    for n in range(3):
        (moments,) = np.nonzero(seen[n])
        count = len(moments)
        assert mask[n, :count].all() and not mask[n, count:].any() and not observations[n, count:].any()
        np.testing.assert_allclose(times[n, :count], 0.03 * moments, rtol=1e-6)
        np.testing.assert_array_equal(observations[n, :count], falls[n, moments])
        np.testing.assert_allclose(lines[n, moments], falls[n, moments])
        np.testing.assert_array_equal(lines[n, moments[-1] :], np.tile(falls[n, moments[-1]], (200 - moments[-1], 1)))
        if count > 1:
            between = (moments[0] + moments[1]) // 2
            share = (between - moments[0]) / (moments[1] - moments[0])
            expected = (1 - share) * falls[n, moments[0]] + share * falls[n, moments[1]]
            np.testing.assert_allclose(lines[n, between], expected)
    # Only what is never observed counts, and the first prediction is that of the second moment.
    off = falls[:, 1:] + np.where(np.arange(1, 200) < 66, 5.0, 0.1)[:, None]
    np.testing.assert_allclose(names["error"](off, falls, task), 1.0)
    np.testing.assert_allclose(others["error"](np.concatenate([falls[:, :1], off], axis=1), falls, task), 1.0)


@pytest.mark.filterwarnings("default")
def test_the_cell_of_gru_d_is_a_gru_of_decayed_values_and_states(monkeypatch):
    cell = example("irregular_series", monkeypatch)["GRUDCell"](3)
    cell.build((None, 4))
    cell.rate.assign([0.5])
    cell.decay_of_state.set_weights([np.array([[0.1, 0.0, 0.3]]), np.array([0.0, 0.2, -0.1])])
    h = np.array([[0.4, -0.2, 0.6], [0.1, 0.5, -0.3]], "float32")
    # A value that was observed, and one that was not: two before, with the value 1.5.
    inputs = np.array([[0.7, 1, 9.0, 1.0], [0.0, 0, 1.5, 2.0]], "float32")
    output, _ = cell(inputs, [h])
    decayed = h * np.exp(-np.array([[0.1, 0.2, 0.2], [0.2, 0.2, 0.5]]))
    expected, _ = cell.cell(np.array([[0.7, 1], [1.5 * np.exp(-1), 0]], "float32"), [decayed.astype("float32")])
    np.testing.assert_allclose(output, expected, rtol=1e-5)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("channels", [1, 6])
def test_every_decay_of_gru_d_gets_a_gradient(channels, monkeypatch):
    names = example("irregular_series", monkeypatch)
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    inputs = names["inputs"](names["drop"](rng.normal(size=(20, 12, channels)), 0.5, rng))
    model = names["classifier"]("GRU-D", 12, channels, 2)
    (cell,) = (layer.cell for layer in model.layers if isinstance(layer, keras.layers.RNN))
    weights = [cell.rate, cell.bias, *cell.decay_of_state.trainable_variables]
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(inputs) ** 2)
    for gradient in tape.gradient(loss, [weight.value for weight in weights]):
        assert np.all(np.asarray(gradient) != 0)
