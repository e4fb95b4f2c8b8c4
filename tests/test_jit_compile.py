"""A solve as an XLA program of its own inside a graph that is none."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node.jit_compile import CompileLater
from keras_node.solve_options import SolveOptions

SOLVER = keras_node.RungeKutta("bosh3", rtol=1e-6, atol=1e-8, max_steps=256)
MATRIX = tf.constant([[-0.1, 1.1], [-1.2, 0.2]], tf.float64)
Y0 = tf.constant([[1.0, 0.5], [0.3, -1.0], [0.1, 0.2]], tf.float64)
OWN = tf.constant([[0.0, 0.2, 0.5], [0.6, 0.2, 0.1], [1.2, 0.9, -0.3]], tf.float64)


def gradients_of(inputs, gradient, jit_compile, solver=SOLVER):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y0, matrix, ts = inputs
        field = lambda t, y, matrix: tf.tanh(y @ matrix) + tf.sin(t)  # noqa: E731
        options = {"gradient": gradient, "solver": solver, "jit_compile": jit_compile}
        ys = keras_node.odeint(field, y0, ts, args=matrix, **options).ys
        value = tf.reduce_sum(tf.sin(ys))
    return [value, *tape.gradient(value, inputs)]


def compiled_functions(function):
    """The names of the functions in a graph that XLA must compile."""
    library = function.graph.as_graph_def().library
    return [f.signature.name for f in library.function if f.attr["_XlaMustCompile"].b]


@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed"])
def test_the_numbers_are_the_same(gradient):
    inputs = [Y0, MATRIX, OWN]
    function = tf.function(gradients_of)
    for a, b in zip(function(inputs, gradient, True), function(inputs, gradient, False), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    assert len(compiled_functions(function.get_concrete_function(inputs, gradient, True))) >= 2  # there and back
    assert not compiled_functions(function.get_concrete_function(inputs, gradient, False))


@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed"])
def test_second_derivatives_are_the_same(gradient):
    @tf.function
    def product(y0, jit_compile):
        with tf.GradientTape() as tape:
            tape.watch(y0)
            inputs = [y0, MATRIX, tf.constant([0.0, 1.0], tf.float64)]
            first = gradients_of(inputs, gradient, jit_compile, keras_node.RungeKutta("heun", num_steps=2))[1]
        return tape.gradient(first, y0)

    np.testing.assert_allclose(product(Y0, True), product(Y0, False), rtol=1e-9, atol=1e-11)


def test_failures_raise_there_and_back():
    steep = lambda t, y: tf.where(t > 0.5, 1e3, 1.0) * tf.sin(1e3 * y)  # noqa: E731
    few = keras_node.RungeKutta("bosh3", max_steps=4)

    @tf.function
    def forward(y0):
        return keras_node.odeint(steep, y0, [0.0, 1.0], solver=few, jit_compile=True).ys

    @tf.function
    def backward(y0):
        with tf.GradientTape() as tape:
            tape.watch(y0)
            adjoint = keras_node.BacksolveAdjoint(solver=few)
            solver = keras_node.RungeKutta("rk4", num_steps=4)
            ys = keras_node.odeint(steep, y0, [0.0, 1.0], solver=solver, gradient=adjoint, jit_compile=True).ys
        return tape.gradient(ys, y0)

    with pytest.raises(tf.errors.InvalidArgumentError, match="The solve failed with status"):
        forward(tf.ones((2,)))
    with pytest.raises(tf.errors.InvalidArgumentError, match="The solve of the adjoint failed with status"):
        backward(tf.ones((2,)))


def test_auto_compiles_in_training_only(tmp_path):
    field = keras.layers.Dense(3, activation="tanh")
    model = keras.Sequential([keras.Input((3,)), keras_node.ODELayer(field, solver="bosh3"), keras.layers.Dense(1)])
    for training in (True, False):
        function = tf.function(lambda x, training=training: model(x, training=training))
        assert bool(compiled_functions(function.get_concrete_function(tf.ones((2, 3))))) == training
    model.compile("sgd", "mse", jit_compile=False)
    x = np.ones((7, 3), "float32")
    model.fit(x, x[:, :1], batch_size=4, verbose=0)  # the last batch is a partial one
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    assert not compiled_functions(served.signatures["serving_default"])
    np.testing.assert_allclose(served.serve(x), model(x), rtol=1e-5)


class OutsideXLA(keras.layers.Dense):
    """A layer that XLA cannot compile, so that a program with it shows itself by an error."""

    def call(self, y):
        return super().call(y) + tf.numpy_function(lambda: np.float32(0), [], tf.float32)


def deep(field, **options):
    return keras_node.ODELayer(field, solver=keras_node.RungeKutta("heun", num_steps=2), **options)


def recurrent(field, **options):
    solver = keras_node.RungeKutta("heun", num_steps=2)
    rnn = keras_node.ODERNN(keras.layers.SimpleRNNCell(3), field, solver=solver, **options)
    return keras.Sequential([keras.layers.RepeatVector(3), TimesOfARow(rnn)])


class TimesOfARow(keras.layers.Wrapper):
    def call(self, x):
        return self.layer(x, tf.tile([[0.0, 1.0, 2.0]], [tf.shape(x)[0], 1]))


@pytest.mark.parametrize(("layer", "solves"), [(deep, 1), (recurrent, 3)])
def test_a_layer_compiles_after_so_many_solves_and_the_largest_batches_only(layer, solves, monkeypatch):
    monkeypatch.setattr(CompileLater, "SOLVES", 2 * solves)
    layer = layer(OutsideXLA(3))
    layer(tf.ones((8, 3)))

    @tf.function(input_signature=[tf.TensorSpec((None, 3)), tf.TensorSpec((), tf.bool)])
    def step(x, training):
        return tf.cond(training, lambda: layer(x, training=True), lambda: layer(x, training=False))

    for x, training in [(8, False)] * 3 + [(3, True), (8, True), (8, True), (3, True), (3, True), (8, False)]:
        step(tf.ones((x, 3)), tf.constant(training))
    with pytest.raises(tf.errors.InvalidArgumentError, match="Detected unsupported operations"):
        step(tf.ones((8, 3)), tf.constant(True))
    step(tf.ones((3, 3)), tf.constant(True))
    step(tf.ones((9, 3)), tf.constant(True))


@pytest.mark.parametrize(("layer", "gradient"), [(deep, "backsolve"), (deep, "checkpointed"), (recurrent, "backsolve")])
def test_training_goes_on_as_before_when_a_layer_begins_to_compile(layer, gradient, monkeypatch):
    monkeypatch.setattr(CompileLater, "SOLVES", 3)
    x = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    weights = []
    for options in ({}, {"jit_compile": False}):
        keras.utils.set_random_seed(0)
        field = keras.layers.Dense(3, activation="tanh")
        model = keras.Sequential([keras.Input((3,)), layer(field, gradient=gradient, **options), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
        model.fit(x, x[:, :1], batch_size=8, epochs=3, verbose=0, shuffle=False)
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [deep, recurrent])
def test_a_slow_first_step_says_once_what_is_happening(layer, monkeypatch, caplog):
    monkeypatch.setattr(tf.get_logger(), "propagate", True)
    layer = layer(keras.layers.Dense(3))
    layer(tf.ones((2, 3)))

    def told(patience, size):
        monkeypatch.setattr(SolveOptions, "PATIENCE", patience)
        caplog.clear()
        tf.function(layer).get_concrete_function(tf.ones((size, 3)))
        return [record.getMessage() for record in caplog.records]

    with caplog.at_level("INFO"):
        assert not told(1e9, 2)
        (message,) = told(0, 2)
        assert "traced the solve of layer 'ode" in message
        assert not told(0, 3)


class Inside(keras.layers.Layer):
    """A layer whose operations are those of a function inside the graph."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def build(self, shape):
        self.layer.build(shape)

    def call(self, y):
        return tf.cond(tf.reduce_sum(y) > 0, lambda: self.layer(y), lambda: -self.layer(y))


