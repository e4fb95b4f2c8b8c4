"""Paths through irregular observations: beside NumPy and SciPy, by finite differences, and inside fields."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.interpolate import CubicHermiteSpline

import keras_node
from keras_node import ControlPath, control_path, trees
from keras_node.control import INTERPOLATIONS, running_maximum

BATCH, STEPS, CHANNELS = 3, 6, 2
RNG = np.random.default_rng(0)
TIMES = np.cumsum(RNG.uniform(0.1, 1, (BATCH, STEPS)), axis=1)
VALUES = RNG.normal(size=(BATCH, STEPS, CHANNELS))
QUERIES = np.linspace(-0.5, 7, 60)


def at(t):
    """Times of all samples, as a field would get them."""
    return tf.constant(np.broadcast_to(np.asarray(t)[:, None], (BATCH, len(t), 1)))


def reference(kind, times, x):
    """The path through one channel of one sample, and its derivative."""
    inside = (times[0] <= QUERIES) & (times[-1] >= QUERIES)
    if kind == "rectilinear":
        last = np.searchsorted(times, QUERIES, side="right") - 1
        return x[np.maximum(last, 0)], np.zeros_like(QUERIES)
    slopes = np.diff(x) / np.diff(times)
    if kind == "linear":
        piece = np.clip(np.searchsorted(times, QUERIES, side="right") - 1, 0, len(slopes) - 1)
        return np.interp(QUERIES, times, x), np.where(inside, slopes[piece], 0)
    spline = CubicHermiteSpline(times, x, np.concatenate([slopes[:1], slopes]))
    clipped = np.clip(QUERIES, times[0], times[-1])
    return spline(clipped), np.where(inside, spline(clipped, 1), 0)


@pytest.mark.parametrize("kind", INTERPOLATIONS)
def test_a_path_is_that_of_numpy_and_scipy(kind):
    path = control_path(tf.constant(TIMES), tf.constant(VALUES), interpolation=kind)
    actual, rates = path(at(QUERIES)), path.derivative(at(QUERIES))
    for b in range(BATCH):
        for c in range(CHANNELS):
            expected, expected_rates = reference(kind, TIMES[b], VALUES[b, :, c])
            np.testing.assert_allclose(actual[b, :, c], expected, atol=1e-12)
            np.testing.assert_allclose(rates[b, :, c], expected_rates, atol=1e-12)


@pytest.mark.parametrize("kind", INTERPOLATIONS)
def test_it_passes_through_the_observations(kind):
    path = control_path(tf.constant(TIMES), tf.constant(VALUES), interpolation=kind)
    np.testing.assert_allclose(path(tf.constant(TIMES[..., None])), VALUES, atol=1e-14)


def test_at_the_last_knot_the_derivative_is_that_of_the_piece_before():
    path = control_path([0.0, 1.0, 3.0], tf.constant([[[0.0], [1.0], [5.0]]]), interpolation="linear")
    rates = [float(path.derivative(t)[0, 0]) for t in (0.0, 1.0, 3.0, 3.001, -0.001)]
    np.testing.assert_allclose(rates, [1, 2, 2, 0, 0])


def test_times_may_be_shared_and_t_has_the_rank_of_a_state():
    shared, own = (control_path(tf.constant(t), tf.constant(VALUES)) for t in (TIMES[0], np.tile(TIMES[:1], (3, 1))))
    for t in (1.0, np.full((BATCH, 1), 1.0), np.full((BATCH, 1, 1), 1.0)):
        np.testing.assert_array_equal(shared(t), own(t))
    assert shared(1.0).shape == (BATCH, CHANNELS)
    assert shared(np.full((BATCH, 1), 1.0)).shape == (BATCH, CHANNELS)
    assert shared(np.full((BATCH, 1, 1), 1.0)).shape == (BATCH, 1, CHANNELS)
    single = control_path(tf.constant(TIMES[0]), tf.constant(VALUES[:1]))
    np.testing.assert_allclose(single(np.full((BATCH, 1), 1.0)), np.tile(single(1.0), (BATCH, 1)))


@pytest.mark.parametrize("kind", INTERPOLATIONS)
def test_missing_values_lie_between_those_observed(kind):
    observed = np.array([1, 0, 0, 1, 1, 0], bool), np.array([0, 1, 0, 1, 0, 1], bool)
    values = VALUES[0].copy()
    for c in range(CHANNELS):
        values[~observed[c], c] = np.nan
    filled = np.empty_like(values)
    for c, seen in enumerate(observed):
        filled[:, c] = np.interp(TIMES[0], TIMES[0][seen], values[seen, c])
        if kind == "rectilinear":
            filled[:, c] = [([0.0, *values[: i + 1, c][seen[: i + 1]]])[-1] for i in range(STEPS)]
    # The third step is no observation of any channel.
    knots = np.array([0, 1, 3, 4, 5])
    expected = control_path(tf.constant(TIMES[:1, knots]), tf.constant(filled[None, knots]), interpolation=kind)
    for x, mask in ((values, None), (np.where(np.isnan(values), 9.0, values), np.stack(observed, axis=-1)[None])):
        path = control_path(tf.constant(TIMES[:1]), tf.constant(x[None]), mask, kind)
        np.testing.assert_allclose(path(at(QUERIES)[:1]), expected(at(QUERIES)[:1]), atol=1e-12)


@pytest.mark.parametrize("kind", INTERPOLATIONS)
def test_masked_steps_change_nothing_whatever_they_hold(kind):
    keep = np.array([False, True, True, False, True, True, False, False])
    times, values = np.full((BATCH, 8), np.nan), np.full((BATCH, 8, CHANNELS), np.inf)
    times[:, keep], values[:, keep] = TIMES[:, :4], VALUES[:, :4]
    mask = tf.constant(np.tile(keep, (BATCH, 1)))
    expected = control_path(tf.constant(TIMES[:, :4]), tf.constant(VALUES[:, :4]), interpolation=kind)
    values = tf.constant(values)
    with tf.GradientTape() as tape:
        tape.watch(values)
        path = control_path(tf.constant(times), values, mask, kind)
        value = path(at(QUERIES))
    np.testing.assert_allclose(value, expected(at(QUERIES)), atol=1e-12)
    np.testing.assert_allclose(path.derivative(at(QUERIES)), expected.derivative(at(QUERIES)), atol=1e-12)
    gradient = tape.gradient(value, values).numpy()
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[:, ~keep] == 0)
    assert np.any(gradient[:, keep] != 0)


def test_channels_and_samples_without_observations_are_zero():
    values = VALUES.copy()
    values[0, :, 1] = np.nan
    values[1] = np.nan
    for kind in INTERPOLATIONS:
        value = control_path(tf.constant(TIMES), tf.constant(values), interpolation=kind)(at(QUERIES))
        assert np.all(value[0, :, 1] == 0)
        assert np.all(value[1] == 0)
        assert np.all(np.isfinite(value))


@pytest.mark.parametrize("kind", INTERPOLATIONS)
def test_one_observation_is_a_constant_path(kind):
    path = control_path(tf.constant(TIMES[:, :1]), tf.constant(VALUES[:, :1]), interpolation=kind)
    np.testing.assert_array_equal(path(at(QUERIES)), np.tile(VALUES[:, :1], (1, len(QUERIES), 1)))
    np.testing.assert_array_equal(path.derivative(at(QUERIES)), np.zeros((BATCH, len(QUERIES), CHANNELS)))


def test_times_that_decrease_give_nan_for_their_sample():
    times = TIMES.copy()
    times[1, 3] = times[1, 1]
    value = control_path(tf.constant(times), tf.constant(VALUES))(1.0)
    np.testing.assert_array_equal(np.isnan(value), np.array([[False], [True], [False]]) & np.ones((1, 2), bool))


@pytest.mark.parametrize("kind", ["hermite", "linear"])
def test_gradients_are_those_of_finite_differences(kind):
    observed = np.ones((BATCH, STEPS, CHANNELS), bool)
    observed[0, 1, 0] = observed[1, 0, 1] = observed[2, 2] = False
    inputs = [tf.constant(TIMES), tf.constant(VALUES), at(QUERIES)]

    @tf.function
    def loss(times, values, t):
        path = control_path(times, values, observed, kind)
        return tf.reduce_sum(tf.sin(path(t))) + tf.reduce_sum(tf.sin(0.1 * path.derivative(t)))

    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = loss(*inputs)
    for x, gradient in zip(inputs, tape.gradient(value, inputs), strict=True):
        direction = RNG.normal(size=x.shape)
        ends = [loss(*[a + h * direction if a is x else a for a in inputs]) for h in (1e-6, -1e-6)]
        np.testing.assert_allclose(np.sum(gradient * direction), (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


def test_the_adjoint_method_finds_the_gradients_of_a_driven_solve():
    inputs = [tf.constant(TIMES), tf.constant(VALUES)]
    solver = keras_node.RungeKutta("rk4", num_steps=50)

    def field(t, y, args):
        return tf.cos(ControlPath(*args)(t)) * y

    @tf.function
    def gradients(gradient):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            path = control_path(*inputs)
            ys = keras_node.odeint(field, inputs[1][:, 0], [0, 2.0], args=path, solver=solver, gradient=gradient).ys
        return tape.gradient(ys, inputs)

    for actual, expected in zip(gradients("backsolve"), gradients("direct"), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_jump_has_no_gradient_with_respect_to_its_time():
    times, values = tf.constant(TIMES), tf.constant(VALUES)
    with tf.GradientTape() as tape:
        tape.watch([times, values])
        value = control_path(times, values, interpolation="rectilinear")(2.0)
    assert tape.gradient(value, [times, values])[0] is None


@keras.saving.register_keras_serializable(package="tests")
class Driven(keras.layers.Layer):
    """`dy/dt = u(t) W - y`."""

    def build(self, t_shape, y_shape, args_shape=None):
        self.kernel = self.add_weight(shape=(CHANNELS, y_shape[-1]), name="kernel")

    def call(self, t, y, args):
        return keras.ops.matmul(ControlPath(*args)(t), self.kernel) - y


def test_a_field_driven_by_data_trains_and_is_saved_and_exported(tmp_path):
    keras.utils.set_random_seed(0)
    times, values = keras.Input((None,)), keras.Input((None, CHANNELS))
    path = control_path(times, values)
    solver = keras_node.RungeKutta("midpoint", num_steps=2)
    states = keras_node.ODELayer(Driven(), solver=solver)(keras.ops.zeros_like(values[:, 0]), ts=times, args=path)
    model = keras.Model([times, values], keras.layers.Dense(1)(states))
    data, targets = [TIMES.astype("float32"), VALUES.astype("float32")], np.ones((BATCH, STEPS, 1))
    first = np.mean((model(data) - targets) ** 2)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=True)
    losses = model.fit(data, targets, epochs=2, verbose=0).history["loss"]
    np.testing.assert_allclose(losses[0], first, rtol=1e-5)
    assert losses[1] < losses[0]

    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(data), model(data))
    model.export(tmp_path / "served", verbose=False)
    served, data = tf.saved_model.load(str(tmp_path / "served")), [a[:2, :4] for a in data]
    np.testing.assert_allclose(served.serve(data), model(data), atol=1e-5)


@pytest.mark.parametrize("batch", [1, BATCH])
def test_a_path_through_symbolic_knots_of_unknown_number(batch, tmp_path):
    """A path of one sample serves all samples, also where nothing tells how many there are."""
    data = control_path(TIMES[:batch].astype("float32"), VALUES[:batch].astype("float32"))
    t, times, coefficients = keras.Input((1,)), keras.Input((None,)), keras.Input((None, 4, CHANNELS))
    path = ControlPath(times, coefficients)
    model = keras.Model([t, times, coefficients], [path(t), path.derivative(t)])
    model.save(tmp_path / "model.keras")
    now = tf.linspace(-0.5, 3.5, BATCH)[:, None]
    for each in (model, keras.models.load_model(tmp_path / "model.keras")):
        for call in (each, tf.function(each, reduce_retracing=True)):
            for computed, b in zip(call([now, *data]), (data(now), data.derivative(now)), strict=True):
                np.testing.assert_allclose(computed, b, rtol=1e-5, atol=1e-6)
    known = keras.Model(t, [data(t), data.derivative(t)])  # only the time is symbolic
    for computed, b in zip(known(now), (data(now), data.derivative(now)), strict=True):
        np.testing.assert_allclose(computed, b, rtol=1e-5, atol=1e-6)
    expected = [data(s[0])[i if batch > 1 else 0] for i, s in enumerate(now)]
    np.testing.assert_allclose(data(now), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_a_path_of_no_samples_has_no_values(mode):
    def both(times, values):
        path = control_path(times, values)
        return path(0.5), path.derivative(0.5)

    function = {"eager": both, "graph": tf.function(both), "xla": tf.function(both, jit_compile=True)}[mode]
    assert [x.shape for x in function(tf.zeros((0, 4)), tf.zeros((0, 4, 2)))] == [(0, 2), (0, 2)]


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0), (0, 0), (5,)])
@pytest.mark.parametrize("known", [True, False])
def test_axes_are_added_at_the_end(shape, known):
    x = tf.reshape(tf.range(float(np.prod(shape))), shape)
    for spec in ([None] * len(shape), [None, *shape[1:]], [*shape[:-1], None]):
        function = tf.function(lambda x: trees.expand(x, 4), input_signature=[tf.TensorSpec(shape if known else spec)])
        np.testing.assert_array_equal(function(x), np.reshape(x, shape + (1,) * (4 - len(shape))))


def test_a_solver_may_step_from_knot_to_knot_where_all_samples_have_the_same():
    times = [0.0, 0.7, 1.0, 2.0]
    path = control_path(times, tf.constant(VALUES[:, :4]), interpolation="linear")
    solver = keras_node.RungeKutta("rk4", step_size=10.0, step_at=times[1:-1])

    def rise(t, y, args):
        return ControlPath(*args).derivative(t)

    solution = keras_node.odeint(rise, tf.zeros((BATCH, CHANNELS), tf.float64), [0.0, 2.0], args=path, solver=solver)
    np.testing.assert_allclose(solution.ys[-1], VALUES[:, 3] - VALUES[:, 0], atol=1e-12)
    assert int(solution.stats.num_steps) == 3


@pytest.mark.parametrize(
    ("times", "values", "mask", "message"),
    [
        ((2, 5), (2, 5), None, r"\(batch, T, channels\).*Received: values.shape=\(2, 5\)"),
        ((2, 4), (2, 5, 3), None, r"one time for every step.*Received: times.shape=\(2, 4\)"),
        ((2, 5), (2, 5, 3), (2, 4), r"`mask` must be .*Received: mask.shape=\(2, 4\)"),
    ],
)
def test_inputs_of_another_shape_are_refused(times, values, mask, message):
    mask = None if mask is None else np.ones(mask, bool)
    with pytest.raises(ValueError, match=message):
        control_path(np.zeros(times), np.zeros(values), mask)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"must be one of 'linear', .* Received: interpolation='cubic'"):
        control_path(TIMES, VALUES, interpolation="cubic")
    with pytest.raises(TypeError, match="must be floating-point"):
        control_path(TIMES, VALUES.astype(int))
    with pytest.raises(ValueError, match=r"Received: t.shape=\(3, 2\)"):
        control_path(TIMES, VALUES)(np.zeros((3, 2)))


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_the_largest_value_so_far(steps, mode):
    x = np.random.default_rng(steps).normal(size=(3, steps)).astype("float32")
    run = running_maximum
    if mode != "eager":
        run = tf.function(run, input_signature=[tf.TensorSpec((None, None))], jit_compile=mode == "xla")
        np.testing.assert_array_equal(running_maximum(tf.constant(x[0])), np.maximum.accumulate(x[0]))
    np.testing.assert_array_equal(run(tf.constant(x)), np.maximum.accumulate(x, axis=1))
