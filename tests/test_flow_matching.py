"""Flow matching: its loss and its minimum in closed form, the pairing by an auction, and the life of such a flow."""

import json

import keras
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import tensorflow as tf
from keras import ops

from keras_node import ConcatSquashField, ContinuousFlow, RungeKutta
from keras_node.models.assignment import assignment

EULER = RungeKutta("euler", num_steps=3)  # the least to trace and to compile
MEAN, DEVIATIONS = np.array([1.0, -0.5]), np.array([[0.6, 0.0], [0.5, 1.2]])
COVARIANCE = DEVIATIONS @ DEVIATIONS.T


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


def matching(field=None, dim=2, **kwargs):
    options = {"objective": "flow_matching", "solver": EULER, "jit_compile": False, "seed": 3, **kwargs}
    return ContinuousFlow(dim, ConcatSquashField((8,)) if field is None else field, **options)


def points(n=6, dtype="float64", seed=1):
    return np.random.default_rng(seed).normal(size=(n, 2)).astype(dtype)


def losses(model, data):
    return model.sample_losses(data, None, None, training=True)[0].numpy()


# The assignment.

MODES = {
    "eager": assignment,
    "graph": tf.function(assignment, input_signature=[tf.TensorSpec((None, None), tf.float64)] * 2),
    "xla": tf.function(assignment, jit_compile=True, reduce_retracing=False),
}


def cost(x, z):
    return np.sum((x[:, None] - z) ** 2, axis=-1)


@pytest.mark.parametrize("mode", MODES)
def test_pairs_are_a_permutation_and_cost_nearly_the_least(mode):
    """The bound is that of the auction: the tolerance, relative to the mean cost of pairs at random."""
    for n in (0, 1, 2, 3, 64):
        rng = np.random.default_rng(n)
        x, z = 5 + rng.choice([-2.0, 2.0], (n, 3)) + 0.3 * rng.normal(size=(n, 3)), rng.normal(size=(n, 3))
        found = MODES[mode](tf.constant(x), tf.constant(z)).numpy()
        assert sorted(found) == list(range(n))
        if n < 2:
            continue
        rows, best = scipy.optimize.linear_sum_assignment(cost(x, z))
        costs = cost(x - x.mean(0), z - z.mean(0))
        paired, least = costs[rows, found].mean(), costs[rows, best].mean()
        assert least - 1e-12 <= paired <= least + 0.05 * costs.mean()
        assert n < 64 or least + 0.05 * costs.mean() < 0.6 * costs.mean()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_pairs_do_not_depend_on_place_and_scale(scale):
    x, z = points(40), points(40, seed=2)
    expected = assignment(tf.constant(x), tf.constant(z))
    np.testing.assert_array_equal(assignment(tf.constant(scale * x + 7), tf.constant(z)), expected)


@pytest.mark.parametrize(
    "x",
    [np.zeros((30, 2)), np.repeat(points(3), 10, axis=0), np.full((30, 2), np.nan)],
    ids=["equal", "duplicates", "nan"],
)
def test_pairs_of_equal_points_are_a_permutation(x):
    found = assignment(tf.constant(x), tf.constant(points(30))).numpy()
    assert sorted(found) == list(range(30))


def test_an_auction_that_does_not_end_gives_the_rest_away(monkeypatch):
    """With hardly any tolerance, points that all want one of two good ones raise the prices for long."""
    monkeypatch.setattr("keras_node.models.assignment._TOLERANCE", 1e-9)
    x = np.array([[10.0, 0.0], [10.0, 1e-3], *points(28)])
    found = assignment(tf.constant(x), tf.constant(points(30, seed=2))).numpy()
    assert sorted(found) == list(range(30))


# The loss.


@keras.saving.register_keras_serializable(package="tests")
class Exact(keras.layers.Layer):
    """The field `E[x - z | x_t] / t1` between `Normal(0, I)` and `Normal(MEAN, COVARIANCE)`, plus `a + x B + t c`.

    With `s = t / t1`, the vectors `x_t = (1 - s) z + s x` and `x - z` have the covariance `s S - (1 - s) I`, and `x_t`
    has the covariance `(1 - s)^2 I + s^2 S`.
    """

    def __init__(self, t1, **kwargs):
        super().__init__(**kwargs)
        self.t1 = t1

    def build(self, t_shape, x_shape):
        self.extra = self.add_weight(shape=(4, 2), initializer="zeros", name="extra")

    def call(self, t, x):
        s = ops.reshape(t / self.t1, (-1, 1, 1))
        eye, covariance = np.eye(2), ops.convert_to_tensor(COVARIANCE, x.dtype)
        cross, own = s * covariance - (1 - s) * eye, (1 - s) ** 2 * eye + s**2 * covariance
        centred = x - s[:, 0] * MEAN
        exact = MEAN + (cross @ ops.linalg.solve(own + 0 * centred[:, :, None], centred[:, :, None]))[..., 0]
        features = ops.concatenate([ops.ones_like(x[:, :1]), x, t + 0 * x[:, :1]], axis=1)
        return exact / self.t1 + features @ self.extra


