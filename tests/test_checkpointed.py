"""CheckpointedAdjoint: equal to backpropagation through the accepted steps, whatever is kept of them."""

import numpy as np
import pytest
import tensorflow as tf
from steep import MATRIX, OWN, Y0, field, gradients_of

import keras_node


@pytest.mark.parametrize(
    ("ts", "options", "num_checkpoints"),
    [
        ([0.0, 1.2], {}, None),
        ([0.0, 1.2], {}, 3),
        ([1.1, 1.1, 0.6, 0.2, 0.1], {}, 1),
        ([1.1, 1.1, 0.6, 0.2, 0.1], {}, 8),
        (OWN, {}, None),
        (OWN, {}, 3),
        (OWN, {"per_sample": True}, 1),
        (OWN, {"per_sample": True}, 8),
        ([0.0, 0.5, 1.2], {"step_at": [0.25, 0.7]}, None),
        ([0.0, 0.5, 1.2], {"step_at": [0.25, 0.7]}, 3),
    ],
)
def test_it_is_the_gradient_of_the_discrete_solution(ts, options, num_checkpoints):
    solver = keras_node.RungeKutta("bosh3", rtol=1e-4, max_steps=256, **options)
    inputs = [Y0, MATRIX, tf.constant(ts, tf.float64)]
    stats = keras_node.odeint(field, Y0, ts, args=MATRIX, solver=solver).stats
    assert np.max(stats.num_rejected) > 0 and np.max(stats.num_steps) > 16  # several times more than checkpoints
    gradient = keras_node.CheckpointedAdjoint(num_checkpoints)
    # Only one in a graph, since to trace takes longer than to run. The others of `OWN` are in one below.
    compute = tf.function(gradients_of) if num_checkpoints == 3 and "step_at" in options else gradients_of
    for a, b in zip(compute(inputs, gradient, solver), gradients_of(inputs, "direct", solver), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("ts", "per_sample", "mode"), [([0.0, 0.5, 0.51, 1.2], False, "eager"), (OWN, True, "graph"), (OWN, False, "xla")]
)
def test_further_stages_of_dense_output_are_differentiated(ts, per_sample, mode):
    # The dense output of this method evaluates the field where a time falls into a step. It has many stages, so the
    # state is one tensor, and the field is short.
    solver = keras_node.RungeKutta("dopri8", rtol=1e-6, max_steps=64, per_sample=per_sample)

    def gradients_of(y0, matrix, ts, gradient, solver=solver):
        with tf.GradientTape() as tape:
            tape.watch([y0, matrix, ts])
            field = lambda t, y, matrix: tf.tanh(y @ matrix) * tf.sin(4 * t)  # noqa: E731
            ys = keras_node.odeint(field, y0, ts, args=matrix, gradient=gradient, solver=solver).ys
            value = tf.reduce_sum(ys**2 * tf.reshape(tf.range(1, 7, dtype=ys.dtype), (3, 2)))
        return tape.gradient(value, [y0, matrix, ts])

    inputs = [Y0["a"], MATRIX, tf.constant(ts, tf.float64)]
    compute = gradients_of if mode == "eager" else tf.function(gradients_of, jit_compile=mode == "xla")
    computed = compute(*inputs, "checkpointed")
    for a, b in zip(computed, gradients_of(*inputs, "direct"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    if mode != "eager":  # the others equal the same gradient, which is compared once with that of another method
        return
    tight = keras_node.RungeKutta("dopri5", rtol=1e-10, atol=1e-12)
    exact = tf.function(gradients_of)(*inputs, "backsolve", tight)
    for a, b in zip(computed, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize("options", [{"num_steps": 7}, {"step_size": 0.11}], ids=str)
def test_constant_steps(options):
    solver = keras_node.RungeKutta("rk38", **options)
    inputs = [Y0, MATRIX, tf.constant([0.0, 0.4, 1.0], tf.float64)]
    checkpointed = gradients_of(inputs, keras_node.CheckpointedAdjoint(num_checkpoints=3), solver)
    for a, b in zip(checkpointed, gradients_of(inputs, "direct", solver), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("num_checkpoints", "jit_compile"), [(None, True), (1, False)])
def test_xla_and_unknown_sizes(num_checkpoints, jit_compile):
    solver = keras_node.RungeKutta("bosh3", rtol=1e-4, max_steps=100)
    gradient = keras_node.CheckpointedAdjoint(num_checkpoints)
    inputs = [Y0, MATRIX, tf.constant([0.0, 0.4, 1.0], tf.float64)]
    specs = tf.nest.map_structure(lambda x: tf.TensorSpec([None] * x.shape.rank, x.dtype), inputs)
    compute = tf.function(
        lambda inputs: gradients_of(inputs, gradient, solver), input_signature=[specs], jit_compile=jit_compile
    )
    for a, b in zip(compute(inputs), gradients_of(inputs, "direct", solver), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradient", ["checkpointed", "reversible"])
def test_constant_steps_between_an_unknown_number_of_times(gradient):
    """Then it is not known before the graph runs how many steps there are, nor how many states to keep."""
    solver = keras_node.RungeKutta("heun", num_steps=3)
    inputs = [Y0, MATRIX, tf.constant([0.0, 0.4, 0.5, 0.9, 1.0], tf.float64)]
    specs = tf.nest.map_structure(lambda x: tf.TensorSpec([None] * x.shape.rank, x.dtype), inputs)
    compute = tf.function(lambda inputs: gradients_of(inputs, gradient, solver), input_signature=[specs])
    eager = gradients_of(inputs, gradient if gradient == "reversible" else "direct", solver)
    for a, b in zip(compute(inputs), eager, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_rejected_steps_cost_nothing_backwards():
    calls = []

    def counted(t, y, matrix):
        calls.append(1)
        return field(t, y, matrix)

    solver = keras_node.RungeKutta("bosh3", rtol=1e-4)
    with tf.GradientTape() as tape:
        tape.watch(Y0)
        solution = keras_node.odeint(counted, Y0, [0.0, 1.2], args=MATRIX, gradient="checkpointed", solver=solver)
    assert int(solution.stats.num_rejected) > 0
    calls.clear()
    tape.gradient(solution.ys, Y0)
    assert len(calls) == 3 * int(solution.stats.num_steps)


def test_eagerly_steps_take_room_as_they_are_taken():
    """A list of a billion entries would not be there in time."""
    solver = keras_node.RungeKutta("bosh3", rtol=1e-4, max_steps=10**9)
    inputs = [Y0, MATRIX, tf.constant([0.0, 1.2], tf.float64)]
    for a, b in zip(gradients_of(inputs, "checkpointed", solver), gradients_of(inputs, "direct", solver), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_a_failed_solve_has_a_gradient_of_nan():
    solver = keras_node.RungeKutta("bosh3", rtol=1e-6, max_steps=8)
    with tf.GradientTape() as tape:
        tape.watch(MATRIX)
        solution = keras_node.odeint(
            field, Y0, [0.0, 0.01, 5.0], args=MATRIX, gradient="checkpointed", solver=solver, throw=False
        )
        value = tf.reduce_sum(solution.ys["a"][1])
    assert int(solution.status) == keras_node.Status.MAX_STEPS and np.isfinite(value)
    assert np.isnan(tape.gradient(value, MATRIX)).all()


@pytest.mark.parametrize("num_checkpoints", [0, -1, 2.5])
def test_a_number_of_checkpoints_must_be_one(num_checkpoints):
    with pytest.raises(ValueError, match=f"num_checkpoints={num_checkpoints}"):
        keras_node.CheckpointedAdjoint(num_checkpoints)
    with pytest.raises(ValueError, match=f"num_checkpoints={num_checkpoints}"):
        keras_node.BacksolveAdjoint(num_checkpoints=num_checkpoints)
