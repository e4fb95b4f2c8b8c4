"""The layer for irregular series, against a Python loop of solves and cell calls."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_node
from keras_node import ODERNN, ODERNNCell, RungeKutta

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


def mlp(units=UNITS):
    return keras.Sequential([layers.Dense(6, activation="tanh"), layers.Dense(units, bias_initializer="normal")])


def ode_gru(**kwargs):
    return ODERNN(layers.GRUCell(UNITS), mlp(), **{"solver": COARSE, **kwargs})


def series(dtype="float32", steps=STEPS):
    """Observations and their times; two observations of the first sample are simultaneous."""
    x = np.random.normal(size=(BATCH, steps, FEATURES))
    times = 3 + np.cumsum(np.random.uniform(0.1, 1.5, size=(BATCH, steps)), axis=1)
    times[0, 2] = times[0, 1]
    return x.astype(dtype), times.astype(dtype)


def in_graph(function, **kwargs):
    return tf.function(function, autograph=False, **kwargs)


def reference(layer, x, times, h, valid=None, backwards=False):
    """Outputs of a Python loop over the samples and their valid steps; masked steps repeat the last output, or zero."""
    cell, outputs = layer.cell, []
    for b in range(x.shape[0]):
        state, t, row = h[b : b + 1], None, []
        for i in reversed(range(x.shape[1])) if backwards else range(x.shape[1]):
            if valid is None or valid[b, i]:
                if t is not None:
                    state = keras_node.odeint(cell.vector_field, state, [t, times[b, i]], solver=cell.solver).ys[-1]
                _, (state,) = cell.cell(x[b : b + 1, i], [state])
                t = times[b, i]
            row.append(tf.zeros_like(state[0]) if t is None else state[0])
        outputs.append(tf.stack(row))
    return tf.stack(outputs)


@pytest.mark.parametrize("backwards", [False, True])
def test_it_is_a_solve_to_every_observation_and_a_call_of_the_cell(backwards, float64):
    layer = ode_gru(solver=PRECISE, return_sequences=True, go_backwards=backwards)
    x, times = (tf.constant(a) for a in series("float64", steps=4))
    h0 = tf.random.normal((BATCH, UNITS), dtype="float64")
    valid = np.array([[True, True, True, True], [True, False, True, False]])
    layer.build(x.shape)
    variables = [v.value for v in layer.trainable_variables]
    assert len(variables) == 7

    def outputs_and_gradients(run):
        with tf.GradientTape() as tape:
            tape.watch([x, times, h0])
            outputs = run()
            loss = tf.reduce_sum(outputs[:, -1] ** 2) + tf.reduce_sum(tf.sin(outputs[:, 1:3]))
        return outputs, tape.gradient(loss, [x, times, h0, *variables])

    outputs, gradients = in_graph(lambda: outputs_and_gradients(lambda: layer(x, times, valid, [h0])))()
    expected_outputs, expected = outputs_and_gradients(lambda: reference(layer, x, times, h0, valid, backwards))
    np.testing.assert_allclose(outputs, expected_outputs, atol=1e-8)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, atol=1e-7)


def test_a_masked_step_changes_nothing_whatever_it_holds():
    layer = ode_gru()
    x, times = series()
    mask = np.array([[False, True, True, False, True], [True, False, False, True, False]])
    expected = [layer(x[b : b + 1, mask[b]], times[b : b + 1, mask[b]])[0] for b in range(BATCH)]
    x[~mask], times[~mask] = np.nan, [np.nan, np.inf, -1, 0, 1e9]
    with tf.GradientTape() as tape:
        output = layer(x, times, mask=mask)
    np.testing.assert_allclose(output, expected, atol=1e-6)
    assert all(np.all(np.isfinite(g)) for g in tape.gradient(output, layer.trainable_variables))


def test_a_sample_without_observations_keeps_its_initial_state():
    layer = ode_gru(return_state=True)
    x, times = series()
    h0 = tf.random.normal((BATCH, UNITS))
    _, h = layer(x, times, mask=np.array([[False] * STEPS, [True] * STEPS]), initial_state=[h0])
    np.testing.assert_array_equal(h[0], h0[0])


def test_it_takes_the_mask_of_its_input():
    x, times = series()
    mask = np.array([[True] * STEPS, [True] * 3 + [False] * 2])
    layer = ode_gru(return_sequences=True)
    masked = layers.Masking()(x * mask[..., None])
    np.testing.assert_array_equal(layer(masked, times), layer(x, times, mask=mask))

    tokens, stamps = keras.Input((None,), dtype="int32"), keras.Input((None,))
    y = ode_gru(return_sequences=True)(layers.Embedding(9, 3, mask_zero=True)(tokens), stamps)
    model = keras.Model([tokens, stamps], layers.GlobalAveragePooling1D()(y))
    words = np.array([[3, 4, 5], [6, 7, 8]])
    padded = np.pad(words, [(0, 0), (0, 2)])
    stamps = np.pad(times[:, :3], [(0, 0), (0, 2)])
    np.testing.assert_allclose(model([padded, stamps]), model([words, times[:, :3]]), atol=1e-6)


def test_only_differences_of_times_matter_and_large_ones_keep_their_digits():
    layer = ode_gru()
    x, _ = series()
    seconds = np.array([[0, 1, 1, 3, 4], [0, 2, 3, 3, 6]])
    expected = layer(x, seconds.astype("float32"))
    for times in (seconds + 1_700_000_000, seconds + 1_700_000_000.25, (seconds - 7.5).astype("float32")):
        np.testing.assert_allclose(layer(x, times), expected, atol=1e-6)


def test_a_regular_series_equals_a_cell_with_an_interval():
    layer, (x, _) = ode_gru(), series()
    regular = layers.RNN(ODERNNCell(layer.cell.cell, layer.cell.vector_field, time_feature=False, solver=COARSE))
    first = layer(x[:, :1], np.zeros((BATCH, 1)))
    times = np.tile(np.arange(STEPS, dtype="float32"), (BATCH, 1))
    np.testing.assert_allclose(layer(x, times), regular(x[:, 1:], initial_state=[first]), atol=1e-6)


def test_times_may_be_the_last_channel():
    layer, (x, times) = ode_gru(), series()
    stamped = ODERNN(layer.cell.cell, layer.cell.vector_field, solver=COARSE, time_feature=True)
    np.testing.assert_array_equal(stamped(np.concatenate([x, times[..., None]], axis=-1)), layer(x, times))


def test_bidirectional_is_one_layer_each_way(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, FEATURES + 1)),
            layers.Masking(),
            layers.Bidirectional(ode_gru(time_feature=True, return_sequences=True), merge_mode=None),
        ]
    )
    x, times = series()
    stamped = np.concatenate([x, times[..., None]], axis=-1)
    stamped[1, 3:] = 0
    forward, backward = model(stamped)
    both, mask = model.layers[-1], np.any(stamped, axis=-1)
    np.testing.assert_allclose(forward, both.forward_layer(stamped, mask=mask), atol=1e-6)
    np.testing.assert_allclose(backward[:, ::-1], both.backward_layer(stamped, mask=mask), atol=1e-6)
    assert np.all(forward[1, 3:] == 0)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(stamped)[1], backward)


def test_padding_changes_nothing_for_the_others(float64):
    """Samples share the error norm of an adaptive solve, and a masked step has no error."""
    layer = ode_gru(solver="tsit5", return_sequences=True)
    x, times = series("float64")
    layer.build(x.shape)
    layer.set_weights([3 * w for w in layer.get_weights()])  # so that the error decides about the steps
    mask = np.array([[True, True, False, True, True], [True, True, True, True, False]])

    @in_graph
    def outputs_and_gradients(x, times, mask):
        with tf.GradientTape() as tape:
            outputs = layer(x, times, mask=mask)[:BATCH, :STEPS]
            value = tf.reduce_sum(tf.sin(outputs))
        return outputs, tape.gradient(value, layer.trainable_variables)

    padding = [(0, 30), (0, 4)]
    padded = np.pad(x, [*padding, (0, 0)]), np.pad(times, padding), np.pad(mask, padding)
    outputs, gradients = outputs_and_gradients(*padded)
    expected, expected_gradients = outputs_and_gradients(x, times, mask)
    np.testing.assert_allclose(outputs, expected, rtol=1e-10)
    for actual, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(actual, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_stateful_layer_goes_on_where_and_when_it_stopped(backwards):
    layer, (x, times) = ode_gru(go_backwards=backwards), series()
    stateful = ODERNN(layer.cell.cell, layer.cell.vector_field, solver=COARSE, stateful=True, go_backwards=backwards)
    mask = np.array([[True] * STEPS, [False, True, False, False, True]])
    parts = [slice(3, None), slice(0, 3)] if backwards else [slice(0, 3), slice(3, None)]
    for _ in range(2):
        for part in parts:
            output = stateful(x[:, part], times[:, part], mask=mask[:, part])
        np.testing.assert_allclose(output, layer(x, times, mask=mask), atol=1e-6)
        stateful.reset_state()


def test_a_stateful_layer_is_saved_and_copied_without_states_and_their_times(tmp_path):
    x, times = series()
    inputs = [keras.Input(batch_shape=x.shape), keras.Input(batch_shape=times.shape)]
    layer = ODERNN(layers.GRUCell(UNITS), mlp(), solver=COARSE, stateful=True)
    model = keras.Model(inputs, layer(*inputs))
    expected = model([x, times])
    model.save(tmp_path / "model.keras")
    model.export(tmp_path / "served", verbose=False)
    loaded, clone = keras.models.load_model(tmp_path / "model.keras"), keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for fresh in (loaded, clone):
        np.testing.assert_allclose(fresh([x, times]), expected, atol=1e-6)
        np.testing.assert_allclose(fresh.layers[-1].last_time, times[:, -1])
    # Files of earlier versions hold the times.
    layer.load_own_variables({"0": np.zeros(len(x))})


def test_last_states_are_initial_states_of_another_call():
    layer = ODERNN(layers.LSTMCell(UNITS), mlp(), solver=COARSE, return_state=True)
    x, times = series()
    _, *states = layer(x[:, :3], times[:, :3])
    output, _, _ = layer(x[:, 2:], times[:, 2:], initial_state=states)
    assert output.shape == (BATCH, UNITS)

    inputs = [keras.Input((None, FEATURES)), keras.Input((None,))]
    _, *symbolic = layer(*inputs)
    model = keras.Model(inputs, layer(*inputs, initial_state=symbolic))
    for actual, expected in zip(model([x, times]), layer(x, times, initial_state=layer(x, times)[1:]), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_a_list_of_cells_is_stacked():
    cells = [layers.LSTMCell(UNITS), layers.GRUCell(2)]
    layer = ODERNN(cells, lambda h: -h, solver=COARSE, evolve=(0, 2), return_state=True)
    output, first, second = layer(*series())
    assert output.shape == (BATCH, 2)
    assert [s.shape[-1] for s in keras.tree.flatten((first, second))] == [UNITS, UNITS, 2]


def test_an_unrolled_layer_gives_the_same():
    layer, (x, times) = ode_gru(), series()
    unrolled = ODERNN(layer.cell.cell, layer.cell.vector_field, solver=COARSE, unroll=True)
    np.testing.assert_allclose(unrolled(x, times), layer(x, times), atol=1e-6)


def test_times_that_decrease_are_refused_where_they_can_be_seen():
    layer, (x, times) = ode_gru(), series()
    times[1, 3] = times[1, 1]
    with pytest.raises(ValueError, match=r"must not decrease.*Received: times=\[.*\] for sample 1"):
        layer(x, times)
    with pytest.raises(tf.errors.InvalidArgumentError, match="must not decrease"):
        in_graph(layer)(tf.constant(x), tf.constant(times))
    times[1, 3] = np.nan
    with pytest.raises(ValueError, match="must be finite"):
        layer(x, times)
    with pytest.raises(ValueError, match="must be finite"):
        layer(x[:, 3:], times[:, 3:])
    layer(x, times, mask=np.isfinite(times))


def test_under_xla_times_that_decrease_give_nan_for_their_sample():
    layer, (x, times) = ode_gru(stateful=True, return_state=True, solver=RungeKutta("euler", num_steps=1)), series()
    bad = times.copy()
    bad[1, 3] = times[1, 1]
    compiled = in_graph(layer, jit_compile=True)
    expected, _ = compiled(tf.constant(x), tf.constant(times))
    layer.reset_state()
    for result in compiled(tf.constant(x), tf.constant(bad)):
        np.testing.assert_array_equal(result[0], expected[0])
        assert np.all(np.isnan(result[1]))
    output, _ = compiled(tf.constant(x), tf.constant(times + 100))
    assert np.all(np.isfinite(output[0]))
    assert np.all(np.isnan(output[1]))


@pytest.mark.parametrize(
    ("x_shape", "times_shape", "message"),
    [
        ((2, 5), (2, 5), r"\(batch, T, features\).*Received: x.shape=\(2, 5\)"),
        ((2, 5, 3), (2, 5, 1), r"one time for every step.*Received: times.shape=\(2, 5, 1\)"),
        ((2, 5, 3), (2, 4), r"one time for every step.*Received: times.shape=\(2, 4\)"),
        ((2, 5, 3), None, "Received: times=None, time_feature=False"),
    ],
)
def test_inputs_of_another_shape_are_refused(x_shape, times_shape, message):
    times = None if times_shape is None else np.zeros(times_shape)
    with pytest.raises(ValueError, match=message):
        ode_gru()(np.zeros(x_shape), times)


@pytest.mark.parametrize(
    "cell", [layers.GRU(UNITS), layers.GRUCell, layers.Dense(UNITS)], ids=["layer", "class", "Dense"]
)
def test_what_is_not_a_cell_is_refused(cell):
    with pytest.raises(TypeError, match=r"such as `keras.layers.GRUCell\(32\)`. Received: cell=<"):
        ODERNN(cell, mlp())


def test_dates_are_refused():
    x, _ = series()
    days = np.tile(np.arange(STEPS).astype("M8[D]"), (BATCH, 1))
    for dates in (days, days.tolist()):
        with pytest.raises(ValueError, match="Turn dates into the time since the first of them"):
            ode_gru()(x, dates)


def test_the_field_is_that_of_the_cell():
    layer = ode_gru()
    assert layer.vector_field is layer.cell.vector_field


def test_a_layer_that_reads_times_from_its_input_takes_no_others():
    x, times = series()
    with pytest.raises(ValueError, match="not both"):
        ode_gru(time_feature=True)(x, times)


def test_under_a_mixed_policy_times_keep_their_digits():
    x, times = series()
    mixed = ODERNN(layers.GRUCell(UNITS, dtype="mixed_float16"), lambda h: 1 - h, return_sequences=True)
    single = ODERNN(layers.GRUCell(UNITS), lambda h: 1 - h, return_sequences=True)
    single.build(x.shape)
    y = mixed(x, times + 1000)
    single.set_weights(mixed.get_weights())
    assert y.dtype == "float16"
    np.testing.assert_allclose(y, single(x, times), atol=5e-3)


def test_it_trains_alike_with_and_without_xla_and_is_saved_and_exported(tmp_path):
    x, times = series()
    mask = np.array([[True] * STEPS, [True] * 3 + [False] * 2])
    inputs = [keras.Input((None, FEATURES)), keras.Input((None,)), keras.Input((None,), dtype="bool")]
    h = ODERNN(layers.LSTMCell(UNITS), mlp(), solver=COARSE)(inputs[0], inputs[1], mask=inputs[2])
    model = keras.Model(inputs, layers.Dense(1)(h))
    start, losses = model.get_weights(), []
    for jit_compile in (False, True):
        model.set_weights(start)
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
        history = model.fit([x, times, mask], np.ones((BATCH, 1)), epochs=5, verbose=0)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[0][-1] < 0.7 * losses[0][0]

    model.save(tmp_path / "model.keras")
    data = [x[:, :4], times[:, :4], mask[:, :4]]
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(data), model(data))
    model.export(tmp_path / "served", verbose=False)
    data = [a[:1] for a in data]
    served = tf.saved_model.load(str(tmp_path / "served"))
    np.testing.assert_allclose(served.serve(data), model(data), atol=1e-6)


def test_its_config_makes_an_equal_layer():
    layer = ode_gru(
        evolve=(0,),
        gradient="direct",
        time_feature=True,
        return_sequences=True,
        return_state=True,
        go_backwards=True,
        stateful=True,
        unroll=True,
        zero_output_for_mask=True,
        name="irregular",
    )
    clone = ODERNN.from_config(layer.get_config())
    assert clone.get_config() == layer.get_config()
    assert clone.name == "irregular"
    assert clone.go_backwards
    assert clone.cell.vector_field is not layer.cell.vector_field


def test_missing_channels_are_masked_out():
    layer, (x, times) = ode_gru(return_sequences=True), series()
    observed = np.random.uniform(size=x.shape) > 0.5
    observed[:, 2] = False

    def run(x):
        channels = np.concatenate([np.where(observed, x, 0), observed], axis=-1).astype("float32")
        return layer(channels, times, mask=observed.any(axis=-1))

    y = run(x)
    np.testing.assert_array_equal(run(np.where(observed, x, 99.0)), y)
    np.testing.assert_array_equal(y[:, 2], y[:, 1])


@pytest.mark.parametrize("make", [ode_gru, lambda: keras_node.NeuralCDE(UNITS, layers.Dense(UNITS * (1 + FEATURES)))])
def test_times_may_be_a_list_and_a_series_has_a_step(make):
    layer, (x, times) = make(), series()
    np.testing.assert_allclose(layer(x, times.tolist()), layer(x, times), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer(x, times=times.tolist()), layer(x, times), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"needs one step or more.*Received: x.shape=\(2, 0, 3\)"):
        layer(x[:, :0], times[:, :0])


@pytest.mark.parametrize(
    "layer",
    [
        ode_gru,
        lambda **options: ODERNNCell(layers.GRUCell(UNITS), mlp(), **options),
        lambda **options: keras_node.NeuralCDE(UNITS, mlp(), **options),
        lambda **options: keras_node.ODELayer(mlp(), **options),
        lambda **options: keras_node.LatentODE(UNITS, **options),
        lambda **options: keras_node.ContinuousFlow(UNITS, mlp(), **options),
    ],
)
def test_every_layer_has_the_options_of_a_solve(layer):
    options = {"solver": COARSE, "gradient": "checkpointed", "jit_compile": False, "track_stats": True}
    made = layer(**options)
    again = type(made).from_config(made.get_config())
    for copy in (made, again):
        solving = getattr(copy, "dynamics", copy)
        assert solving.solver == COARSE and solving.track_stats
        assert isinstance(solving.gradient, keras_node.CheckpointedAdjoint)
        assert solving.options.jit_compile is False
    solving = getattr(again, "dynamics", again)
    solving.solver = "dopri5"
    assert again.get_config()["solver"]["config"]["method"] == "dopri5"
    with pytest.raises(ValueError, match='`jit_compile` must be `True`, `False` or "auto"'):
        layer(**{**options, "jit_compile": "always"})
    with pytest.raises(ValueError, match='With gradient="direct" a solve cannot be compiled separately'):
        layer(gradient="direct", jit_compile=True)


def test_an_error_shows_the_solver_that_was_given():
    layer = ODERNN(layers.GRUCell(UNITS), mlp(), gradient=keras_node.BacksolveAdjoint(norm="full"))
    with pytest.raises(ValueError, match=r"solver=RungeKutta\('tsit5', first_step=inf\)"):
        layer(*series())
