"""The parts of the example latent_spirals that can be checked without training."""

import importlib.util
import pathlib

import keras
import numpy as np
import pytest

import keras_node

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "latent_spirals.py"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("latent_spirals_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_paths_are_pieces_of_the_two_spirals(example):
    paths = example.spirals(20, 2 * example.MOMENTS, np.random.default_rng(0))
    clockwise, counter = paths[::2] + np.array([5, 0]), paths[1::2] - np.array([5, 0])
    np.testing.assert_allclose(np.diff(np.linalg.norm(counter, axis=-1)), 0.3 * example.STEP, rtol=1e-6)
    np.testing.assert_allclose(np.diff(1 / np.linalg.norm(clockwise, axis=-1)), -example.STEP / 15, rtol=1e-6)


def test_observations_are_noisy_values_of_the_path_at_their_times(example):
    rng = np.random.default_rng(0)
    paths = example.spirals(300, example.MOMENTS, rng)
    times, values, mask = example.observe(paths, 30, rng)
    moments = np.rint(times / example.STEP).astype(int)
    error = values / example.SCALE - np.take_along_axis(paths, moments[..., None], axis=1)
    assert np.all(np.diff(moments) > 0) and mask.all()
    assert np.std(error) == pytest.approx(example.NOISE, rel=0.02)


def test_the_encoder_is_shown_a_part_and_the_target_is_everything(example):
    rng = np.random.default_rng(0)
    series = example.observe(example.spirals(200, example.MOMENTS, rng), 50, rng)
    (times, values, shown), target = example.partly_shown(*series)
    shown, last = np.asarray(shown), np.max(np.where(np.asarray(shown)[..., 0] > 0, times, 0), axis=1)
    np.testing.assert_array_equal(shown[..., 0], shown[..., 1])
    assert 0.3 < shown.mean() < 0.55  # each of the two keeps 65 % on average
    assert last.min() < 0.35 * example.TIMES[example.MOMENTS] and np.std(shown.mean(axis=(1, 2))) > 0.1
    for ours, given in zip((times, values, *target), (*series[:2], *series), strict=True):
        np.testing.assert_array_equal(ours, given)


def test_seven_steps_are_as_good_as_an_exact_solve(example):
    keras.utils.set_random_seed(0)
    model = example.latent_ode()
    rng = np.random.default_rng(0)
    model(example.observe(example.spirals(4, example.MOMENTS, rng), 30, rng))
    exact = keras_node.RungeKutta("dopri8", rtol=1e-7, atol=1e-7)
    start = keras.random.normal((4, example.LATENT_DIM))
    path = keras_node.odeint(model.dynamics.vector_field, start, example.TIMES, solver=example.SOLVER).ys
    exact = keras_node.odeint(model.dynamics.vector_field, start, example.TIMES, solver=exact).ys
    assert 7 * example.SOLVER.step_size > example.TIMES[example.MOMENTS - 1]
    np.testing.assert_allclose(path, exact, atol=2e-3)
