"""What a field may be: functional models of `[t, y]`, fields that take a mask; and what is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_node
from keras_node import ODELayer, RungeKutta, odeint

X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
RK4 = RungeKutta("rk4", num_steps=4)


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


def functional(time_shape=(1,), state_shape=(4,), with_args=False):
    """`dy/dt = tanh([t, y, args] W + b)` as a functional model, and the same as a callable."""
    t, y, a = keras.Input(time_shape), keras.Input(state_shape), keras.Input((2,))
    dense = layers.Dense(state_shape[-1], activation="tanh")
    inputs = [t, y, a] if with_args else [t, y]
    model = keras.Model(inputs, dense(layers.Concatenate()(inputs)))

    def same(t, y, args=None):
        t = tf.cast(t, tf.float32) + 0 * y[..., :1]
        return dense(tf.concat([t, y, args] if with_args else [t, y], axis=-1))

    return model, same


OWN_TIMES = np.stack([np.zeros(3), [0.5, 1.0, 2.0]]).astype("float32")


@pytest.mark.parametrize(("ts", "with_args"), [([0.0, 1.0], False), (OWN_TIMES, True)], ids=["shared", "own"])
def test_a_functional_model_of_time_and_state(ts, with_args):
    model, same = functional(with_args=with_args)
    args = X[:, :2] if with_args else None

    @tf.function(jit_compile=True)
    def compiled(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = odeint(model, x, ts, args=args, solver=RK4, gradient="checkpointed").ys[-1]
        return y, tape.gradient(y, [x, *model.trainable_variables])

    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        expected = odeint(same, x, ts, args=args, solver=RK4, gradient="direct").ys[-1]
    gradients = tape.gradient(expected, [x, *model.trainable_variables])
    y, actual = compiled(x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(odeint(model, x, ts, args=args, solver=RK4).ys[-1], expected, rtol=1e-5, atol=1e-6)
    for a, e in zip(actual, gradients, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


def test_the_time_has_the_shape_of_the_input():
    y = tf.constant(np.random.default_rng(1).normal(size=(3, 5, 4)), tf.float32)
    model, same = functional((None, 1), (None, 4))
    for ts in ([0.0, 1.0], OWN_TIMES):
        np.testing.assert_allclose(odeint(model, y, ts, solver=RK4).ys, odeint(same, y, ts, solver=RK4).ys, rtol=1e-5)
    scalar = keras.Input(batch_shape=())
    state = keras.Input((4,))
    model = keras.Model([scalar, state], state * scalar)
    np.testing.assert_allclose(odeint(model, X, [0.0, 1.0], solver=RK4).ys[-1], X * np.exp(0.5), rtol=1e-4)


def test_a_functional_model_in_a_layer_is_saved(tmp_path):
    field, same = functional()
    model = keras.Sequential([keras.Input((4,)), ODELayer(field, solver=RK4)])
    np.testing.assert_allclose(model(X), odeint(same, X, [0.0, 1.0], solver=RK4).ys[-1], rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(X), model(X))


def test_a_functional_model_of_a_nested_state_is_autonomous():
    q, v = keras.Input((2,)), keras.Input((2,))
    model = keras.Model([q, v], [v * 1.0, -q])
    swung = odeint(model, [X[:, :2], X[:, 2:]], [0.0, np.pi / 2], solver=RungeKutta(rtol=1e-6))
    np.testing.assert_allclose(swung.ys[0][-1], X[:, 2:], atol=1e-4)
    field = keras_node.HamiltonianField(keras.Model([q, v], layers.Concatenate()([q, v])[:, :1]))
    assert [d.shape for d in field(tf.constant(0.0), (X[:, :2], X[:, 2:]))] == [(3, 2), (3, 2)]


def test_a_functional_model_of_something_else_is_refused():
    four = [keras.Input((4,)) for _ in range(4)]
    with pytest.raises(ValueError, match=r"the inputs `\[t, y\]` or `\[t, y, args\]`.*for a state of \(3, 4\)"):
        odeint(keras.Model(four, layers.Add()(four)), X, [0.0, 1.0])


@keras.saving.register_keras_serializable(package="tests")
class Masked(layers.Layer):
    """`dy/dt` is the number of steps that are not masked: what it gives tells the mask that it saw."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, y, mask=None):
        valid = tf.ones(tf.shape(y)[:2]) if mask is None else tf.cast(mask, tf.float32)
        return tf.zeros_like(y) + tf.reduce_sum(valid, axis=1)[:, None, None]


