"""The loop of a recurrent layer in a graph, against Keras' own, in which the same layer runs eagerly or unrolled."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_node
from keras_node import ODERNN, NeuralCDE, RungeKutta

UNITS, FEATURES, BATCH, STEPS = 3, 2, 4, 4
COARSE = RungeKutta("heun", num_steps=2)
MASK = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


def mlp(units=UNITS):
    return keras.Sequential([layers.Dense(5, activation="tanh"), layers.Dense(units, bias_initializer="normal")])


def series():
    rng = np.random.default_rng(0)
    x, elapsed = rng.normal(size=(BATCH, STEPS, FEATURES)), rng.uniform(0.1, 1.0, size=(BATCH, STEPS))
    return tf.constant(x, tf.float32), tf.constant(np.cumsum(elapsed, axis=1), tf.float32)


def built(layer):
    """Returns the layer with its weights. A `tf.function` that makes them is traced twice."""
    layer.build((BATCH, STEPS, FEATURES))
    return layer


def results_and_gradients(layer, training=False, **inputs):
    """Everything the layer returns, and the gradients of a function of it all."""
    x, times = series()
    with tf.GradientTape() as tape:
        tape.watch([x, times])
        results = tf.nest.flatten(layer(x, times, training=training, **inputs))
        value = sum(tf.reduce_sum(tf.sin(r)) for r in results)
    return [*results, *tape.gradient(value, [x, times, *[v.value for v in layer.trainable_variables]])]


def assert_all_close(actual, expected, atol=2e-6):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


BACKWARDS = {"mask": MASK, "return_sequences": True, "zero_output_for_mask": True, "go_backwards": True}


@pytest.mark.parametrize(
    ("gradient", "options"),
    [
        ("backsolve", {}),
        ("backsolve", {"mask": MASK, "return_sequences": True, "return_state": True}),
        ("backsolve", BACKWARDS),
        ("checkpointed", BACKWARDS),
        ("direct", BACKWARDS),
        (keras_node.BacksolveAdjoint(num_checkpoints=1), {"mask": MASK}),
    ],
)
def test_the_loop_is_keras_own(gradient, options):
    options = dict(options)
    inputs = {"mask": options.pop("mask")} if "mask" in options else {}
    solver = RungeKutta("bosh3", rtol=1e-4) if isinstance(gradient, keras_node.BacksolveAdjoint) else COARSE
    layer = ODERNN(layers.LSTMCell(UNITS), mlp(), solver=solver, gradient=gradient, **options)
    expected = results_and_gradients(layer, **inputs)
    # A gradient that is not expected, and one that is.
    for training in (False, None) if gradient == "backsolve" and not options else (None,):
        assert_all_close(tf.function(results_and_gradients)(layer, training, **inputs), expected)


def test_inference_keeps_nothing_for_a_gradient():
    layer = ODERNN(layers.GRUCell(UNITS), mlp(), solver=COARSE, jit_compile=False)
    for training, keeps in ((False, False), (None, True)):
        function = tf.function(lambda *inputs, training=training: layer(*inputs, training=training))
        graph = function.get_concrete_function(*series()).graph
        assert any(op.type == "TensorListReserve" for op in graph.get_operations()) == keeps


def test_in_training_the_loop_and_its_gradient_are_a_program_each():
    layer = built(ODERNN(layers.GRUCell(UNITS), mlp(), solver=COARSE, jit_compile=True))
    function = tf.function(lambda: results_and_gradients(layer, training=True)).get_concrete_function()
    library = function.graph.as_graph_def().library
    compiled = [f for f in library.function if f.attr["_XlaMustCompile"].b]
    assert len(compiled) == 2
    assert all(any("While" in node.op for node in f.node_def) for f in compiled)
    assert not [op for op in function.graph.get_operations() if "While" in op.type]
    assert_all_close(function(), results_and_gradients(layer))


def test_any_batch_and_length_in_one_graph():
    layer = ODERNN(layers.GRUCell(UNITS), mlp(), solver=COARSE, return_sequences=True)
    x, times = series()

    def run(x, times, mask):
        with tf.GradientTape() as tape:
            tape.watch([x, times])
            y = layer(x, times, mask=mask, training=True)
            value = tf.reduce_sum(tf.sin(y))
        return [y, *tape.gradient(value, [x, times, layer.trainable_variables[0].value])]

    layer.build(x.shape)
    specs = [tf.TensorSpec((None, None, FEATURES)), tf.TensorSpec((None, None)), tf.TensorSpec((None, None), tf.bool)]
    function = tf.function(run, input_signature=specs)
    for rows, steps in ((4, 4), (2, 1)):
        part = x[:rows, :steps], times[:rows, :steps], tf.constant(MASK[:rows, :steps])
        assert_all_close(function(*part), run(*part))


@pytest.mark.parametrize("steps", [STEPS, 300])
def test_any_batch_without_xla(steps):
    layer = ODERNN(layers.SimpleRNNCell(UNITS), lambda h: -h, solver=RungeKutta("euler", num_steps=1))
    x, times = tf.ones((2, steps, 1)), tf.range(steps, dtype=tf.float32)[None] * tf.ones((2, 1))
    function = tf.function(layer, input_signature=[tf.TensorSpec((None, steps, 1)), tf.TensorSpec((None, steps))])
    np.testing.assert_allclose(function(x, times), tf.function(layer)(x, times), atol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_mask_of_dropout_is_the_same_on_the_way_back(jit_compile):
    cell = layers.GRUCell(UNITS, dropout=0.4, recurrent_dropout=0.4, seed=1)
    layer = ODERNN(cell, mlp(), solver=COARSE, return_sequences=True, jit_compile=jit_compile)
    layer.build((BATCH, STEPS, FEATURES))

    def run():
        return results_and_gradients(layer, training=True)

    function = tf.function(run)
    assert not np.allclose(function()[0], function()[0])
    seeds = [v for v in layer.non_trainable_variables if "seed" in v.path]
    start = [v.numpy() for v in seeds]
    first = function()
    for v, value in zip(seeds, start, strict=True):
        v.assign(value)
    # Eagerly Keras draws the same masks from the same seed, once.
    assert_all_close(first, run())


def test_masks_reach_stacked_cells_and_replace_nothing_of_them():
    """While a step runs, another thread may run the same cells."""
    cells = [layers.SimpleRNNCell(UNITS, dropout=0.5, seed=1), layers.SimpleRNNCell(UNITS, dropout=0.5, seed=2)]
    replaced = []

    def field(h):
        replaced.append([name for cell in cells for name in vars(cell) if "get_" in name and "mask" in name])
        return -h

    layer = ODERNN(layers.StackedRNNCells(cells), field, solver=COARSE, evolve=(0, 1), jit_compile=False)
    layer.build((BATCH, STEPS, FEATURES))
    x, times = series()
    seeds = [cell.seed_generator.state.numpy() for cell in cells]
    computed = tf.function(layer)(x, times, training=True)
    assert len(replaced) > 1 and not any(replaced)
    for cell, seed in zip(cells, seeds, strict=True):
        cell.seed_generator.state.assign(seed)
    np.testing.assert_allclose(computed, layer(x, times, training=True), rtol=1e-5)  # the loop of Keras
    assert not np.allclose(computed, layer(x, times, training=False))


def test_noise_in_the_field_is_of_one_solve_and_the_same_on_the_way_back():
    field = keras.Sequential([layers.Dense(UNITS, "tanh"), layers.Dropout(0.5, seed=2), layers.Dense(UNITS)])
    layer = ODERNN(layers.GRUCell(UNITS), field, solver=COARSE, return_sequences=True, jit_compile=False)
    x, times = series()
    layer.build(x.shape)
    (seed,) = [v for v in field.non_trainable_variables if "seed" in v.path]
    kernel = layer.trainable_variables[0]
    start = seed.numpy()

    @tf.function
    def value_and_gradient():
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(tf.sin(layer(x, times, training=True)))
        return value, tape.gradient(value, kernel.value)

    def again():
        seed.assign(start)
        return value_and_gradient()

    value, gradient = again()
    assert not np.array_equal(seed.numpy(), start)  # the next call has masks of its own
    assert value != value_and_gradient()[0]
    direction = tf.sign(gradient)
    kernel.assign_add(1e-2 * direction)
    above, _ = again()
    kernel.assign_sub(2e-2 * direction)
    below, _ = again()
    np.testing.assert_allclose((above - below) / 2e-2, tf.reduce_sum(gradient * direction), rtol=2e-3)


def test_a_failed_solve_raises_there_and_back_in_a_program_of_its_own():
    few = RungeKutta("bosh3", rtol=1e-6, max_steps=2)
    for where, options in (
        ("The solve failed", {"solver": few}),
        ("The solve of the adjoint failed", {"solver": COARSE, "gradient": keras_node.BacksolveAdjoint(few)}),
    ):
        layer = built(ODERNN(layers.GRUCell(UNITS), lambda h: -20 * h, **options))
        with pytest.raises(tf.errors.InvalidArgumentError, match=where):
            tf.function(lambda layer=layer: results_and_gradients(layer, training=True))()


def test_what_a_field_closes_over_has_its_gradient():
    x, times = series()
    scale, weight = tf.constant(0.5), keras.Variable(0.5)

    @tf.function
    def gradient(keras_variable):
        field = lambda h: -(weight if keras_variable else scale) * h  # noqa: E731
        with tf.GradientTape() as tape:
            tape.watch(scale)
            y = tf.reduce_sum(ODERNN(KEEP, field, solver=COARSE)(x, times) ** 2)
        return tape.gradient(y, weight.value if keras_variable else scale)

    with tf.GradientTape() as tape:
        y = tf.reduce_sum(ODERNN(KEEP, lambda h: -weight * h, solver=COARSE)(x, times) ** 2)
    expected = tape.gradient(y, weight.value)
    np.testing.assert_allclose(gradient(True), expected, rtol=1e-5)
    np.testing.assert_allclose(gradient(False), expected, rtol=1e-5)


class Keep(keras.Layer):
    """A cell that keeps its state, and takes its first from the input."""

    state_size = FEATURES

    def call(self, inputs, states):
        return states[0] + inputs, [states[0] + inputs]


KEEP = Keep()


@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed"])
def test_second_derivatives(gradient):
    # One gradient is that of the steps, the other that of the exact solution.
    exact = gradient == "checkpointed"
    solver, tolerance = (COARSE, 1e-4) if exact else (RungeKutta("bosh3", num_steps=4), 1e-3)
    layer = ODERNN(layers.SimpleRNNCell(UNITS), layers.Dense(UNITS, "tanh"), solver=solver, gradient=gradient)
    direct = ODERNN(layer.cell.cell, layer.cell.vector_field, solver=solver, gradient="direct")
    x, times = series()

    def product(layer):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                value = tf.reduce_sum(layer(x[:, :2], times[:, :2], training=True) ** 3)
            gradient = inner.gradient(value, x)
        return outer.gradient(gradient, x, tf.ones_like(gradient))

    expected = product(direct)
    np.testing.assert_allclose(tf.function(product)(built(layer)), expected, rtol=tolerance, atol=tolerance / 100)


def test_a_cell_that_adds_losses_is_refused():
    cell = layers.GRUCell(UNITS, activity_regularizer="l2")
    with pytest.raises(ValueError, match=r"cannot add losses.*Received: . loss"):
        tf.function(results_and_gradients)(ODERNN(cell, mlp(), solver=COARSE))


def test_cells_that_solve_inside_a_stack_train_and_fail_aloud():
    def layer_of(**options):
        inner = keras_node.ODERNNCell(layers.GRUCell(UNITS, dropout=0.1), mlp(), time_feature=False, **options)
        return built(ODERNN([layers.GRUCell(UNITS), inner], mlp(), solver=COARSE))

    layer = layer_of(solver=COARSE)
    assert all(np.all(np.isfinite(r)) for r in tf.function(lambda: results_and_gradients(layer, training=True))())
    failing = layer_of(solver=RungeKutta("bosh3", rtol=1e-7, max_steps=1))
    with pytest.raises(tf.errors.InvalidArgumentError, match="The solve failed"):
        tf.function(failing)(*series(), training=True)


@pytest.mark.parametrize("training", [False, True])
def test_statistics_count_every_solve_once(training):
    layer = built(ODERNN(layers.GRUCell(UNITS), mlp(), solver=COARSE, track_stats=True))
    tf.function(lambda: results_and_gradients(layer, training))()
    (steps,) = (m for m in layer.cell.statistic_metrics if m.kind == "steps")
    assert float(steps.count) == STEPS
    assert float(steps.result()) == 2 * (STEPS - 1) / STEPS  # none before the first observation


def test_a_controlled_equation_runs_in_it_too():
    layer = built(NeuralCDE(UNITS, solver=COARSE, return_sequences=True))
    assert_all_close(
        tf.function(results_and_gradients)(layer, training=True, mask=MASK), results_and_gradients(layer, mask=MASK)
    )
