"""The layer driven by a path: closed forms, missing values, gradients, and its life as a layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from scipy.linalg import expm

import keras_node
from keras_node import NeuralCDE, RungeKutta
from keras_node.control import INTERPOLATIONS

UNITS, CHANNELS, BATCH, STEPS = 3, 2, 3, 5
RNG = np.random.default_rng(0)
FIXED = RungeKutta("rk4", num_steps=2)
PRECISE = RungeKutta("tsit5", rtol=1e-9, atol=1e-10)


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state  # whichever tests ran before


@pytest.fixture
def float64():
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy("float32")


def series(dtype="float32"):
    """Observations and their times; two observations of the first sample are simultaneous."""
    times = 3 + np.cumsum(RNG.uniform(0.2, 1, (BATCH, STEPS)), axis=1)
    times[0, 2] = times[0, 1]
    return RNG.normal(size=(BATCH, STEPS, CHANNELS)).astype(dtype), times.astype(dtype)


def cde(**kwargs):
    return NeuralCDE(UNITS, mlp(), **{"solver": FIXED, **kwargs})


def mlp():
    return keras.Sequential([layers.Dense(8, activation="silu"), layers.Dense(UNITS * (1 + CHANNELS), "tanh")])


@keras.saving.register_keras_serializable(package="tests")
class Linear(keras.layers.Layer):
    """The field `f(z)[:, i] = A[i] z`."""

    def __init__(self, matrices, **kwargs):
        super().__init__(**kwargs)
        self.matrices = matrices

    def call(self, z):
        return keras.ops.einsum("iuv,bv->bui", self.matrices, z)


@pytest.mark.parametrize("kind", INTERPOLATIONS)
def test_commuting_linear_fields_depend_on_the_ends_of_the_path_alone(kind, float64):
    a = RNG.normal(size=(UNITS, UNITS)) / 2
    matrices = np.stack([0.3 * np.eye(UNITS), a, a @ a])  # of time and two channels
    layer = NeuralCDE(UNITS, Linear(matrices), interpolation=kind, solver=PRECISE, return_sequences=True)
    x, times = series("float64")
    z = layer(x, times)
    z0 = layer.initial(x[:, 0]).numpy()
    for b in range(BATCH):
        for i in range(STEPS):
            moved = np.append(times[b, i] - times[b, 0], x[b, i] - x[b, 0])
            expected = expm(np.tensordot(moved, matrices, axes=1)) @ z0[b]
            np.testing.assert_allclose(z[b, i], expected, rtol=1e-7, atol=1e-8)


def test_it_is_the_solve_along_the_public_path(float64):
    x, times = series("float64")
    x, times = x[1:2], times[1:2]
    layer = cde(solver=PRECISE)
    z, z0 = layer(x, times), layer.initial(x[:, 0])
    path = keras_node.control_path(times, np.concatenate([times[..., None], x], axis=-1))
    solver = RungeKutta("tsit5", rtol=1e-9, atol=1e-10, step_at=times[0])

    def field(t, z, args):
        matrix = keras.ops.reshape(layer.vector_field(z), (-1, UNITS, 1 + CHANNELS))
        return tf.linalg.matvec(matrix, keras_node.ControlPath(*args).derivative(t))

    @tf.function
    def solve():
        return keras_node.odeint(field, z0, times[0, [0, -1]], args=path, solver=solver).ys[-1]

    np.testing.assert_allclose(z, solve(), atol=1e-7)


@pytest.mark.parametrize("kind", INTERPOLATIONS)
def test_masked_steps_change_nothing_whatever_they_hold(kind):
    layer = cde(interpolation=kind, return_sequences=True)
    x, times = series()
    expected = layer(x, times)
    keep = np.array([False, True, True, False, True, True, True, False])
    padded, stamps = np.full((BATCH, 8, CHANNELS), np.inf, "float32"), np.full((BATCH, 8), np.nan, "float32")
    padded[:, keep], stamps[:, keep] = x, times
    steps = np.maximum(np.cumsum(keep) - 1, 0)
    z = layer(padded, stamps, mask=np.tile(keep, (BATCH, 1)))
    np.testing.assert_allclose(z, np.asarray(expected)[:, steps], rtol=1e-6, atol=1e-6)
    padded[:, ~keep] = np.nan
    with tf.GradientTape() as tape:
        z = layer(padded, stamps)
    np.testing.assert_allclose(z, np.asarray(expected)[:, steps], rtol=1e-6, atol=1e-6)
    assert all(np.all(np.isfinite(g)) for g in tape.gradient(z, layer.trainable_variables))


@pytest.mark.parametrize("kind", INTERPOLATIONS)
def test_a_missing_value_is_one_that_a_path_fills_in(kind):
    layer = cde(interpolation=kind)
    x, times = series()
    x[:, 2, 0] = np.nan
    weight = (times[:, 2] - times[:, 1]) / (times[:, 3] - times[:, 1])
    filled = x.copy()
    filled[:, 2, 0] = x[:, 1, 0] + (weight * (x[:, 3, 0] - x[:, 1, 0]) if kind != "rectilinear" else 0)
    expected = layer(filled, times)
    np.testing.assert_allclose(layer(x, times), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        layer(np.nan_to_num(x, nan=9.0), times, mask=~np.isnan(x)), expected, rtol=1e-6, atol=1e-6
    )


def test_a_rectilinear_path_makes_states_that_do_not_know_the_future():
    x, times = series()
    x[:, 2, 0] = np.nan
    later, times_later = x.copy(), times.copy()
    later[:, 3:] += 1
    times_later[:, 3:] += 1
    for kind, same in (("rectilinear", True), ("hermite", False)):
        layer = cde(interpolation=kind, return_sequences=True)
        z, z_later = layer(x, times)[:, :3], layer(later, times_later)[:, :3]
        assert np.array_equal(z, z_later) == same


@pytest.mark.parametrize("kind", INTERPOLATIONS)
def test_one_observation_gives_the_initial_state(kind):
    layer, (x, times) = cde(interpolation=kind), series()
    np.testing.assert_array_equal(layer(x[:, :1], times[:, :1]), layer.initial(x[:, 0]))


@pytest.mark.parametrize(
    ("kind", "gradient"),
    [("hermite", "direct"), ("linear", "direct"), ("rectilinear", "checkpointed"), ("hermite", "backsolve")],
)
def test_gradients_are_those_of_finite_differences(kind, gradient, float64):
    solver = PRECISE if gradient == "backsolve" else FIXED
    layer = cde(interpolation=kind, solver=solver, gradient=gradient)
    x, times = (tf.constant(a) for a in series("float64"))
    times += tf.constant([[0, 0, 0.05, 0.1, 0.1], [0] * 5, [0] * 5], tf.float64)  # a step aside from simultaneous ones
    mask = np.ones(x.shape, bool)
    mask[0, 1, 0] = mask[1, 3] = mask[2, 4, 1] = False
    layer.build(x.shape)
    kernel = layer.initial.kernel, layer.trainable_variables[0]

    @tf.function
    def loss(x, times, *weights):
        with keras.StatelessScope(list(zip(kernel, weights, strict=True))):
            return tf.reduce_sum(tf.sin(layer(x, times, mask)))

    inputs = [x, times, *(tf.convert_to_tensor(k) for k in kernel)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = loss(*inputs)
    for a, actual in zip(inputs, tape.gradient(value, inputs), strict=True):
        direction = RNG.normal(size=a.shape)
        ends = [loss(*[b + h * direction if b is a else b for b in inputs]) for h in (1e-5, -1e-5)]
        np.testing.assert_allclose(np.sum(actual * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7)


def test_with_steps_of_its_own_a_sample_does_not_depend_on_its_batch():
    layer, (x, times) = cde(solver=RungeKutta("bosh3", per_sample=True)), series()
    np.testing.assert_allclose(
        layer(x[:1], times[:1]), layer(x * [[[1]], [[9]], [[0]]], times)[:1], rtol=1e-6, atol=1e-6
    )


def test_only_differences_of_times_matter_and_large_ones_keep_their_digits():
    layer, (x, _) = cde(), series()
    seconds = np.array([[0, 1, 1, 3, 4], [0, 2, 3, 3, 6], [0, 1, 2, 3, 4]])
    expected = layer(x, seconds.astype("float32"))
    for times in (seconds + 1_700_000_000, seconds + 1_700_000_000.25, (seconds - 7.5).astype("float32")):
        np.testing.assert_allclose(layer(x, times), expected, rtol=1e-6, atol=1e-6)


def test_times_that_decrease_are_refused_where_they_can_be_seen():
    layer, (x, times) = cde(), series()
    times[1, 3] = times[1, 1]
    with pytest.raises(ValueError, match=r"must not decrease.*Received: times=\[.*\] for sample 1"):
        layer(x, times)
    with pytest.raises(tf.errors.InvalidArgumentError, match="must not decrease"):
        tf.function(layer, autograph=False)(tf.constant(x), tf.constant(times))


def test_under_xla_times_that_decrease_give_nan_for_their_sample():
    layer, (x, times) = cde(), series()
    expected, bad = layer(x, times), times.copy()
    bad[1, 3] = times[1, 1]
    z = tf.function(layer, autograph=False, jit_compile=True)(tf.constant(x), tf.constant(bad))
    np.testing.assert_allclose(z[::2], expected[::2], rtol=1e-5)  # XLA rounds in another order
    assert np.all(np.isnan(z[1]))


def test_it_takes_the_mask_of_its_input():
    x, times = series()
    mask = np.array([[True] * STEPS, [True] * 3 + [False] * 2, [True] * STEPS])
    layer = cde()
    masked = layers.Masking()(x * mask[..., None])
    np.testing.assert_array_equal(layer(masked, times), layer(x, times, mask=mask))


def test_it_trains_alike_with_and_without_xla_and_is_saved_and_exported(tmp_path):
    x, times = series()
    mask = np.array([[True] * STEPS, [True] * 3 + [False] * 2, [True] * STEPS])
    inputs = [keras.Input((None, CHANNELS)), keras.Input((None,)), keras.Input((None,), dtype="bool")]
    z = NeuralCDE(UNITS, solver=FIXED, jit_compile=False)(inputs[0], inputs[1], mask=inputs[2])
    model = keras.Model(inputs, layers.Dense(1)(z))
    start, losses = model.get_weights(), []
    assert len(start) == 8
    for jit_compile in (False, True):
        model.set_weights(start)
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
        history = model.fit([x, times, mask], np.ones((BATCH, 1)), epochs=4, verbose=0)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[0][-1] < 0.7 * losses[0][0]

    model.save(tmp_path / "model.keras")
    data = [x[:, :4], times[:, :4], mask[:, :4]]
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(data), model(data))
    model.export(tmp_path / "served", verbose=False)
    served, data = tf.saved_model.load(str(tmp_path / "served")), [a[:1] for a in data]
    np.testing.assert_allclose(served.serve(data), model(data), rtol=1e-6, atol=1e-6)


def test_its_config_makes_an_equal_layer():
    layer = cde(interpolation="linear", gradient="direct", return_sequences=True, jit_compile=False, name="driven")
    clone = NeuralCDE.from_config(layer.get_config())
    assert clone.get_config() == layer.get_config()
    assert clone.name == "driven"
    assert clone.vector_field is not layer.vector_field


@pytest.mark.parametrize("interpolation", ["hermite", "linear", "rectilinear"])
def test_padding_changes_nothing_for_the_others(interpolation, float64):
    """Samples share the error norm of an adaptive solve, and a masked step has no error."""
    layer = cde(solver="tsit5", interpolation=interpolation, return_sequences=True)
    x, times = series("float64")
    layer.build(x.shape)
    layer.set_weights([3 * w for w in layer.get_weights()])  # so that the error decides about the steps
    mask = np.ones((BATCH, STEPS), bool)
    mask[0, 2], mask[1, -1] = False, False
    times[0, 1] = times[0, 0]  # two observations at the same time

    @tf.function
    def outputs_and_gradients(x, times, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, times, mask=mask)[:BATCH, :STEPS]
            value = tf.reduce_sum(tf.sin(outputs))
        return outputs, *tape.gradient(value, [x, *layer.trainable_variables])

    padding = [(0, 30), (0, 4)]
    results = outputs_and_gradients(np.pad(x, [*padding, (0, 0)]), np.pad(times, padding), np.pad(mask, padding))
    expected = outputs_and_gradients(x, times, mask)
    for actual, other in zip(results, expected, strict=True):
        if actual.shape.rank == 3:
            actual = actual[:BATCH, :STEPS]
        np.testing.assert_allclose(actual, other, rtol=1e-8, atol=1e-10)


def test_its_solves_are_counted():
    inputs = keras.Input((STEPS, CHANNELS)), keras.Input((STEPS,))
    model = keras.Model(inputs, cde(track_stats=True, jit_compile=False, name="cde")(*inputs))
    model.compile("sgd", "mse")
    logs = model.evaluate(list(series()), np.zeros((BATCH, UNITS)), return_dict=True, verbose=0)
    assert next(v for k, v in logs.items() if "evaluations" in k) == 4 * 2


def test_under_a_mixed_policy_it_computes_in_float32():
    x, times = series()
    mixed, single = cde(dtype="mixed_float16"), cde()
    single.build(x.shape)
    z = mixed(x, times + 1000)
    single.set_weights(mixed.get_weights())
    assert z.dtype == "float16"
    np.testing.assert_allclose(z, single(x, times), atol=5e-3)


def test_what_does_not_fit_is_refused():
    x, times = series()
    with pytest.raises(ValueError, match=r"\(batch, 3, 3\) or \(batch, 9\). Received: shape=\(None, 4\)"):
        NeuralCDE(UNITS, layers.Dense(4))(x, times)
    with pytest.raises(ValueError, match="must take only the state"):
        NeuralCDE(UNITS, lambda t, z: z)
    with pytest.raises(ValueError, match="Received: units=0"):
        NeuralCDE(0)
    with pytest.raises(ValueError, match=r"`interpolation` must be one of .* Received: interpolation='cubic'"):
        NeuralCDE(UNITS, interpolation="cubic")
    with pytest.raises(ValueError, match=r"channels, 1 or more. Received: x.shape=\(2, 3, 0\)"):
        cde()(np.ones((2, 3, 0)), np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"Received: x.shape=\(3, 5\)"):
        NeuralCDE(UNITS)(times, times)