@keras.saving.register_keras_serializable(package="tests")
class MaskedInTime(Masked):
    def call(self, t, y, y_mask=None):
        return super().call(y, y_mask)


def masked_series():
    x = np.ones((2, 3, 4), "float32")
    x[1, 1:] = 0
    return layers.Masking()(x), np.array([[True, True, True], [True, False, False]])


@pytest.mark.parametrize("gradient", ["backsolve", "direct"])
@pytest.mark.parametrize("field", [Masked, MaskedInTime, lambda: keras.Sequential([Masked()])])
def test_a_field_receives_the_mask_of_the_state(field, gradient):
    x, mask = masked_series()
    layer = ODELayer(field(), solver="euler", gradient=gradient)
    expected = x + np.array([3.0, 1.0])[:, None, None]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5)
    np.testing.assert_allclose(tf.function(lambda x: layer(x, mask=mask), jit_compile=True)(x), expected, rtol=1e-5)
    ends = layer(x, ts=tf.constant([0.0, 1.0]))
    np.testing.assert_allclose(ends[:, 1], expected, rtol=1e-5)
    np.testing.assert_allclose(layer(x, mask=np.ones((2, 3), bool)), x + 3.0, rtol=1e-5)


def test_fields_hand_a_mask_on_to_their_layers():
    x, _ = masked_series()

    class Mean(Masked):
        def call(self, y, mask=None):
            return super().call(y[..., :4], mask)

    y = ODELayer(keras_node.TimeConcatenationField(Mean()), solver="euler")(x)
    np.testing.assert_allclose(y, x + np.array([3.0, 1.0])[:, None, None], rtol=1e-5)


