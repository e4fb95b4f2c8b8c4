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


MODELS = {"ode_layer": ode_layer, "ode_rnn": ode_rnn, "fields": fields}


def inputs(model):
    """Numbers that need not be saved."""
    shapes = [(2, *x.shape[1:]) for x in model.inputs]
    values = [np.sin(np.arange(np.prod(shape))).reshape(shape).astype("float32") for shape in shapes]
    return values[0] if len(values) == 1 else [values[0], np.cumsum(values[1] ** 2, axis=1)]


def outputs(model):
    return model.predict(inputs(model), verbose=0)


@pytest.mark.filterwarnings("ignore:.* is now called:DeprecationWarning")
@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.keras")), ids=lambda path: path.stem)
def test_a_saved_model_loads_and_gives_what_it_gave(path):
    model = keras.models.load_model(path)
    np.testing.assert_allclose(outputs(model), np.load(path.with_suffix(".npy")), atol=1e-5)
    (new,) = (make() for name, make in MODELS.items() if path.stem.startswith(name))
    solve = next(layer for layer in model.layers if isinstance(layer, keras_node.ODELayer | keras_node.ODERNN))
    made = next(layer for layer in new.layers if isinstance(layer, type(solve)))
    for name in ("solver", "gradient"):
        assert solve.get_config()[name] == made.get_config()[name]


def test_there_are_saved_models_of_this_version():
    assert {f"{name}_{keras_node.__version__}" for name in MODELS} <= {path.stem for path in FIXTURES.glob("*.keras")}


if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    for name, make in MODELS.items():
        keras.utils.set_random_seed(0)
        model = make()
        path = FIXTURES / f"{name}_{keras_node.__version__}.keras"
        model.save(path)
        np.save(path.with_suffix(".npy"), outputs(model))