def test_the_field_between_two_gaussians_has_their_density_and_the_least_loss():
    """The mean gradient vanishes there, and the least loss is the mean conditional variance of `(x - z) / t1`."""
    t1 = 1.5
    tight = RungeKutta("tsit5", rtol=1e-9, atol=1e-9)
    model = matching(Exact(t1, dtype="float64"), t1=t1, dtype="float64", solver=tight)
    expected = scipy.stats.multivariate_normal(MEAN, COVARIANCE).logpdf(points())
    np.testing.assert_allclose(model.log_prob(points()), expected, atol=1e-7)

    def variance(s):
        cross, own = s * COVARIANCE - (1 - s) * np.eye(2), (1 - s) ** 2 * np.eye(2) + s**2 * COVARIANCE
        return np.trace(np.eye(2) + COVARIANCE - cross @ np.linalg.solve(own, cross)) / t1**2

    values, gradients = [], []
    for i in range(40):
        x = MEAN + points(500, seed=10 + i) @ DEVIATIONS.T
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, training=True)
        values.append(loss)
        gradients.append(tape.gradient(loss, model.trainable_variables)[0])
    least = scipy.integrate.quad(variance, 0, 1)[0]
    error = np.std(values) / np.sqrt(40)
    assert abs(np.mean(values) - least) < 4 * error < 0.05 * least
    errors = np.std(gradients, axis=0) / np.sqrt(40)
    assert np.all(np.abs(np.mean(gradients, axis=0)) < 4 * errors) and np.max(errors) < 0.05


@pytest.mark.parametrize("coupling", ["independent", "optimal_transport"])
def test_draws_and_losses_of_a_batch(coupling):
    """From what the field sees one can compute the noise, and from that the losses with NumPy."""
    seen, x = [], 2 * points(400) + 1

    def field(t, x_t):
        seen.append((t.numpy(), x_t.numpy()))
        return 0.3 * x_t + t

    model = matching(field, t1=2.0, dtype="float64", coupling=coupling)
    found = losses(model, x.reshape(20, 20, 2))
    ((t, x_t),) = seen
    assert t.shape == (400, 1) and found.shape == (20, 20)
    z = (x_t - t / 2 * x) / (1 - t / 2)
    expected = np.sum((0.3 * x_t + t - (x - z) / 2) ** 2, axis=1)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-9)
    assert scipy.stats.kstest(t.ravel(), "uniform", (0, 2)).pvalue > 0.01
    assert scipy.stats.kstest(z.ravel(), "norm").pvalue > 0.01
    np.testing.assert_allclose(np.corrcoef(z.T), np.eye(2), atol=0.2)
    costs = cost(x, z)
    rows, best = scipy.optimize.linear_sum_assignment(costs)
    paired = np.diag(costs).mean()
    if coupling == "independent":
        assert abs(paired / costs.mean() - 1) < 0.2
    else:
        assert paired < costs[rows, best].mean() + 0.05 * costs.mean() < 0.5 * costs.mean()
    losses(model, x)
    assert np.all(seen[0][0] != seen[1][0])  # other times in the next batch


@keras.saving.register_keras_serializable(package="tests")
class Recalls(keras.layers.Layer):
    """Told the data as a condition, it gives `x - z + x W`: the loss is `||x W||^2`, whatever is drawn."""

    def build(self, t_shape, x_shape, condition_shape):
        self.kernel = self.add_weight(shape=(2, 2), initializer="ones")

    def call(self, t, x, condition):
        return (condition - x) / (1 - t) + condition @ self.kernel


