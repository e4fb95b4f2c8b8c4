"""Gradients of every kind, against finite differences, against each other and in every mode."""

import functools
import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node.gradients import GRADIENTS

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
SHARED = np.array([0.0, 0.4, 0.4, 1.3])
REVERSED = np.array([1.0, 0.6, 0.1])
OWN = np.array([[0.0, 0.2, 0.5], [0.6, 0.2, 0.1], [1.2, 0.9, -0.3]])
MATRIX = tf.constant([[-0.1, 1.1, 0.3], [-1.2, 0.2, 0.1], [0.4, -0.3, -0.5]], tf.float64)
Y0 = tf.constant([[1.0, 0.5, -0.2], [0.3, -1.0, 0.8], [0.1, 0.9, 0.4]], tf.float64)


def field(t, y, matrix):
    return tf.tanh(y @ matrix) + 0.3 * tf.sin(2 * t) * y


def loss(y0, matrix, ts, gradient, solver):
    ys = keras_node.odeint(field, y0, ts, args=matrix, gradient=gradient, solver=solver).ys
    weights = tf.reshape(tf.cast(tf.range(1, tf.size(ys) + 1), ys.dtype), tf.shape(ys)) / 10
    return tf.reduce_sum(weights * tf.sin(ys))


def gradients_of(inputs, gradient, solver):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = loss(*inputs, gradient, solver)
    return tape.gradient(value, inputs)


def finite_differences(function, x, epsilon=1e-5):
    """Central differences of a scalar function."""
    flat, result = x.numpy().ravel(), []
    for i in range(flat.size):
        values = []
        for sign in (1, -1):
            moved = flat.copy()
            moved[i] += sign * epsilon
            values.append(function(tf.reshape(tf.constant(moved), x.shape)))
        result.append((values[0] - values[1]) / (2 * epsilon))
    return np.reshape(result, x.shape)


def perturbable(ts):
    """Repeated times may not be moved past each other; apart they can."""
    return not np.any(np.diff(ts, axis=0) == 0)


@functools.cache
def expected_gradients(ts):
    inputs = [Y0, MATRIX, tf.constant(TIMES[ts])]
    value = tf.function(lambda *inputs: loss(*inputs, "direct", keras_node.RungeKutta("dopri5", **TIGHT)))
    return [
        finite_differences(lambda x, i=i: value(*inputs[:i], x, *inputs[i + 1 :]), inputs[i])
        for i in range(2 + perturbable(TIMES[ts]))
    ]


TIMES = {"repeated": SHARED, "reversed": REVERSED, "own": OWN}


