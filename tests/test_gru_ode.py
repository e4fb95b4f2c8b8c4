"""The field of GRU-ODE: its formula, its bound, and its life as a layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_node import ODERNN, GRUODEField, ODELayer

UNITS = 4


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


@pytest.mark.parametrize("use_bias", [True, False])
def test_it_is_the_continuous_gated_recurrent_unit(use_bias):
    field = GRUODEField(use_bias=use_bias, kernel_initializer="normal", bias_initializer="normal")
    h = np.random.uniform(-1, 1, (3, UNITS)).astype("float32")
    dh = field(h)
    kernel, *bias = (np.asarray(w) for w in field.weights)
    u_r, u_z, u_n = np.split(kernel, 3, axis=1)
    b_r, b_z, b_n = np.split(bias[0], 3) if use_bias else np.zeros((3, UNITS))

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    r, z = sigmoid(h @ u_r + b_r), sigmoid(h @ u_z + b_z)
    np.testing.assert_allclose(dh, (1 - z) * (np.tanh((r * h) @ u_n + b_n) - h), atol=1e-6)


def test_it_is_a_gru_cell_without_input_as_a_rate_of_change():
    cell, field = layers.GRUCell(UNITS, reset_after=False), GRUODEField()
    h = tf.random.uniform((3, UNITS), -1, 1)
    cell.build((3, 1))
    field.build((3, UNITS))
    u_z, u_r, u_n = np.split(np.asarray(cell.recurrent_kernel), 3, axis=1)
    field.kernel.assign(np.concatenate([u_r, u_z, u_n], axis=1))
    new, _ = cell(tf.zeros((3, 1)), [h])
    np.testing.assert_allclose(field(h), new - h, atol=1e-6)


def test_its_state_stays_between_minus_one_and_one():
    field = GRUODEField(kernel_initializer=keras.initializers.RandomNormal(stddev=3.0))
    h = keras.random.uniform((8, UNITS), -1.0, 1.0)
    path = ODELayer(field)(h, ts=[0.0, 1.0, 10.0, 100.0])
    assert np.max(np.abs(path)) <= 1
    assert np.max(np.abs(path[:, -1] - h)) > 0.5


def test_it_moves_the_state_of_a_recurrent_layer_and_is_saved_with_it(tmp_path):
    inputs = [keras.Input((None, 2)), keras.Input((None,))]
    layer = ODERNN(layers.GRUCell(UNITS), GRUODEField(use_bias=False, kernel_initializer="he_normal"))
    model = keras.Model(inputs, layer(*inputs))
    data = [np.random.normal(size=(2, 3, 2)).astype("float32"), np.array([[0, 1, 3], [1, 2, 9.0]], "float32")]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(data), model(data))
    fields = [m.layers[-1].cell.vector_field for m in (loaded, model)]
    assert fields[0].get_config() == fields[1].get_config()
