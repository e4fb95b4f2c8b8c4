"""Files saved by earlier versions keep loading, and give what they gave.

`tests/fixtures/` holds models and their outputs, written by `python tests/test_saved_files.py` when their version was
current. A new version adds files of its own and leaves those that are there.
"""

import pathlib

import keras
import numpy as np
import pytest

import keras_node

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def field():
    return keras.Sequential([keras.layers.Dense(6, activation="tanh"), keras.layers.Dense(4)])


def ode_layer():
    solver = keras_node.RungeKutta("dopri5", rtol=1e-6, atol=1e-7, per_sample=True, step_at=[0.5])
    gradient = keras_node.BacksolveAdjoint(solver=keras_node.RungeKutta("bosh3"), norm="full")
    layer = keras_node.ODELayer(field(), t0=0.0, t1=2.0, solver=solver, gradient=gradient, augment_dims=1)
    return keras.Sequential([keras.Input((3,)), layer, keras.layers.Dense(2)])


def ode_rnn():
    x, times = keras.Input((5, 3)), keras.Input((5,))
    solver = keras_node.RungeKutta("rk4", num_steps=2)
    gradient = keras_node.CheckpointedAdjoint(num_checkpoints=7)
    cell = keras.layers.LSTMCell(4)
    layer = keras_node.ODERNN(cell, field(), solver=solver, gradient=gradient, return_sequences=True, track_stats=True)
    return keras.Model([x, times], layer(x, times))


def fields():
    """In the file of version 0.1.0 they have the names that they had then."""
    t, y = keras.Input((1,)), keras.Input((4,))
    x = keras_node.TimeConcatenationField(field())(t, y)
    acceleration = keras_node.TimeConcatenationField(keras.Sequential([keras.layers.Dense(2)]))
    x = keras_node.ODELayer(keras_node.SecondOrderField(acceleration), solver="rk4", track_stats=True)(x)
    energy = keras.Sequential([keras.layers.Dense(6, activation="tanh"), keras.layers.Dense(1)])
    return keras.Model([t, y], keras_node.ODELayer(keras_node.HamiltonianField(energy), solver="rk4")(x))


def cells():
    solver = keras_node.RungeKutta("bosh3", rtol=1e-4)
    field = keras_node.GRUODEField(bias_initializer="ones")
    first = keras_node.ODERNNCell(keras.layers.GRUCell(4), field, solver=solver, gradient="checkpointed")
    second = keras_node.ODERNNCell(
        keras.layers.SimpleRNNCell(3), Damped(), time_feature=False, interval=0.5, solver="rk4"
    )
    return keras.Sequential(
        [keras.Input((5, 3)), keras.layers.RNN(first, return_sequences=True), keras.layers.RNN(second)]
    )


@keras.saving.register_keras_serializable(package="tests")
class Damped(keras.layers.Layer):
    """A field of the time as well."""

    def build(self, t_shape, y_shape):
        self.dense = keras_node.ConcatSquash(y_shape[-1], activation="tanh")
        self.dense.build((None, 1), y_shape)

    def call(self, t, y):
        return self.dense(t + keras.ops.zeros_like(y[:, :1]), y)


def neural_cde():
    x, times = keras.Input((5, 2)), keras.Input((5,))
    layer = keras_node.NeuralCDE(3, interpolation="rectilinear", solver="rk4", return_sequences=True)
    return keras.Model([x, times], layer(x, times))


def flow():
    solver = keras_node.RungeKutta("dopri5", rtol=1e-5, atol=1e-5)
    flow = keras_node.ContinuousFlow(2, keras_node.ConcatSquashField((6,)), t1=0.5, solver=solver, kinetic_energy=0.1)
    flow.log_prob(np.zeros((1, 2), "float32"), np.zeros((1, 1), "float32"))
    return flow


def latent_ode():
    model = keras_node.LatentODE(2, units=5, noise_scale=0.2, t0=-1.0, gradient="checkpointed", solver="rk4")
    outputs(model)
    return model


MODELS = {"ode_layer": ode_layer, "ode_rnn": ode_rnn, "fields": fields, "cells": cells, "neural_cde": neural_cde}
MODELS |= {"flow": flow, "latent_ode": latent_ode}


def numbers(*shape):
    """Numbers that need not be saved."""
    return np.sin(np.arange(np.prod(shape))).reshape(shape).astype("float32")


def inputs(model):
    values = [numbers(2, *x.shape[1:]) for x in model.inputs]
    return values[0] if len(values) == 1 else [values[0], np.cumsum(values[1] ** 2, axis=1)]


def outputs(model):
    if isinstance(model, keras_node.ContinuousFlow):
        return model.log_prob(numbers(3, 2), numbers(3, 1)).numpy()
    if isinstance(model, keras_node.LatentODE):
        return model.reconstruct((np.cumsum(numbers(2, 5) ** 2, axis=1), numbers(2, 5, 3), np.ones((2, 5, 3), bool)))
    return model.predict(inputs(model), verbose=0)


def options(config):
    """Every solver and gradient in the config of a model, in its order. Files of old name the default gradient."""
    if isinstance(config, dict):
        if config.get("gradient") == keras.saving.serialize_keras_object(keras_node.BacksolveAdjoint()):
            config = {**config, "gradient": None}
        here = [config[name] for name in ("solver", "gradient") if name in config]
        return here + [found for value in config.values() for found in options(value)]
    return [found for value in config for found in options(value)] if isinstance(config, list | tuple) else []


@pytest.mark.filterwarnings("ignore:.* is now called:DeprecationWarning")
@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.keras")), ids=lambda path: path.stem)
def test_a_saved_model_loads_and_gives_what_it_gave(path):
    model = keras.models.load_model(path)
    np.testing.assert_allclose(outputs(model), np.load(path.with_suffix(".npy")), atol=1e-5)
    new = MODELS[path.stem.rsplit("_", 1)[0]]()
    assert options(new.get_config())
    assert options(model.get_config()) == options(new.get_config())


def test_there_are_saved_models_of_this_version():
    assert {f"{name}_{keras_node.__version__}" for name in MODELS} <= {path.stem for path in FIXTURES.glob("*.keras")}


if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    for name, make in MODELS.items():
        keras.utils.set_random_seed(0)
        model = make()
        path = FIXTURES / f"{name}_{keras_node.__version__}.keras"
        if path.exists():
            continue  # a file stays as it was written
        model.save(path)
        np.save(path.with_suffix(".npy"), outputs(model))
