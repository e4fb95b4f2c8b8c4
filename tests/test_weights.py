"""A built model has all its weights, a frozen layer stays frozen, also in a file, and an export knows its inputs."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node

X = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
TIMES = np.cumsum(np.random.default_rng(1).uniform(0.1, 0.5, size=(5, 3)), axis=1).astype("float32")
SERIES = np.random.default_rng(2).normal(size=(5, 3, 2)).astype("float32")
MASK = np.random.default_rng(3).uniform(size=SERIES.shape) < 0.8
SOLVER = keras_node.RungeKutta("rk4", num_steps=1)


def network(units=4):
    return keras.Sequential([keras.layers.Dense(6, activation="tanh"), keras.layers.Dense(units)])


@keras.saving.register_keras_serializable(package="tests")
def decay(y, rate):
    return -rate * y


def grey_box(units=4):
    return keras_node.GreyBoxField(decay, {"rate": 0.5}, network(units))


@keras.saving.register_keras_serializable(package="tests")
class TakesMore(keras.layers.Layer):
    """A field that may take `args`, and makes its weights when it is called."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(4)

    def call(self, t, y, args=None):
        return self.dense(y)


FIELDS = {
    "TakesMore": TakesMore,
    "ConcatSquashField": lambda: keras_node.ConcatSquashField((6,)),
    "GreyBoxField": grey_box,
}


def with_layer(field):
    layer = keras_node.ODELayer(field, solver=SOLVER, jit_compile=False, name="ode")
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    return model


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_a_field_that_may_take_args_has_its_weights_before_the_first_call(field, tmp_path):
    model, other = with_layer(field()), with_layer(field())
    number = len(model.weights)
    # A file of weights, and a file of the model, both before anything was computed.
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = model(X)
    assert len(model.weights) == number
    np.testing.assert_array_equal(other(X), expected)
    np.testing.assert_array_equal(loaded(X), expected)
    # An optimizer that is built ahead, and a layer that is frozen ahead, know them.
    other.get_layer("ode").trainable = False
    other.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    for each in (model, other):
        each.optimizer.build(each.trainable_variables)
        each.fit(X, np.ones((5, 2)), verbose=0)
    moved, frozen = (each.get_layer("ode").get_weights() for each in (model, other))
    start = loaded.get_layer("ode").get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(frozen, start, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(moved, start, strict=True))


def ode_layer(**kwargs):
    return keras_node.ODELayer(keras_node.ConcatSquashField((6,)), solver=SOLVER, **kwargs), (X,)


def ode_rnn(**kwargs):
    return keras_node.ODERNN(keras.layers.GRUCell(4), network(), solver=SOLVER, **kwargs), (SERIES, TIMES)


def neural_cde(**kwargs):
    return keras_node.NeuralCDE(4, solver=SOLVER, **kwargs), (SERIES, TIMES)


def dynamics_model(**kwargs):
    return keras_node.DynamicsModel(units=4, solver=SOLVER, **kwargs), ((TIMES, SERIES),)


def flow(**kwargs):
    return keras_node.ContinuousFlow(4, solver=SOLVER, **kwargs), (X,)


def latent_ode(**kwargs):
    return keras_node.LatentODE(2, units=4, solver=SOLVER, **kwargs), ((TIMES, SERIES, MASK),)


@pytest.mark.parametrize("make", [ode_layer, ode_rnn, neural_cde, dynamics_model, flow, latent_ode])
@pytest.mark.parametrize("when", ["in the constructor", "before the first call"])
def test_a_frozen_layer_has_frozen_weights_only(make, when):
    layer, inputs = make(**({"trainable": False} if when == "in the constructor" else {}))
    if when == "before the first call":
        layer.trainable = False
    layer(*inputs)
    layer.trainable = False
    assert len(layer.weights) > 2 and not any(weight.trainable for weight in layer.weights)
    copy = type(layer).from_config(layer.get_config())
    copy(*inputs)
    assert len(copy.weights) == len(layer.weights) and not any(weight.trainable for weight in copy.weights)
    layer.trainable = True
    assert len(layer.trainable_weights) > 2


@pytest.mark.parametrize("make", [dynamics_model, flow])
def test_a_frozen_field_stays_frozen_in_a_file(make, tmp_path):
    model, inputs = make()
    model.compile("sgd")
    model(*inputs)
    number = len(model.trainable_weights)
    model.vector_field.trainable = False
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(loaded.trainable_weights) == len(model.trainable_weights) < number


@pytest.mark.parametrize("way", ["build", "adapt"])
def test_weights_of_dynamics_load_before_the_first_call(way, tmp_path):
    model, other = (keras_node.DynamicsModel(grey_box(2), solver=SOLVER) for _ in range(2))
    model.adapt((TIMES, SERIES))
    model.save_weights(tmp_path / "model.weights.h5")
    if way == "adapt":
        other.adapt((TIMES, SERIES))
    else:
        other.build(((None, 3), (None, 3, 2)))
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other((TIMES, SERIES)), model((TIMES, SERIES)))


def test_weights_of_dynamics_with_trained_states_load_for_inference(tmp_path):
    model, other = (dynamics_model(window=1, initial_states="trained")[0] for _ in range(2))
    model.compile("sgd")
    model.fit((TIMES, SERIES), verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    other((TIMES, SERIES))
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(other((TIMES, SERIES)), model((TIMES, SERIES)), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (dynamics_model, {"times": TIMES, "values": SERIES, "mask": MASK}),
        (latent_ode, (TIMES, SERIES, MASK)),
        (flow, X),
    ],
)
def test_an_export_knows_its_inputs_after_training(make, inputs, tmp_path):
    model, _ = make(**({"objective": "flow_matching"} if make is flow else {}))
    model.compile("sgd")
    model.fit(inputs, epochs=1, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")  # it knows what the model knew that was trained
    loaded.export(tmp_path / "served", verbose=False)
    more = keras.tree.map_structure(lambda x: tf.constant(np.concatenate([x, x])), inputs)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(more), model(more), rtol=1e-5, atol=1e-6)


def test_an_export_without_known_inputs_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="train it or call it first, or pass `input_signature`"):
        dynamics_model()[0].export(tmp_path / "served", verbose=False)


def test_a_series_of_unknown_shape_in_a_layer_that_is_built():
    layer, inputs = neural_cde()
    expected = layer(*inputs)
    signature = [tf.TensorSpec([None, None, None]), tf.TensorSpec([None, None])]
    np.testing.assert_allclose(tf.function(layer, input_signature=signature)(*inputs), expected, rtol=1e-5)


@pytest.mark.parametrize("make", [ode_rnn, neural_cde])
def test_a_ragged_series_is_refused_with_advice(make):
    x = tf.RaggedTensor.from_row_splits(SERIES.reshape(-1, 2), [0, 5, 15])
    with pytest.raises(TypeError, match=r"pad what is ragged.*a RaggedTensor of shape \(2, None, 2\)"):
        make()[0](x, TIMES)


def test_a_ragged_batch_of_vectors_is_that_of_its_rows():
    model, _ = flow()
    x = tf.RaggedTensor.from_row_splits(X, [0, 2, 5])
    np.testing.assert_allclose(model.log_prob(x).flat_values, model.log_prob(X), rtol=1e-5)
