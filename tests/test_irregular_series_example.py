"""GRU-D of examples/irregular_series.py learns all that it has."""

import pathlib
import runpy

import keras
import numpy as np
import pytest

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "irregular_series.py"


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the gradients are taken with TensorFlow")
@pytest.mark.parametrize("channels", [1, 6])
def test_every_decay_of_gru_d_gets_a_gradient(channels):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    tf = pytest.importorskip("tensorflow")
    example = runpy.run_path(str(EXAMPLE))
    keras.utils.set_random_seed(0)
    series = np.random.default_rng(0).normal(size=(20, 12, channels)).astype("float32")
    inputs = example["drop"](series, 0.5, np.random.default_rng(1))
    model = example["classifier"]("GRU-D", 12, channels, 2)
    (cell,) = (layer.cell for layer in model.layers if isinstance(layer, keras.layers.RNN))
    weights = [cell.rate, cell.bias, *cell.decay_of_state.trainable_variables]
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(inputs) ** 2)
    for gradient in tape.gradient(loss, [weight.value for weight in weights]):
        assert np.all(np.asarray(gradient) != 0)
