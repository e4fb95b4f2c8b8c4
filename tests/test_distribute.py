"""Ways to run `fit`: several devices, `tf.data`, several steps an execution; all train to the same losses."""

import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node


@pytest.fixture(scope="module")
def on_one_and_two():
    script = pathlib.Path(__file__).with_name("two_devices.py")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_two_devices_train_like_one(on_one_and_two):
    one, two = on_one_and_two["layers"]
    np.testing.assert_allclose(two, one, rtol=1e-6)
    assert one[1] < one[0]


@pytest.mark.parametrize("kind", ["flow", "latent_ode", "flow_matching", "dynamics"])
def test_likelihoods_train_like_on_one_device_also_in_partial_batches(kind, on_one_and_two):
    """Losses, measures and weights, with sample weights, regularizers and energies."""
    one, two = on_one_and_two[kind]
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)
    assert np.all(np.isfinite(one))


def test_replicas_draw_their_own_noise_for_flow_matching(on_one_and_two):
    draws = np.array(on_one_and_two["noise"])
    assert draws.shape == (4, 20) and np.unique(draws).size == draws.size
    assert 0.3 < np.mean(draws) < 2


@pytest.mark.parametrize("kind", ["ODELayer", "ODERNN"])
def test_tf_data_and_several_steps_an_execution_change_nothing(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5, 4)).astype("float32")
    times = np.cumsum(rng.uniform(size=(40, 5)), 1).astype("float32")
    y = x[:, -1]

    def fit(*data, steps=1):
        keras.utils.set_random_seed(0)
        inputs = [keras.Input((5, 4)), keras.Input((5,))]
        field = keras.layers.Dense(4, "tanh")
        options = {"solver": keras_node.RungeKutta("heun", num_steps=2), "jit_compile": False}
        if kind == "ODELayer":
            h = keras_node.ODELayer(field, **options)(inputs[0][:, -1])
        else:
            h = keras_node.ODERNN(keras.layers.GRUCell(4), field, **options)(*inputs)
        model = keras.Model(inputs, h)
        model.compile("adam", "mse", jit_compile=False, steps_per_execution=steps)
        return model.fit(*data, epochs=2, shuffle=False, verbose=0).history["loss"]

    # Forty are five batches: the last of three steps at once finds two.
    expected = fit([x, times], y, 8)
    dataset = tf.data.Dataset.from_tensor_slices(((x, times), y)).batch(8).prefetch(2)
    np.testing.assert_allclose(fit(dataset), expected, rtol=1e-6)
    np.testing.assert_allclose(fit(dataset, steps=3), expected, rtol=1e-6)
    assert expected[1] < expected[0]
