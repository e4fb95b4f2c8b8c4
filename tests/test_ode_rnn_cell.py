"""A cell whose state moves between observations, against solves and cell calls made one by one."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_node
from keras_node import ODERNNCell, RungeKutta

UNITS, FEATURES, BATCH, STEPS = 4, 3, 2, 5
COARSE = RungeKutta("heun", num_steps=2)
PRECISE = RungeKutta("tsit5", rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


@pytest.fixture
def float64():
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy("float32")


class Keep(keras.Layer):
    """A cell that ignores its input and keeps its states."""

    def __init__(self, *sizes, **kwargs):
        super().__init__(**kwargs)
        self.state_size = list(sizes)
        self.output_size = sizes[0]

    def call(self, inputs, states):
        return states[0], list(states)


def mlp(units=UNITS):
    return keras.Sequential([layers.Dense(6, activation="tanh"), layers.Dense(units, bias_initializer="normal")])


def still(units=UNITS):
    """A field that is zero everywhere."""
    return layers.Dense(units, kernel_initializer="zeros")


def series(dtype="float32"):
    """Observations with the time elapsed in the last channel; one interval is zero."""
    x = np.random.normal(size=(BATCH, STEPS, FEATURES))
    elapsed = np.random.uniform(0.1, 1.5, size=(BATCH, STEPS, 1))
    elapsed[0, 2] = 0
    return np.concatenate([x, elapsed], axis=-1).astype(dtype)


def in_graph(function):
    return tf.function(function, autograph=False)


def reference_rnn(cell, x, states, backwards=False):
    """Outputs and last states, from solves of one sample each and calls of the wrapped cell."""
    outputs = []
    for i in reversed(range(x.shape[1])) if backwards else range(x.shape[1]):
        moved = [
            keras_node.odeint(cell.vector_field, states[0][b : b + 1], [0.0, x[b, i, -1]], solver=cell.solver).ys[-1]
            for b in range(x.shape[0])
        ]
        output, states = cell.cell(x[:, i, :-1], [tf.concat(moved, axis=0), *states[1:]])
        outputs.append(output)
    return tf.stack(outputs, axis=1), states


@pytest.mark.parametrize("cell_class", [layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell])
def test_a_step_is_one_solve_for_each_sample_and_a_call_of_the_cell(cell_class, float64):
    cell = ODERNNCell(cell_class(UNITS), mlp(), solver=PRECISE)
    x = tf.constant(series("float64"))
    states = [tf.random.normal((BATCH, UNITS), dtype="float64") for _ in cell.get_initial_state(BATCH)]
    cell.build((BATCH, FEATURES + 1))
    variables = cell.trainable_variables
    assert len(variables) == 7

    def loss_and_gradients(run):
        with tf.GradientTape() as tape:
            tape.watch([x, *states])
            output, new_states = run()
            loss = tf.reduce_sum(output**2) + sum(tf.reduce_sum(tf.sin(s)) for s in new_states)
        return output, tape.gradient(loss, [x, *states, *[v.value for v in variables]])

    output, gradients = in_graph(loss_and_gradients)(lambda: cell(x[:, 1], states))
    expected_output, expected = loss_and_gradients(lambda: reference_rnn(cell, x[:, 1:2], states))
    np.testing.assert_allclose(output, expected_output[:, 0], atol=1e-8)
    for gradient, reference in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=1e-7)


def test_an_interval_of_zero_leaves_the_state_exactly_unchanged():
    gru = layers.GRUCell(UNITS)
    cell = ODERNNCell(gru, mlp())
    x, h = tf.random.normal((BATCH, FEATURES)), tf.random.normal((BATCH, UNITS))
    with_time = tf.concat([x, [[0.0], [1.0]]], axis=1)
    output, _ = cell(with_time, [h])
    expected, _ = gru(x, [h])
    np.testing.assert_array_equal(output[0], expected[0])
    assert np.max(np.abs(output[1] - expected[1])) > 1e-3


def test_the_field_sees_the_time_since_the_last_observation():
    cell = ODERNNCell(Keep(UNITS), lambda t, h: t + tf.zeros_like(h))
    x = tf.constant([[0.0, 1.0], [0.0, -3.0]])
    output, _ = cell(x, [tf.zeros((2, UNITS))])
    np.testing.assert_allclose(output, [[0.5] * UNITS, [4.5] * UNITS], rtol=1e-5)


def test_a_negative_interval_moves_the_state_backwards():
    cell = ODERNNCell(Keep(UNITS), lambda h: -h)
    output, _ = cell(tf.constant([[0.0, 1.0], [0.0, -1.0]]), [tf.ones((2, UNITS))])
    np.testing.assert_allclose(output[:, 0], np.exp([-1, 1]), rtol=1e-3)


@pytest.mark.parametrize(
    ("evolve", "moved"), [(None, {0}), (0, {0}), (1, {1}), (-1, {1}), ((0, 1), {0, 1}), ((1, 0), {0, 1})]
)
def test_evolve_chooses_the_states_that_move(evolve, moved):
    cell = ODERNNCell(Keep(2, 3), lambda h: tf.ones_like(h), evolve=evolve)
    _, states = cell(tf.constant([[0.0, 0.5]]), [tf.zeros((1, 2)), tf.zeros((1, 3))])
    assert [s.shape[-1] for s in states] == [2, 3]
    for i, state in enumerate(states):
        np.testing.assert_allclose(state, 0.5 * np.ones_like(state) * (i in moved), rtol=1e-6)


def test_several_states_move_as_one_vector():
    cell = ODERNNCell(Keep(2, 3), lambda h: h[:, ::-1], evolve=(1, 0), solver=RungeKutta("euler", num_steps=1))
    states = [tf.constant([[1.0, 2.0]]), tf.constant([[3.0, 4.0, 5.0]])]
    _, (first, second) = cell(tf.constant([[0.0, 1.0]]), states)
    np.testing.assert_allclose(second, [[3 + 2, 4 + 1, 5 + 5]])
    np.testing.assert_allclose(first, [[1 + 4, 2 + 3]])


@pytest.mark.parametrize("evolve", [2, -3, (), (0, 0), (0, -2), True, "h", 0.0])
def test_evolve_must_name_different_states(evolve):
    with pytest.raises((ValueError, TypeError), match="evolve"):
        ODERNNCell(layers.LSTMCell(UNITS), mlp(), evolve=evolve)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_it_runs_in_a_keras_rnn(unroll, backwards):
    cell = ODERNNCell(layers.LSTMCell(UNITS), mlp(), solver=COARSE)
    rnn = layers.RNN(cell, return_sequences=True, return_state=True, go_backwards=backwards, unroll=unroll)
    x = series()
    outputs, *states = in_graph(rnn)(x)
    expected_outputs, expected_states = reference_rnn(cell, x, cell.get_initial_state(BATCH), backwards)
    np.testing.assert_allclose(outputs, expected_outputs, atol=1e-5)
    for state, expected in zip(states, expected_states, strict=True):
        np.testing.assert_allclose(state, expected, atol=1e-5)


def test_masked_steps_of_a_keras_rnn_keep_the_state():
    rnn = layers.RNN(ODERNNCell(layers.GRUCell(UNITS), mlp(), solver=COARSE))
    x, mask = series(), np.array([[True, True, False, True, False]] * BATCH)
    np.testing.assert_allclose(rnn(x, mask=mask), rnn(x[:, mask[0]]), atol=1e-6)


def test_a_stateful_keras_rnn_goes_on_where_it_stopped():
    cell = ODERNNCell(layers.GRUCell(UNITS), mlp(), solver=COARSE)
    x = series()
    whole = layers.RNN(cell)(x)
    stateful = layers.RNN(cell, stateful=True)
    stateful(x[:, :2])
    np.testing.assert_allclose(stateful(x[:, 2:]), whole, atol=1e-6)


def test_a_constant_interval_equals_the_same_time_as_a_feature():
    gru, field, x = layers.GRUCell(UNITS), mlp(), series()[..., :-1]
    regular = layers.RNN(ODERNNCell(gru, field, time_feature=False, interval=0.7, solver=COARSE))
    stamped = layers.RNN(ODERNNCell(gru, field, solver=COARSE))
    with_time = np.concatenate([x, np.full_like(x[..., :1], 0.7)], axis=-1)
    np.testing.assert_allclose(regular(x), stamped(with_time), atol=1e-6)


def test_it_is_a_part_of_a_stack():
    first, second = ODERNNCell(layers.LSTMCell(UNITS), mlp(), solver=COARSE), layers.GRUCell(2)
    x = series()
    hidden = layers.RNN(first, return_sequences=True)(x)
    expected = layers.RNN(second)(hidden)
    np.testing.assert_allclose(layers.RNN([first, second])(x), expected, atol=1e-6)


def test_it_moves_the_states_of_a_stack():
    stack = layers.StackedRNNCells([Keep(2), Keep(3, 1)])
    cell = ODERNNCell(stack, lambda h: tf.ones_like(h), evolve=(0, 2))
    rnn = layers.RNN(cell, return_state=True)
    _, first, (second, third) = rnn(np.ones((BATCH, STEPS, 2), "float32"))
    for state, moved in ((first, True), (second, False), (third, True)):
        np.testing.assert_allclose(state, STEPS * np.ones_like(state) * moved, rtol=1e-6)


def test_bidirectional_is_one_layer_each_way():
    both = layers.Bidirectional(layers.RNN(ODERNNCell(layers.GRUCell(UNITS), mlp(), solver=COARSE)))
    x = series()
    expected = np.concatenate([both.forward_layer(x), both.backward_layer(x)], axis=-1)
    np.testing.assert_allclose(both(x), expected, atol=1e-6)
    assert len(both.trainable_variables) == 2 * 7


def linear_cell(**kwargs):
    """A cell without memory that hands its input on."""
    initializers = {"kernel_initializer": "identity", "recurrent_initializer": "zeros"}
    return layers.SimpleRNNCell(8, activation="linear", **initializers, **kwargs)


@pytest.mark.parametrize("place", ["alone", "inside a stack", "around a stack"])
def test_dropout_of_the_cell_draws_one_mask_for_a_series(place):
    cell = linear_cell(dropout=0.5)
    cell = layers.StackedRNNCells([cell]) if place == "around a stack" else cell
    cell = ODERNNCell(cell, still(8), solver=COARSE)
    rnn = layers.RNN([cell, linear_cell()] if place == "inside a stack" else cell, return_sequences=True)
    x = np.ones((16, STEPS, 9), "float32")
    call = in_graph(lambda: rnn(x, training=True))
    first, second, third = rnn(x, training=True).numpy(), call().numpy(), call().numpy()
    for outputs in (first, second, third):
        assert set(np.unique(outputs)) == {0.0, 2.0}
        np.testing.assert_array_equal(outputs, np.repeat(outputs[:, :1], STEPS, axis=1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)
    np.testing.assert_array_equal(rnn(x), np.ones_like(first))


def test_recurrent_dropout_draws_one_mask_for_a_series():
    recurrent = layers.SimpleRNNCell(8, "linear", False, "zeros", "identity", recurrent_dropout=0.5)
    rnn = layers.RNN(ODERNNCell(recurrent, still(8), solver=COARSE), return_sequences=True)
    x = np.ones((16, STEPS, 2), "float32")
    h0 = [tf.ones((16, 8))]
    call = in_graph(lambda: rnn(x, initial_state=h0, training=True))
    first, second = call().numpy(), call().numpy()
    np.testing.assert_array_equal(first, first[:, :1] ** np.arange(1, STEPS + 1)[:, None])
    assert not np.array_equal(first, second)


def test_dropout_in_the_field_draws_one_mask_for_a_solve():
    field = keras.Sequential([layers.Dense(8, "linear", True, "zeros", "ones"), layers.Dropout(0.5)])
    rnn = layers.RNN(ODERNNCell(Keep(8), field), return_sequences=True)
    x = np.ones((16, STEPS, 2), "float32")
    moves = np.diff(in_graph(lambda: rnn(x, training=True))(), axis=1)
    assert np.all(np.isclose(moves, 0, atol=1e-4) | np.isclose(moves, 2, atol=1e-4))
    assert not np.allclose(moves[:, 0], moves[:, 1], atol=1e-3)


def test_a_half_precision_state_is_integrated_in_single_precision():
    seen = []

    def field(t, h):
        seen.append((t.dtype, h.dtype))
        return -h

    x = series()
    mixed = layers.RNN(ODERNNCell(layers.GRUCell(UNITS, dtype="mixed_float16", seed=1), field), dtype="mixed_float16")
    y = mixed(x)
    assert y.dtype == tf.float16
    assert mixed.cell.compute_dtype == "float16"
    assert set(seen) == {(tf.float32, tf.float32)}
    single = layers.RNN(ODERNNCell(layers.GRUCell(UNITS), field))
    single.build(x.shape)
    single.set_weights(mixed.get_weights())
    np.testing.assert_allclose(y, single(x), atol=5e-3)


def test_its_config_makes_an_equal_cell():
    cell = ODERNNCell(
        layers.LSTMCell(UNITS),
        mlp(),
        time_feature=False,
        interval=0.3,
        solver=COARSE,
        gradient="direct",
        evolve=(1,),
        name="moving",
    )
    clone = ODERNNCell.from_config(cell.get_config())
    assert clone.get_config() == cell.get_config()
    assert (clone.interval, clone.evolve, clone.name) == (0.3, (1,), "moving")
    assert clone.vector_field is not cell.vector_field


def test_it_is_saved_with_its_field(tmp_path):
    cell = ODERNNCell(layers.GRUCell(UNITS), mlp(), solver=COARSE)
    model = keras.Sequential([keras.Input((None, FEATURES + 1)), layers.RNN(cell)])
    model.save(tmp_path / "model.keras")
    x = series()
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(x), model(x))


def test_what_it_cannot_use_is_refused():
    gru = layers.GRUCell(UNITS)
    with pytest.raises(TypeError, match=r"state_size.*Received: cell=<Dense"):
        ODERNNCell(layers.Dense(3), mlp())
    with pytest.raises(ValueError, match=r"`\(h\)` or `\(t, h\)`"):
        ODERNNCell(gru, lambda t, h, args: h)
    with pytest.raises(ValueError, match=r"no effect.*interval=2.0"):
        ODERNNCell(gru, mlp(), interval=2.0)
    with pytest.raises(ValueError, match=r"features \+ 1.*input_shape=\(2, 1\)"):
        ODERNNCell(gru, mlp()).build((2, 1))
    with pytest.raises(ValueError, match="shape of the state"):
        ODERNNCell(gru, mlp(UNITS + 1)).build((2, FEATURES + 1))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_an_interval_that_is_too_long_for_one_step_is_solved_as_well(jit_compile):
    """`h' = 30 (cos t - h)`, for which a step over the whole interval is a hundred times too long."""
    solver = RungeKutta(rtol=1e-5, atol=1e-6)
    cell = ODERNNCell(layers.GRUCell(1), lambda t, h: 30 * (tf.cos(t) - h), solver=solver, gradient="checkpointed")

    @tf.function(jit_compile=jit_compile)
    def value_and_gradient(h0, times):
        with tf.GradientTape() as tape:
            tape.watch(times)
            h = cell.solve(h0, times).ys[-1]
        return h, tape.gradient(h, times)

    times = np.array([[0.0, 0.0], [40.0, 1.0]], "float32")
    h, gradient = value_and_gradient(tf.constant([[2.0], [3.0]]), times)

    def exact(t):
        return (900 * np.cos(t) + 30 * np.sin(t)) / 901

    np.testing.assert_allclose(h[:, 0], exact(times[1]), atol=1e-4)
    np.testing.assert_allclose(gradient[1], 30 * (np.cos(times[1]) - exact(times[1])), atol=3e-3)


@pytest.mark.parametrize("gradient", ["direct", "checkpointed", "backsolve"])
def test_a_field_that_is_defined_for_some_states_only_has_its_gradient(gradient):
    """`h' = sqrt(h) - 4 h`, of which a step over the whole interval would ask for the root of a negative number."""
    solver = RungeKutta(rtol=1e-6, atol=1e-6, max_steps=64)
    cell = ODERNNCell(layers.GRUCell(1), lambda h: tf.sqrt(h) - 4 * h, solver=solver, gradient=gradient)

    @tf.function(jit_compile=True)
    def value_and_gradient(h0):
        with tf.GradientTape() as tape:
            tape.watch(h0)
            h = cell.solve(h0, [0.0, 0.6]).ys[-1]
        return h, tape.gradient(h, h0)

    h, gradient = value_and_gradient(tf.constant([[1.0]]))
    # With u = sqrt(h), u' = 1/2 - 2 u.
    u = 0.25 + 0.75 * np.exp(-1.2)
    np.testing.assert_allclose(h, [[u**2]], rtol=1e-4)
    np.testing.assert_allclose(gradient, [[u * np.exp(-1.2)]], rtol=1e-3)


@pytest.mark.parametrize("evolve", [np.int64(1), range(1, 2), [-1]])
def test_the_index_of_a_state_may_be_any_integer(evolve):
    cell = keras_node.ODERNNCell(keras.layers.LSTMCell(2), keras.layers.Dense(2), evolve=evolve)
    assert cell.evolve == (1,)