def auto_compiles(field, shape, **options):
    layer = keras_node.ODELayer(field, solver="bosh3", **options)
    layer.build((None, *shape))  # otherwise the function is traced twice
    function = tf.function(lambda x: layer(x, training=True))
    return bool(compiled_functions(function.get_concrete_function(tf.ones((2, *shape)))))


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        ((6, 3), lambda: keras.layers.Conv1D(3, 3, padding="same")),
        ((4, 4, 3), lambda: keras.layers.Conv2D(3, 3, padding="same")),
        ((4, 4, 3), lambda: keras.layers.Conv2DTranspose(3, 3, padding="same")),
        ((4, 4, 3), lambda: keras.layers.DepthwiseConv2D(3, padding="same")),
        ((4, 4, 3), lambda: keras.layers.SeparableConv2D(3, 3, padding="same")),
        ((4, 4, 4, 3), lambda: keras.layers.Conv3D(3, 3, padding="same")),
        ((4, 4, 3), lambda: Inside(keras.layers.Conv2D(3, 3, padding="same"))),
    ],
)
def test_auto_leaves_convolutions_to_tensorflow_on_a_cpu(shape, field):
    assert not auto_compiles(field(), shape)


def test_other_fields_and_a_convolution_on_a_gpu_or_by_request_are_compiled(monkeypatch):
    shape = (4, 4, 3)

    def convolution():
        return keras.layers.Conv2D(3, 3, padding="same")

    assert auto_compiles(keras.layers.Dense(3), shape)
    assert auto_compiles(convolution(), shape, jit_compile=True)
    gpu = tf.config.LogicalDevice("/device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda device_type=None: [gpu])
    assert auto_compiles(convolution(), shape)


def test_auto_sees_convolutions_in_the_field_of_a_recurrent_layer():
    """Although the loop over the observations is recorded without its solves."""
    convolving = keras.Sequential(
        [keras.layers.Reshape((3, 2)), keras.layers.Conv1D(2, 3, padding="same"), keras.layers.Flatten()]
    )
    for field, expected in ((convolving, False), (keras.layers.Dense(6), True)):
        layer = keras_node.ODERNN(keras.layers.GRUCell(6), field, solver="bosh3")
        inputs = tf.ones((2, 4, 1)), tf.ones((2, 4))
        layer(*inputs)
        function = tf.function(lambda x, times, layer=layer: layer(x, times, training=True))
        assert bool(compiled_functions(function.get_concrete_function(*inputs))) is expected


@pytest.mark.parametrize("jit_compile", [True, False])
def test_the_choice_is_saved(jit_compile):
    layers = [
        keras_node.ODELayer(keras.layers.Dense(3), jit_compile=jit_compile),
        keras_node.ODERNN(keras.layers.GRUCell(3), keras.layers.Dense(3), jit_compile=jit_compile),
    ]
    for layer in layers:
        assert type(layer).from_config(layer.get_config()).get_config()["jit_compile"] is jit_compile


def test_direct_cannot_be_compiled_by_itself():
    with pytest.raises(ValueError, match="Received: jit_compile=True"):
        keras_node.ODELayer(keras.layers.Dense(3), gradient="direct", jit_compile=True)
    with pytest.raises(ValueError, match="jit_compile='yes'"):
        keras_node.odeint(lambda y: -y, tf.ones((2,)), [0.0, 1.0], jit_compile="yes")


@pytest.mark.parametrize(
    "draw",
    [
        lambda shape: keras.random.normal(shape, seed=5),
        lambda shape: tf.random.stateless_uniform(shape, [1, 2]),
        lambda shape: tf.random.stateless_truncated_normal(shape, [1, 2]),
    ],
    ids=["keras", "uniform", "truncated normal"],
)
def test_auto_leaves_fixed_random_numbers_to_tensorflow(draw):
    # From the same seed XLA draws other numbers, so the function that is trained would change when compiling begins.
    y0 = tf.ones((3, 2))
    solve = lambda y0: keras_node.odeint(  # noqa: E731
        lambda y: draw((2,)) - y, y0, [0.0, 1.0], solver="midpoint", training=True
    ).ys[-1]
    np.testing.assert_allclose(tf.function(solve)(y0), solve(y0), rtol=1e-6)