@pytest.mark.parametrize("per_sample", [False, True], ids=["joint", "per_sample"])
@pytest.mark.parametrize("ts", TIMES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_equal_finite_differences(gradient, ts, per_sample):
    solver = keras_node.RungeKutta("dopri5", per_sample=per_sample, **TIGHT)
    actual = gradients_of([Y0, MATRIX, tf.constant(TIMES[ts])], gradient, solver)
    for computed, expected in zip(actual, expected_gradients(ts), strict=False):
        np.testing.assert_allclose(computed, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"rtol": 1e-9, "atol": 1e-9}, {"num_steps": 30}, {"per_sample": True, **TIGHT}], ids=str
)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_each_of_two_equal_times_has_the_gradient_of_its_own_state(gradient, options):
    """Where finite differences would turn time back: moving a time but the first moves its state along the field."""
    solver = keras_node.RungeKutta("dopri5", **options)
    ts = tf.constant([0.2, 0.2, 0.7, 0.7, 1.0, 1.0], tf.float64)
    upstream = tf.constant(np.random.default_rng(0).normal(size=(6, 3, 3)))
    with tf.GradientTape() as tape:
        tape.watch(ts)
        ys = keras_node.odeint(field, Y0, ts, args=MATRIX, gradient=gradient, solver=solver).ys
        value = tf.reduce_sum(upstream * ys)
    rates = tf.stack([field(t, y, MATRIX) for t, y in zip(ts, ys, strict=True)])
    np.testing.assert_allclose(tape.gradient(value, ts)[1:], tf.reduce_sum(upstream * rates, [1, 2])[1:], rtol=1e-5)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_with_steps_of_their_own_samples_have_times_of_their_own_in_every_evaluation(gradient):
    ranks = set()

    def noting(t, y):
        ranks.add(t.shape.rank)
        return tf.cos(t) * y

    ts = tf.constant([0.0, 0.5, 1.0], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(ts)
        solver = keras_node.RungeKutta(per_sample=True)
        solution = keras_node.odeint(noting, tf.ones((2, 3), tf.float64), ts, gradient=gradient, solver=solver)
        value = tf.reduce_sum(solution.ys)
    assert tape.gradient(value, ts).shape == (3,)
    assert solution.ts.shape == (3,)
    assert ranks == {2}


def test_a_field_that_returns_the_state_itself_has_its_gradient():
    """The state and its rate of change are then one tensor, and a tape has one gradient for both."""
    for gradient in GRADIENTS:
        y0, ts = tf.constant([[0.5]], tf.float64), tf.constant([0.0, 1.0, 3.0], tf.float64)
        with tf.GradientTape() as tape:
            tape.watch((y0, ts))
            solver = keras_node.RungeKutta("dopri5", **TIGHT)
            value = keras_node.odeint(lambda t, y: y, y0, ts, gradient=gradient, solver=solver).ys[1, 0, 0]
        by_start, by_times = tape.gradient(value, (y0, ts))
        np.testing.assert_allclose(by_start, [[np.e]], rtol=1e-7, err_msg=gradient)
        np.testing.assert_allclose(by_times, [-np.e / 2, np.e / 2, 0], rtol=1e-7, atol=1e-7, err_msg=gradient)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_sample_at_rest_has_the_gradient_of_its_times(gradient, per_sample):
    solver = keras_node.RungeKutta("dopri5", per_sample=per_sample, **TIGHT)
    for ends in ([0.6, 0.2, 0.9], [0.0, 0.2, 0.5]):
        ts = tf.constant([[0.0, 0.2, 0.5], ends], tf.float64)
        with tf.GradientTape() as tape:
            tape.watch(ts)
            ys = keras_node.odeint(field, Y0, ts, args=MATRIX, gradient=gradient, solver=solver).ys
            value = tf.reduce_sum(ys[1])
        rates = field(ts[1][:, None], ys[1], MATRIX)
        np.testing.assert_allclose(tape.gradient(value, ts)[1], tf.reduce_sum(rates, -1), rtol=1e-5)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_times_may_be_tensors_in_a_list(gradient):
    t1 = tf.constant(2.0)
    with tf.GradientTape() as tape:
        tape.watch(t1)
        y1 = keras_node.odeint(lambda y: -y, tf.ones((1,)), [0.0, t1], gradient=gradient, solver="rk4").ys[-1, 0]
    np.testing.assert_allclose(tape.gradient(y1, t1), -np.exp(-2.0), rtol=1e-2)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_loss_may_look_up_some_of_the_states(gradient):
    with tf.GradientTape() as tape:
        tape.watch(Y0)
        ys = keras_node.odeint(lambda y: -y, Y0, [0.0, 1.0, 2.0], gradient=gradient, solver="rk4").ys
        value = tf.reduce_sum(tf.gather(ys, [1]))
    np.testing.assert_allclose(tape.gradient(value, Y0), np.full((3, 3), np.exp(-1)), rtol=1e-5)


@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed"])
def test_an_eager_tape_does_not_keep_what_the_solve_went_through(gradient):
    alive = []

    def remembered(y):
        dy = -y
        alive.append(weakref.ref(dy))
        return dy

    with tf.GradientTape() as tape:
        tape.watch(Y0)
        ys = keras_node.odeint(remembered, Y0, [0.0, 1.0], gradient=gradient, solver="rk4").ys
        gc.collect()
        kept = sum(reference() is not None for reference in alive)
    assert len(alive) >= 40
    assert kept <= 2
    assert tape.gradient(ys, Y0) is not None


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_are_the_same_eagerly_in_a_graph_and_under_xla(gradient, mode):
    solver = keras_node.RungeKutta("bosh3", rtol=1e-5, max_steps=64)
    inputs = [Y0, MATRIX, tf.constant(OWN)]
    eager = gradients_of(inputs, gradient, solver)
    compiled = tf.function(gradients_of, jit_compile=mode == "xla")(inputs, gradient, solver)
    for a, b in zip(compiled, eager, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("per_sample", [False, True], ids=["joint", "per_sample"])
def test_the_backward_solve_goes_on_with_the_step_of_the_forward_one(per_sample):
    solver, calls = keras_node.RungeKutta("tsit5", rtol=1e-5, atol=1e-5, per_sample=per_sample), []

    def counted(t, y):
        calls.append(t)
        return field(t, y, MATRIX)

    def evaluations(gradient):
        with tf.GradientTape() as tape:
            tape.watch(Y0)
            ys = keras_node.odeint(counted, Y0, [0.0, 3.0], gradient=gradient, solver=solver).ys
            y1 = ys[-1]
        calls.clear()
        return tape.gradient(y1, Y0), len(calls)

    computed, from_there = evaluations("backsolve")
    # One with a solver of its own knows nothing of the steps forwards.
    expected, anew = evaluations(keras_node.BacksolveAdjoint(solver))
    # The trial of a first step, and the short step that it gives.
    assert anew - from_there >= solver.tableau.num_stages
    np.testing.assert_allclose(computed, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("gradient", "ts"),
    [("backsolve", OWN), ("checkpointed", SHARED), ("direct", SHARED), ("reversible", OWN)],
    ids=["own", "shared", "shared", "own"],
)
def test_xla_compiles_once_for_all_values(gradient, ts):
    """What XLA takes for a constant is no parameter of the program, and a new value would compile it anew."""
    solver = keras_node.RungeKutta("bosh3", max_steps=8)
    inputs = [Y0, MATRIX, tf.constant(ts)]
    function = tf.function(lambda *inputs: gradients_of(list(inputs), gradient, solver), jit_compile=True)
    program = function.experimental_get_compiler_ir(*inputs)(stage="hlo")
    signature = program[program.index("ENTRY") :].split("->")[0]
    assert [signature.count(f"arg{i}") for i in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("norm", ["state", "full"])
def test_the_error_of_the_adjoint_falls_with_the_tolerances(norm):
    inputs = [Y0, MATRIX, tf.constant([0.0, 2.0], tf.float64)]
    exact = gradients_of(inputs, "direct", keras_node.RungeKutta("dopri5", rtol=1e-10, atol=1e-10))
    errors = []
    for rtol in (1e-3, 1e-5, 1e-7):
        solver = keras_node.RungeKutta("dopri5", rtol=rtol, atol=rtol)
        computed = gradients_of(inputs, keras_node.BacksolveAdjoint(norm=norm), solver)
        errors.append(max(np.max(np.abs(a - b)) for a, b in zip(computed, exact, strict=True)))
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0
    assert errors[2] < 1e-5


def test_many_weights_do_not_hide_the_error_of_the_adjoint():
    def gradient(norm):
        many = tf.zeros(10_000, tf.float64)
        with tf.GradientTape() as tape:
            tape.watch(Y0)
            solution = keras_node.odeint(
                lambda t, y, w: tf.sin(3 * y @ MATRIX) + 1e-9 * tf.reduce_sum(w),
                Y0,
                [0.0, 3.0],
                args=many,
                gradient=keras_node.BacksolveAdjoint(keras_node.RungeKutta("bosh3", rtol=1e-3), norm=norm),
            )
            final = solution.ys[-1]
        return tape.gradient(final, Y0)

    np.testing.assert_array_equal(gradient("full"), gradient("state"))


def test_the_full_norm_needs_times_that_samples_share():
    with pytest.raises(ValueError, match="Received: norm="):
        keras_node.odeint(lambda y: -y, Y0, OWN, gradient=keras_node.BacksolveAdjoint(norm="full"))


def test_the_backward_solve_may_have_a_solver_of_its_own():
    inputs = [Y0, MATRIX, tf.constant([0.0, 1.0], tf.float64)]
    exact = gradients_of(inputs, "direct", keras_node.RungeKutta("dopri5", **TIGHT))
    backward = keras_node.BacksolveAdjoint(solver=keras_node.RungeKutta("rk4", num_steps=40))
    computed = gradients_of(inputs, backward, keras_node.RungeKutta("dopri5", **TIGHT))
    for a, b in zip(computed, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_direct_gradients_of_constant_steps_are_those_of_the_discrete_solution(gradient, solver):
    if gradient == "backsolve":
        pytest.skip("the adjoint's gradient is that of the exact solution")
    inputs = [Y0, MATRIX, tf.constant([0.0, 0.5, 1.5], tf.float64)]
    solver = keras_node.solvers.get(solver)
    actual = gradients_of(inputs, gradient, solver)
    value = tf.function(lambda *inputs: loss(*inputs, gradient, solver))
    for i, computed in enumerate(actual):
        expected = finite_differences(lambda x, i=i: value(*inputs[:i], x, *inputs[i + 1 :]), inputs[i])
        np.testing.assert_allclose(computed, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_nest_of_states_and_of_arguments_has_gradients(gradient):
    y0 = {"a": tf.ones((2, 1), tf.float64), "b": (tf.constant([[0.5], [1.0]], tf.float64),)}
    args = {"frequency": tf.constant(1.7, tf.float64), "count": tf.constant(2)}

    def oscillator(t, y, args):
        factor = args["frequency"] * tf.cast(args["count"], tf.float64)
        return {"a": factor * y["b"][0], "b": (-factor * y["a"],)}

    solver = keras_node.RungeKutta("dopri5", **TIGHT)
    with tf.GradientTape() as tape:
        tape.watch([y0, args["frequency"]])
        ys = keras_node.odeint(oscillator, y0, [0.0, 1.0], args=args, solver=solver, gradient=gradient).ys
        value = tf.reduce_sum(ys["a"][-1])
    dy0, dfrequency = tape.gradient(value, [y0, args["frequency"]])
    w = 2 * 1.7
    np.testing.assert_allclose(dy0["a"], np.full((2, 1), np.cos(w)), rtol=1e-6)
    np.testing.assert_allclose(dy0["b"][0], np.full((2, 1), np.sin(w)), rtol=1e-6)
    np.testing.assert_allclose(dfrequency, 2 * (-2 * np.sin(w) + 1.5 * np.cos(w)), rtol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_weights_unused_and_frozen_get_zeros_and_nothing(gradient):
    class Field(keras.layers.Layer):
        def build(self, shape):
            self.used = self.add_weight(shape=(3,), initializer="ones", name="used")
            self.unused = self.add_weight(shape=(3,), initializer="ones", name="unused")
            self.frozen = self.add_weight(shape=(3,), initializer="ones", trainable=False, name="frozen")

        def call(self, y):
            return -self.used * self.frozen * y

    layer = Field(dtype="float64")
    y0 = tf.ones((2, 3), tf.float64)
    solver = keras_node.RungeKutta("dopri5", **TIGHT)
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(keras_node.odeint(layer, y0, [0.0, 1.0], solver=solver, gradient=gradient).ys[-1])
    used, unused = tape.gradient(value, [layer.used.value, layer.unused.value])
    np.testing.assert_allclose(used, -2 * np.exp(-1) * np.ones(3), rtol=1e-6)
    if gradient != "direct":  # plain backpropagation says None, as for any unused weight
        np.testing.assert_array_equal(unused, np.zeros(3))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_callable_over_a_keras_variable_has_its_gradient(gradient):
    rate = keras.Variable(0.5, dtype="float64")
    solver = keras_node.RungeKutta("dopri5", **TIGHT)
    with tf.GradientTape() as tape:
        ys = keras_node.odeint(
            lambda y: -rate * y, tf.ones((1,), tf.float64), [0.0, 2.0], solver=solver, gradient=gradient
        ).ys
        value = tf.reduce_sum(ys[-1])
    np.testing.assert_allclose(tape.gradient(value, rate.value), -2 * np.exp(-1.0), rtol=1e-6)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_a_failed_backward_solve_gives_nan_rather_than_a_number(mode):
    backward = keras_node.BacksolveAdjoint(solver=keras_node.RungeKutta("tsit5", rtol=1e-9, atol=1e-9, max_steps=2))

    def gradient(y0):
        with tf.GradientTape() as tape:
            tape.watch(y0)
            ys = keras_node.odeint(lambda t, y: tf.sin(9 * t) * y, y0, [0.0, 5.0], gradient=backward, throw=False).ys
            value = tf.reduce_sum(ys[-1])
        return tape.gradient(value, y0)

    run = gradient if mode == "eager" else tf.function(gradient, jit_compile=mode == "xla")
    assert np.isnan(run(tf.ones((2,)))).all()


def test_the_full_norm_needs_no_parameters():
    y0 = tf.constant([1.0, 2.0], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(y0)
        gradient = keras_node.BacksolveAdjoint(norm="full")
        solver = keras_node.RungeKutta("tsit5", rtol=1e-8, atol=1e-10)
        y1 = keras_node.odeint(lambda y: -y, y0, [0.0, 1.0], gradient=gradient, solver=solver).ys[-1]
    np.testing.assert_allclose(tape.gradient(y1, y0), [np.exp(-1)] * 2, rtol=1e-6)


def test_the_adjoint_of_a_sample_does_not_depend_on_the_others():
    rates, y0 = tf.constant([[1.0], [30.0]], tf.float64), tf.ones((2, 1), tf.float64)
    solver = keras_node.RungeKutta("tsit5", per_sample=True)

    def gradient_of(y0, rates):
        with tf.GradientTape() as tape:
            tape.watch(y0)
            y1 = keras_node.odeint(lambda t, y, k: -k * tf.sin(y), y0, [0.0, 1.0], args=rates, solver=solver).ys[-1]
        return tape.gradient(y1, y0)

    together = gradient_of(y0, rates)
    for i in range(2):
        alone = gradient_of(y0[i : i + 1], rates[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-12)