def test_the_output_is_masked_once_for_each_asked_time(tmp_path):
    x, mask = masked_series()
    layer = ODELayer(Masked(), solver="euler")
    np.testing.assert_array_equal(layer(x)._keras_mask, mask)
    for ts in ([0.5, 1.0], tf.constant([0.5, 1.0]), tf.ones((2, 2))):
        np.testing.assert_array_equal(layer(x, ts=ts)._keras_mask, np.repeat(mask[:, None], 2, axis=1))
    assert getattr(layer(tf.ones((2, 3, 4)), ts=[0.5, 1.0]), "_keras_mask", None) is None

    inputs = keras.Input((3, 4))
    states = layer(layers.Masking()(inputs), ts=[0.5, 1.0])
    assert states._keras_mask.shape == (None, 2, 3)
    model = keras.Model(inputs, layers.TimeDistributed(layers.GRU(2))(states))
    data = np.array(x)
    shorter = model.layers[-1].layer(np.array(layer(x, ts=[1.0]))[1:, 0, :1])
    np.testing.assert_allclose(model(data)[1, 1], shorter[0], rtol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(data), model(data))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: odeint(lambda y: None, X, [0.0, 1.0]), ValueError, "must return the rate of change.*Received: None"),
        (lambda: odeint(lambda y: (y[0], None), (X, X), [0.0, 1.0]), ValueError, "`return` that is missing"),
        (
            lambda: odeint(tf.negative, X, [0.0, 1.0], event=keras_node.Event(lambda y: None)),
            ValueError,
            "An event function must return one number.*`return` that is missing. Received: None",
        ),
        (
            lambda: odeint(tf.negative, X, [0.0, 1.0], event=keras_node.Event(lambda y: y[:, 0] > 0)),
            TypeError,
            "An event function must return a floating-point number.*Received: dtype=bool",
        ),
        (lambda: odeint(tf.negative, X, np.array([0, [1]], object)), ValueError, "Times must be numbers in an array"),
        (
            lambda: odeint(tf.negative, X, np.array(["2026-01-01", "2026-01-02"], "M8[D]")),
            ValueError,
            "Turn dates into the time since the first of them",
        ),
        (lambda: odeint(tf.sparse.from_dense, X, [0.0, 1.0]), TypeError, "dense tensors.*Received: SparseTensor"),
        (
            lambda: odeint(lambda y: -y, tf.ragged.constant([[1.0], [1.0, 2.0]]), [0.0, 1.0]),
            TypeError,
            "must be a dense tensor.*pad what is ragged.*Received: y0=<tf.RaggedTensor",
        ),
        (lambda: odeint(lambda y: -y, None, [0.0, 1.0]), TypeError, "must be a dense tensor.*Received: y0=None"),
        (lambda: ODELayer(lambda y: -y)(X, ts=1.0), ValueError, r"`ts` must be of shape \(T,\) .*ts.shape=\(\)"),
        (lambda: ODELayer(lambda y: -y)(keras.Input((4,)), ts=1.0), ValueError, r"`ts` must be.*ts.shape=\(\)"),
        (lambda: ODELayer(tf.negative)(X, ts=tf.ones((3, 2, 1))), ValueError, r"or \(batch, T\).*ts.shape=\(3, 2, 1\)"),
        (lambda: odeint(lambda y: -y, (), [0.0, 1.0]), ValueError, r"at least one tensor. Received: y0=\(\)"),
        (lambda: odeint(tf.negative, X, [0.0, 1.0], solver=4), TypeError, "name of a method.*solver=4 .*type int"),
        (lambda: odeint(tf.negative, X, [0.0, 1.0], gradient=1), TypeError, "one of backsolve.*gradient=1 .*type int"),
        (lambda: RungeKutta(rtol=[]), ValueError, r"`rtol` must be a positive number or a list.*rtol=\[\]"),
        (lambda: ODELayer(lambda y: -y)(X, ts=[]), ValueError, r"one time or more. Received: ts.shape=\(0,\)"),
        (lambda: ODELayer(lambda y: -y, augment_dims=2)(X[:, 0]), ValueError, r"axis of features after.*shape \(3,\)"),
        (lambda: ODELayer(lambda y: -y, augment_dims=True), ValueError, "an integer, 0 or more. Received: .*True"),
        (lambda: ODELayer(lambda y: -y, gradient="Direct"), ValueError, "Did you mean 'direct'"),
        (
            lambda: keras_node.HamiltonianField(tf.reduce_sum)(tf.constant(0.0), X),
            ValueError,
            r"one number for each sample.*Received: shape=\(\)",
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_options_that_are_set_later_are_checked():
    layer = ODELayer(layers.Dense(4), gradient="checkpointed")
    layer.gradient = None
    assert isinstance(layer.gradient, keras_node.BacksolveAdjoint)
    layer.gradient, layer.jit_compile = "checkpointed", False
    assert isinstance(layer.gradient, keras_node.CheckpointedAdjoint) and layer.jit_compile is False
    assert layer.get_config()["jit_compile"] is False
    layer.gradient = "direct"
    with pytest.raises(ValueError, match='Received: jit_compile=True with gradient="direct"'):
        layer.jit_compile = True
    with pytest.raises(ValueError, match="Received: gradient='indirect'"):
        layer.gradient = "indirect"


@pytest.mark.parametrize(
    "order", [lambda y, t: -y, lambda x, time: -x, lambda y, t, args: -y], ids=["yt", "xtime", "args"]
)
def test_a_field_that_takes_the_time_last_is_refused(order):
    """Called by position, it would compute something else without a word."""
    with pytest.raises(
        ValueError, match=r"A vector field takes the time first: .* to \((t|time), .*with signature \([xy],"
    ):
        odeint(order, X, [0.0, 1.0])
    with pytest.raises(ValueError, match="An event function takes the time first"):
        keras_node.Event(order)


def test_time_may_be_called_something_else():
    for field in (lambda s, y: -s * y, lambda tau, x: -tau * x, lambda t, time: -t * time):
        np.testing.assert_allclose(odeint(field, X, [0.0, 1.0]).ys[1], X * np.exp(-0.5), rtol=1e-3)
    np.testing.assert_allclose(odeint(lambda _, t: -t, X, [0.0, 1.0]).ys[1], X * np.exp(-1), rtol=1e-3)


def test_classes_and_lists_of_numbers_are_refused_with_what_to_pass():
    for use in (lambda: odeint(layers.Dense, X, [0.0, 1.0]), lambda: ODELayer(layers.Dense)(X)):
        with pytest.raises(TypeError, match=r"not a class: make an instance of it. Received: <class .*Dense"):
            use()
    with pytest.raises(ValueError, match=r"Pass an array with a batch axis to a layer.*Received: y0=\[1.0, 2.0\]"):
        odeint(layers.Dense(2), [1.0, 2.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="A list of numbers is a list of that many states: pass an array"):
        odeint(lambda y: -np.asarray(y), [1.0, 2.0], [0.0, 1.0])
    # A list of states is one where the field says so.
    np.testing.assert_allclose(odeint(lambda y: [-y[0], y[0]], [1.0, 0.0], [0.0, 1.0]).ys[1][1], 1 - np.exp(-1), 1e-3)


def test_a_state_of_unknown_rank_is_refused():
    unknown = [tf.TensorSpec((2, 3)), tf.TensorSpec(None)]
    with pytest.raises(ValueError, match=r"`ts` must be of shape"):
        tf.function(lambda y, ts: odeint(tf.negative, y, ts).ys, unknown, autograph=False).get_concrete_function()
    signature = [tf.TensorSpec(None)]
    with pytest.raises(ValueError, match="must have a known rank"):
        tf.function(
            lambda y: odeint(tf.negative, y, [0.0, 1.0]).ys, input_signature=signature, autograph=False
        ).get_concrete_function()


def times(y, t, args):
    return -tf.nest.flatten(args)[0] * y


@pytest.mark.parametrize("args", [np.array([[2.0]]), [np.array([[2.0]])], {"a": np.float64(2.0)}, 2.0], ids=repr)
def test_numpy_arguments_of_a_layer_take_the_precision_of_the_state(args):
    layer = ODELayer(lambda t, y, args: times(y, t, args), solver=RK4)
    expected = odeint(lambda t, y, args: times(y, t, args), X, [0.0, 1.0], args=args, solver=RK4).ys[-1]
    np.testing.assert_array_equal(layer(X, args=args), expected)
    np.testing.assert_allclose(tf.function(lambda x: layer(x, args=args))(X), expected, rtol=1e-6)
    wide = ODELayer(lambda t, y, args: times(y, t, args), dtype="float64")
    assert wide(X.astype("float64"), args=args).dtype == "float64"


def test_times_are_given_by_position_too():
    layer = ODELayer(lambda y: -y)
    np.testing.assert_array_equal(layer(X, [0.5, 1.0]), layer(X, ts=[0.5, 1.0]))


def test_a_shared_field_is_restored_by_its_weights(tmp_path):
    def make():
        field = layers.Dense(4)
        return keras.Sequential([keras.Input((4,)), ODELayer(field, solver=RK4), ODELayer(field, t1=0.5, solver=RK4)])

    model, other = make(), make()
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other(X), model(X))
    assert len(other.trainable_variables) == 2