@pytest.mark.parametrize("mode", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}], ids=str)
def test_fit_follows_a_loss_in_closed_form(mode):
    x, weights, rate = points(5), np.arange(5.0), 0.1
    model = matching(Recalls(dtype="float64"), dtype="float64")
    model.compile(keras.optimizers.SGD(rate), **mode)
    history = model.fit((x, x), epochs=2, sample_weight=weights, verbose=0).history["loss"]
    kernel, expected = np.ones((2, 2)), []
    for _ in range(2):
        expected.append(np.mean(weights * np.sum((x @ kernel) ** 2, axis=1)))
        kernel = kernel - rate * 2 / 5 * (x.T * weights) @ x @ kernel
    np.testing.assert_allclose(history, expected, rtol=1e-6)
    np.testing.assert_allclose(model.vector_field.kernel, kernel, rtol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_pairs_by_optimal_transport(jit_compile):
    """In a field that stays zero the loss is the mean cost, which is less than that of pairs at random."""
    x = points(80, "float32")
    model = matching(keras.layers.Dense(2, kernel_initializer="zeros"), coupling="optimal_transport")
    model.compile(keras.optimizers.SGD(0.0), jit_compile=jit_compile)
    transport = model.fit(x, batch_size=50, verbose=0).history["loss"][0]  # and a batch of 30
    independent = np.mean(np.sum(x**2, axis=1)) + 2
    assert transport < 0.2 * independent


# The life of the model.


@pytest.mark.parametrize("compiles_again", [False, True])
def test_likelihood_may_follow(compiles_again, tmp_path):
    x = points(6, "float32")
    model = matching(coupling="optimal_transport")
    model.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    logs = model.fit(x, verbose=0, validation_data=x).history
    nll = -np.mean(model.log_prob(x))
    np.testing.assert_allclose([logs["val_loss"][0], model.evaluate(x, verbose=0)], nll, rtol=1e-5)
    assert abs(logs["loss"][0] - nll) > 0.1
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.objective == "flow_matching" and loaded.coupling == "optimal_transport"
    assert json.dumps(loaded.get_config()) == json.dumps(model.get_config())
    assert abs(loaded.fit(x, verbose=0).history["loss"][0] - nll) > 0.1

    model.objective = "likelihood"
    if compiles_again:
        model.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    np.testing.assert_allclose(model.fit(x, verbose=0).history["loss"], nll, rtol=1e-5)
    assert (model.evaluate(x, verbose=0) < nll - 1e-4) == compiles_again
    assert model.coupling is None
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").objective == "likelihood"
    model.objective = "flow_matching"
    assert model.coupling == "independent"
    assert abs(model.fit(x, verbose=0).history["loss"][0] - nll) > 0.1


def test_the_field_is_an_ordinary_layer_in_training():
    """Dropout needs no estimated trace, also in a callable, and the averages of a batch normalization move."""
    x, dropout, seen = points(200, "float32"), keras.layers.Dropout(0.5), []

    def field(x_t):
        seen.append(dropout(1 + 0 * x_t).numpy())
        return x_t

    losses(matching(field), x)
    assert set(np.unique(seen)) == {0, 2}
    normalization = keras.layers.BatchNormalization(momentum=0.0)
    model = matching(keras.Sequential([normalization, keras.layers.Dense(2)]))
    model.compile("sgd", jit_compile=False)
    model.fit(x + 4, batch_size=200, verbose=0)
    assert np.all(np.abs(normalization.moving_mean - 2) < 0.3)  # of x_t, which is halfway on average
    assert np.all(np.isfinite(model.log_prob(x[:3])))


def test_a_functional_model_sees_the_times_of_its_samples():
    t, x = keras.Input((1,)), keras.Input((2,))
    model = matching(keras.Model([t, x], keras.layers.Dense(2)(keras.layers.Concatenate()([t, x]))))
    assert losses(model, points(4, "float32")).shape == (4,)
    assert losses(model, points(0, "float32")).shape == (0,)
    assert model.log_prob(points(4, "float32")).shape == (4,)


def test_mixed_precision_keeps_the_loss_in_single():
    x = points(50, "float32")
    model = matching(ConcatSquashField((8,), dtype="mixed_float16"), dtype="mixed_float16")
    full = matching()
    found = losses(model, x)
    full.build((None, 2))
    full.set_weights(model.get_weights())
    full.seed_generator.state.assign([3, 0])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, losses(full, x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "other"}, "`objective` must be one of likelihood, flow_matching. Received: objective='other'"),
        ({"coupling": "other"}, "`coupling` must be one of independent, optimal_transport. Received: coupling='other'"),
        ({"objective": "likelihood", "coupling": "independent"}, "leave `coupling` out.*Received: objective='likeli"),
        ({"kinetic_energy": 0.1}, "without a solve.*Received: kinetic_energy=0.1, jacobian_norm=0.0, steer=0.0"),
        ({"jacobian_norm": 0.1}, "without a solve.*Received: kinetic_energy=0.0, jacobian_norm=0.1, steer=0.0"),
        ({"steer": 0.1}, "without a solve.*Received: kinetic_energy=0.0, jacobian_norm=0.0, steer=0.1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        matching(**options)


def test_an_objective_may_not_be_changed_to_one_that_is_refused():
    model = ContinuousFlow(2, steer=0.1)
    with pytest.raises(ValueError, match="without a solve"):
        model.objective = "flow_matching"
    assert model.objective == "likelihood"


def test_optimal_transport_refuses_what_would_bias_it():
    x = points(4, "float32")
    model = matching(coupling="optimal_transport")
    model.compile("sgd", run_eagerly=True)
    with pytest.raises(ValueError, match=r'condition.*use `coupling="independent"`.*Received: a condition of shape'):
        model.fit((x, x), verbose=0)
    model = matching(coupling="optimal_transport")
    model.compile("sgd", run_eagerly=True)
    with pytest.raises(ValueError, match=r"weights.*Received: sample_weight="):
        model.fit(x, sample_weight=np.ones(4), verbose=0)
    assert np.isfinite(model.evaluate(x, sample_weight=np.ones(4), verbose=0))
    with pytest.raises(ValueError, match="without targets"):
        model.fit(x, x, verbose=0)
