"""The continuous normalizing flow: densities in closed form, estimates, gradients, and its life as a model."""

import itertools
import json

import keras
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats
import tensorflow as tf
from keras import ops

import keras_node
from keras_node import ContinuousFlow, RungeKutta
from keras_node.models.density_field import DensityField

A = np.array([[0.3, -0.8], [0.5, -0.6]])
TIGHT = RungeKutta("tsit5", rtol=1e-9, atol=1e-9)
COARSE = RungeKutta("midpoint", num_steps=3)
EULER = RungeKutta("euler", num_steps=3)  # the least to trace and to compile
ACCURATE = RungeKutta("dopri5", num_steps=12)


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


@keras.saving.register_keras_serializable(package="tests")
def linear(t, x):
    return ops.matmul(x, ops.cast(A.T, x.dtype))


@keras.saving.register_keras_serializable(package="tests")
def turning(t, x, condition):
    """A field whose trace is not constant, and differs with time and condition."""
    first, second = x[:, :1], x[:, 1:]
    return ops.concatenate([ops.sin(second + t) - first * condition, ops.tanh(first * second)], axis=1)


def points(n=6, dtype="float64"):
    return np.random.default_rng(1).normal(size=(n, 2)).astype(dtype)


def flow(field=None, dtype="float32", **kwargs):
    """A small flow whose weights are large enough to matter."""
    if field is None:
        field = keras_node.ConcatSquashField((8,), dtype=dtype)
    return ContinuousFlow(2, field, **{"seed": 3, "dtype": dtype, **kwargs})


def moved(model, condition=None, scale=0.7):
    """The flow, built and with random weights in place of the initial ones."""
    shape = (None, 2)
    model.build(shape if condition is None else (shape, condition.shape))
    rng = np.random.default_rng(2)
    model.vector_field.set_weights([scale * rng.normal(size=w.shape) for w in model.vector_field.weights])
    return model


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_linear_field_has_the_density_of_a_gaussian(per_sample):
    model = flow(linear, "float64", t1=1.5, solver=RungeKutta(rtol=1e-9, atol=1e-9, per_sample=per_sample))
    matrix = scipy.linalg.expm(1.5 * A)
    expected = scipy.stats.multivariate_normal(np.zeros(2), matrix @ matrix.T)
    np.testing.assert_allclose(model.log_prob(points()), expected.logpdf(points()), atol=1e-7)
    x, log_det = model.forward(points())
    np.testing.assert_allclose(x, points() @ matrix.T, atol=1e-7)
    np.testing.assert_allclose(log_det, np.full(6, 1.5 * np.trace(A)), atol=1e-7)
    samples = model.sample(4, seed=5)
    np.testing.assert_allclose(samples, keras.random.normal((4, 2), dtype="float64", seed=5) @ matrix.T, atol=1e-7)


def test_the_log_determinant_is_that_of_the_map():
    condition = np.array([0.4, -0.3])[:, None]
    model = flow(turning, "float64", solver=ACCURATE, gradient="direct")
    z = tf.constant(points(2))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(z)
        x, log_det = model.forward(z, condition)
    determinants = np.linalg.det(tape.batch_jacobian(x, z, experimental_use_pfor=False))
    np.testing.assert_allclose(log_det, np.log(determinants), atol=1e-7)


def test_density_integrates_to_one():
    model = moved(flow(solver=RungeKutta("bosh3", rtol=1e-4, atol=1e-4)))
    side = np.linspace(-8, 8, 121)
    grid = np.stack(np.meshgrid(side, side), -1).astype("float32")
    density = np.exp(model.log_prob(grid))
    assert density.shape == (121, 121)
    assert np.std(np.log(density[40:80, 40:80])) > 0.3
    np.testing.assert_allclose(np.sum(density) * (side[1] - side[0]) ** 2, 1, atol=1e-2)


def test_sample_and_log_prob_invert_each_other():
    condition = np.random.default_rng(4).normal(size=(3,)).astype("float32")
    model = moved(flow(), condition[None])
    x = model.sample(50, condition, seed=7)
    z, backward = model.inverse(x, condition)
    np.testing.assert_allclose(z, keras.random.normal((50, 2), seed=7), atol=1e-4)
    again, forward = model.forward(z, condition)
    np.testing.assert_allclose(again, x, atol=1e-4)
    np.testing.assert_allclose(forward, -backward, atol=1e-4)
    log_base = scipy.stats.norm.logpdf(z).sum(-1)
    np.testing.assert_allclose(model.log_prob(x, condition), log_base + backward, atol=1e-5)


def test_the_mean_of_hutchinsons_estimates_is_the_exact_value():
    """Over all four vectors of signs the mean is exact, of the trace and of the Frobenius norm."""
    field, x, condition = DensityField(turning, energies=True), tf.constant(points()), tf.constant(points()[:, :1])
    state, t = (x, tf.zeros((6, 3), x.dtype)), tf.constant(0.3, x.dtype)
    exact, rates = field(t, state, (condition, None))
    estimates = []
    for signs in itertools.product([-1.0, 1.0], repeat=2):
        noise = tf.tile(tf.constant([signs], x.dtype), [6, 1])
        dx, estimate = field(t, state, (condition, noise))
        np.testing.assert_allclose(dx, exact, atol=1e-14)
        estimates.append(estimate)
    np.testing.assert_allclose(np.mean(estimates, axis=0), rates, atol=1e-12)
    assert np.std(estimates, axis=0)[:, 0].max() > 0.1


# Up to four rows of the Jacobian share an evaluation: of five, one of two groups is not full.
@pytest.mark.parametrize(
    ("dim", "mode"),
    [*((dim, "eager") for dim in (1, 4, 5, 9)), *((dim, mode) for dim in (4, 5) for mode in ("graph", "xla"))],
)
def test_exact_rates_are_those_of_the_jacobian_in_any_dimension(dim, mode):
    """For `f = tanh(x W)` trace, Frobenius norm and the gradient of the trace have closed forms."""
    rng = np.random.default_rng(dim)
    matrix, x = rng.normal(size=(dim, dim)), rng.normal(size=(3, dim))

    def rates(x):
        field = DensityField(lambda x: tf.tanh(x @ matrix), energies=True)
        with tf.GradientTape() as tape:
            tape.watch(x)
            dx, rates = field(tf.constant(0.0, x.dtype), (x, tf.zeros((3, 3), x.dtype)), (None, None))
            trace = rates[:, 0]
        return dx, rates, tape.gradient(trace, x)

    if mode != "eager":
        signature = [tf.TensorSpec((None, dim), tf.float64)] if mode == "graph" else None
        rates = tf.function(rates, input_signature=signature, jit_compile=mode == "xla")
    dx, integrands, slope = rates(tf.constant(x))
    trace, kinetic, frobenius = np.transpose(integrands)
    f = np.tanh(x @ matrix)
    np.testing.assert_allclose(dx, f, rtol=1e-12)
    np.testing.assert_allclose(trace, (1 - f**2) @ np.diag(matrix), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(kinetic, np.sum(f**2, axis=1), rtol=1e-10)
    np.testing.assert_allclose(frobenius, (1 - f**2) ** 2 @ np.sum(matrix**2, axis=0), rtol=1e-10)
    np.testing.assert_allclose(slope, -2 * f * (1 - f**2) * np.diag(matrix) @ matrix.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_xla_compiles_a_training_step_once_for_all_weights(trace):
    """What XLA takes for a constant is written into the program, and a new value would compile it anew."""
    model = ContinuousFlow(5, keras_node.ConcatSquashField((4,)), trace=trace, solver=EULER, seed=0)
    model.build((None, 5))

    @tf.function(jit_compile=True)
    def gradient(x, *weights):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            log_prob, _ = model.stateless_call(weights, model.non_trainable_variables, x, training=True)
        return tape.gradient(log_prob, weights)

    weights = [tf.convert_to_tensor(w) for w in model.trainable_variables]
    values = [(tf.ones((3, 5)), *weights), (tf.zeros((3, 5)), *(w + 1 for w in weights))]
    programs = {gradient.experimental_get_compiler_ir(*inputs)(stage="hlo") for inputs in values}
    assert len(programs) == 1


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinsons_noise_is_drawn_once_for_a_solve(noise):
    """In a linear field the estimate of a sample is then `e^T A e`, of mean `tr A`, and the steps do not matter."""
    model = flow(linear, trace="hutchinson", noise=noise, solver=COARSE)
    z = np.zeros((20000, 2), "float32")
    estimates = np.asarray(model.forward(z)[1])
    if noise == "rademacher":
        possible = np.trace(A) + np.array([1, -1]) * (A[0, 1] + A[1, 0])
        assert np.min(np.abs(estimates[:, None] - possible), axis=1).max() < 1e-6
    deviation = np.std(estimates)
    assert abs(np.mean(estimates) - np.trace(A)) < 4 * deviation / np.sqrt(len(z))
    assert np.any(estimates != np.asarray(model.forward(z)[1]))


def fix_noise(model, monkeypatch):
    """XLA draws other numbers from the same seed."""
    signs = np.sign(np.random.default_rng(8).normal(size=(6, 2)))
    monkeypatch.setattr(
        model, "_noise", lambda like: None if model.trace == "exact" else tf.constant(signs, like.dtype)
    )


@pytest.mark.parametrize(
    ("trace", "gradient", "solver"), [("exact", "backsolve", TIGHT), ("hutchinson", "direct", COARSE)]
)
def test_gradients_agree_with_finite_differences(trace, gradient, solver, monkeypatch):
    """Of the loss of training, both energies in it: the field is differentiated twice."""
    condition = points(6)
    options = {"kinetic_energy": 0.3, "jacobian_norm": 0.2, "gradient": gradient, "trace": trace}
    model = moved(flow(dtype="float64", solver=solver, **options), condition)
    fix_noise(model, monkeypatch)
    weights = model.trainable_variables

    def loss(condition):
        return model.compute_loss((points(), condition), training=True)

    def gradients(condition):
        with tf.GradientTape() as tape:
            tape.watch(condition)
            value = loss(condition)
        return tape.gradient(value, [condition, *weights])

    condition = tf.constant(condition)
    found, step = gradients(condition), 1e-5
    rng = np.random.default_rng(5)
    directions = [rng.normal(size=g.shape) for g in found]
    ends = []
    for sign in (1, -1):
        for w, d in zip(weights, directions[1:], strict=True):
            w.assign_add(sign * step * d)
        ends.append(loss(condition + sign * step * directions[0]))
        for w, d in zip(weights, directions[1:], strict=True):
            w.assign_sub(sign * step * d)
    along = sum(np.sum(g * d) for g, d in zip(found, directions, strict=True))
    np.testing.assert_allclose(along, (ends[0] - ends[1]) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize(("trace", "jit_compile"), [("exact", False), ("hutchinson", "auto")])
def test_eager_graph_and_xla_agree(trace, jit_compile, monkeypatch):
    condition = points(6, "float32")
    model = moved(
        flow(trace=trace, solver=EULER, kinetic_energy=0.1, jacobian_norm=0.1, jit_compile=jit_compile), condition
    )
    fix_noise(model, monkeypatch)

    def step(x, condition):
        with tf.GradientTape() as tape:
            log_prob = model((x, condition), training=True)
            loss = sum(model.losses) - tf.reduce_mean(log_prob)
        return log_prob, tape.gradient(loss, model.trainable_variables)

    x = tf.constant(points(6, "float32"))
    expected = tf.nest.flatten(step(x, tf.constant(condition)))
    unknown = [tf.TensorSpec((None, 2)), tf.TensorSpec((None, 2))]
    for function in (tf.function(step, input_signature=unknown), tf.function(step, jit_compile=True)):
        for found, value in zip(tf.nest.flatten(function(x, tf.constant(condition))), expected, strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5)


def test_energies_are_the_integrals_along_the_paths():
    x, condition = points(), points()[:, :1]
    ts = np.linspace(1, 0, 41)
    path = keras_node.odeint(turning, x, ts, args=condition, solver=RungeKutta("rk4", num_steps=1)).ys.numpy()
    first, second = path[..., 0], path[..., 1]
    t, c = ts[:, None], condition[:, 0]
    kinetic = (np.sin(second + t) - first * c) ** 2 + np.tanh(first * second) ** 2
    slope = 1 - np.tanh(first * second) ** 2
    squares = c**2 + np.cos(second + t) ** 2 + (slope * second) ** 2 + (slope * first) ** 2
    for option, values in {"kinetic_energy": kinetic, "jacobian_norm": squares}.items():
        model = flow(turning, "float64", solver=ACCURATE, **{option: 2.0})
        model((x, condition), training=True)
        np.testing.assert_allclose(
            model.losses[0], -2 * np.mean(scipy.integrate.simpson(values, x=ts, axis=0)), rtol=1e-5
        )
        model.solver = COARSE
        model((x, condition))
        assert model.losses == []


def test_steer_draws_the_end_of_training_solves():
    """In a field that moves everything at the speed 1, the base is reached where the solve ends."""
    model = ContinuousFlow(1, lambda x: ops.ones_like(x), steer=0.4, solver=COARSE, seed=0, dtype="float64")

    @tf.function
    def draw(x, training):
        return model(x, training=training)

    def end(training):
        # Of z = x - (1 - end), the log-densities of x = 0 and x = 1 differ by 1 - end - 1/2.
        low, high = draw(tf.constant([[0.0], [1.0]], tf.float64), training)
        return 0.5 - float(high - low)

    ends = [end(True) for _ in range(200)]
    assert -0.4 < min(ends) < -0.35 and 0.35 < max(ends) < 0.4
    assert abs(np.mean(ends)) < 4 * 0.4 / np.sqrt(3 * 200)
    assert end(False) == pytest.approx(0)


@pytest.mark.parametrize("mode", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}], ids=str)
def test_fit_follows_the_likelihood_in_closed_form(mode):
    """In `dx/dt = x W` the data are Gaussian, `x = z exp(W)`, and both energies have a closed form at one time."""
    x, rate = points(5), 0.1
    model = flow(keras.layers.Dense(2, use_bias=False, dtype="float64"), "float64", solver=ACCURATE, gradient="direct")
    model.vector_field.build((None, 2))
    model.vector_field.set_weights([A.T])

    def nll(kernel):
        z = x @ scipy.linalg.expm(-kernel)
        return np.mean(np.trace(kernel) - np.sum(scipy.stats.norm.logpdf(z), axis=1))

    def slope(kernel, step=1e-6):
        ends = [[nll(kernel + sign * step * e.reshape(2, 2)) for e in np.eye(4)] for sign in (1, -1)]
        return (np.array(ends[0]) - ends[1]).reshape(2, 2) / (2 * step)

    model.compile(keras.optimizers.SGD(rate), **mode)
    losses = model.fit(x, epochs=2, verbose=0).history["loss"]
    once = A.T - rate * slope(A.T)
    np.testing.assert_allclose(losses, [nll(A.T), nll(once)], rtol=1e-6)
    np.testing.assert_allclose(model.vector_field.kernel, once - rate * slope(once), rtol=1e-6)
    assert model.evaluate(x, verbose=0) == pytest.approx(nll(model.vector_field.kernel.numpy()), rel=1e-6)


@pytest.mark.parametrize("conditional", [False, True])
def test_the_flow_is_trained_saved_and_exported(conditional, tmp_path):
    label = np.arange(6)[:, None] % 2.0
    data = (points(6, "float32"), label.astype("float32")) if conditional else points(6, "float32")
    model = moved(flow(solver=EULER, jit_compile=False), label if conditional else None)
    model.compile("sgd", jit_compile=False)
    history = model.fit(data, verbose=0, validation_data=(data,)).history
    expected = model.log_prob(*data) if conditional else model.log_prob(data)
    nll = -np.mean(expected)
    np.testing.assert_allclose([history["val_loss"][0], model.evaluate(data, verbose=0)], nll, rtol=1e-5)
    if conditional:
        other = data[0], 1 - data[1]
        found = model.evaluate(dict(zip(("x", "condition"), other, strict=True)), verbose=0)
        np.testing.assert_allclose(found, -np.mean(model.log_prob(*other)), rtol=1e-5)
        assert abs(found - nll) > 1e-3

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(data, verbose=0) == pytest.approx(nll, rel=1e-5)
    assert json.dumps(loaded.get_config()) == json.dumps(model.get_config())  # where tuples are lists
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    few = tuple(a[:5] for a in data) if conditional else data[:5]
    np.testing.assert_allclose(served.serve(few), expected[:5], atol=1e-5)


def test_a_bijector_of_tensorflow_probability(monkeypatch):
    tfp = pytest.importorskip("tensorflow_probability")
    condition = points(3, "float32")
    model = moved(flow(), condition)
    distribution = model.as_distribution(condition)
    assert distribution.batch_shape == (3,) and distribution.event_shape == (2,)
    assert distribution.batch_shape_tensor() == [3] and distribution.event_shape_tensor() == [2]
    np.testing.assert_array_equal(distribution.experimental_default_event_space_bijector()(condition), condition)
    x = distribution.sample(4, seed=1)
    assert x.shape == (4, 3, 2)
    x = tf.identity(x)  # which TensorFlow Probability has not seen
    np.testing.assert_allclose(distribution.log_prob(x), model.log_prob(x, condition), atol=1e-5)

    bijector = model.as_bijector(condition[0])
    z = tf.constant(points(5, "float32"))
    x, log_det = model.forward(z, condition[0])
    np.testing.assert_allclose(bijector.forward(z), x, atol=1e-5)
    np.testing.assert_allclose(bijector.inverse(tf.identity(x)), z, atol=1e-4)
    np.testing.assert_allclose(bijector.forward_log_det_jacobian(tf.identity(z)), log_det, atol=1e-5)
    np.testing.assert_allclose(bijector.inverse_log_det_jacobian(tf.identity(x)), -log_det, atol=1e-4)

    # Other bijectors may come after the flow; applied to the distribution, the density still takes one solve.
    scale = tfp.bijectors.Scale(2.0)
    base = tfp.distributions.MultivariateNormalDiag(tf.zeros(2), tf.ones(2))
    expected = model.log_prob(x, condition[0]) - 2 * np.log(2)
    chained = tfp.distributions.TransformedDistribution(base, tfp.bijectors.Chain([scale, bijector]))
    np.testing.assert_allclose(chained.log_prob(2 * x), expected, atol=1e-4)
    scaled = tfp.distributions.TransformedDistribution(model.as_distribution(condition[0]), scale)
    solves = []
    monkeypatch.setattr(model, "_solve", lambda *args: solves.append(args) or ContinuousFlow._solve(model, *args))
    np.testing.assert_allclose(scaled.log_prob(2 * x), expected, atol=1e-5)
    assert len(solves) == 1
    x, log_prob = model.as_distribution(condition[0]).experimental_sample_and_log_prob(3, seed=4)
    assert len(solves) == 2
    np.testing.assert_allclose(log_prob, model.log_prob(x, condition[0]), atol=1e-4)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_views_of_tensorflow_probability_keep_nothing(mode):
    """They are used with the same tensors before a tape records and before the weights change."""
    pytest.importorskip("tensorflow_probability")
    solver = RungeKutta("euler", num_steps=1)
    model = moved(flow(keras.layers.Dense(2, "tanh"), solver=solver, gradient="direct", jit_compile=False))
    distribution, bijector = model.as_distribution(), model.as_bijector()
    views = {
        distribution.log_prob: model.log_prob,
        bijector.forward_log_det_jacobian: lambda z: model.forward(z)[1],
        bijector.inverse_log_det_jacobian: lambda x: model.inverse(x)[1],
        bijector.forward: lambda z: model.forward(z)[0],
        bijector.inverse: lambda x: model.inverse(x)[0],
    }
    weights = [w.value for w in model.trainable_variables]

    def move(by):
        for w in weights:
            w.assign_add(tf.fill(w.shape, by))

    def results(functions, x):
        """What the functions return, what after the weights have changed, and the gradients of that."""
        y = bijector.forward(x)
        before = [function(v) for function in functions for v in (x, y)]
        move(0.1)
        after = []
        for function in functions:
            with tf.GradientTape() as tape:
                values = [function(v) for v in (x, y)]
            after.append([*values, *tape.gradient(values, weights)])
        move(-0.1)
        return before, after

    count = len(views) if mode == "eager" else 2  # the least to trace
    if mode == "graph":
        results = tf.function(results, autograph=False)
    x = tf.constant(points(4, "float32"))
    found, expected = (results(list(functions)[:count], x) for functions in (views, views.values()))
    for one, other in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert not np.allclose(found[0][0], found[1][0][0], atol=1e-3)


def test_a_field_may_be_any_callable_or_layer():
    x = points(4, "float32")
    for field in (keras.layers.Dense(2), lambda x: 0 * x + 1, linear):
        model = flow(field, solver=COARSE)
        np.testing.assert_allclose(model.inverse(model.forward(x)[0])[0], x, atol=2e-2)
    with pytest.raises(ValueError, match="condition"):
        flow(linear).log_prob(x, x)


def test_mixed_precision_keeps_the_density_in_single():
    model = flow(keras_node.ConcatSquashField((8,), dtype="mixed_float16"), "mixed_float16", solver=COARSE)
    full = flow(solver=COARSE)
    x = points(4, "float32")
    log_prob = model.log_prob(x)
    full.build((None, 2))
    full.set_weights(model.get_weights())
    assert log_prob.dtype == tf.float32
    np.testing.assert_allclose(log_prob, full.log_prob(x), atol=2e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"event_dim": 0}, "`event_dim` must be a positive integer. Received: event_dim=0"),
        ({"t1": 0.0}, "`0 <= steer < t1`.*Received: steer=0.0, t1=0.0"),
        ({"steer": 1.0}, "`0 <= steer < t1`.*Received: steer=1.0, t1=1.0"),
        ({"trace": "other"}, "`trace` must be one of exact, hutchinson. Received: trace='other'"),
        ({"noise": "other"}, "`noise` must be one of rademacher, gaussian. Received: noise='other'"),
        ({"kinetic_energy": -1.0}, "must be 0 or more. Received: kinetic_energy=-1.0, jacobian_norm=0.0"),
        ({"jacobian_norm": -1.0}, "must be 0 or more. Received: kinetic_energy=0.0, jacobian_norm=-1.0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ContinuousFlow(**{"event_dim": 2, **options})


def test_data_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"`x` must be of shape \(..., 2\). Received: x.shape=\(4, 3\)"):
        flow().log_prob(np.zeros((4, 3), "float32"))
    x = points(4, "float32")
    built = flow(linear, solver=COARSE)
    built(x)
    for method in (built.log_prob, built.forward, built.inverse):
        with pytest.raises(ValueError, match=r"`x` must be of shape \(..., 2\). Received: x.shape=\(2, 4\)"):
            method(np.zeros((2, 4), "float32"))
    with pytest.raises(ValueError, match=r"A flow takes `x`.*Received: a tuple with length 3"):
        flow()((x, x, x))
    with pytest.raises(ValueError, match=r"A flow takes `x`.*Received: a dict with the keys \['cond', 'x'\]"):
        flow()({"x": x, "cond": x})
    model = flow(linear, solver=COARSE)
    model.compile("adam", run_eagerly=True)
    with pytest.raises(ValueError, match=r"without targets.*Received: y="):
        model.fit(points(4, "float32"), np.zeros(4), verbose=0)


def test_conditions_that_the_weights_are_not_for_are_refused():
    x, condition = points(4, "float32"), np.ones((4, 3), "float32")
    model, plain = flow(solver=COARSE), flow(solver=COARSE)
    model((x, condition))
    plain(x)
    for draw, received in [
        (lambda: model.log_prob(x), "condition=None"),
        (lambda: model.sample(5), "condition=None"),
        (lambda: model.as_distribution(condition[:, :2]).log_prob(x), r"condition.shape=\(4, 2\)"),
    ]:
        with pytest.raises(ValueError, match=rf"made for conditions of shape \(batch, 3\).*Received: {received}"):
            draw()
    with pytest.raises(ValueError, match=r"made for no condition.*Received: condition.shape=\(4, 3\)"):
        plain.log_prob(x, condition)
    # One condition for all samples has as many features as the weights.
    np.testing.assert_allclose(model.log_prob(x, condition[0]), model.log_prob(x, condition), rtol=1e-5)


@pytest.mark.parametrize("kind", ["arrays", "dictionary", "data set"])
def test_labels_are_no_conditions(kind):
    """A batch of them has the shape of one condition with as many features."""
    x, labels = points(4, "float32"), np.arange(4.0)
    data = {"x": x, "condition": labels} if kind == "dictionary" else (x, labels)
    data = tf.data.Dataset.from_tensors((data,)).unbatch().batch(2) if kind == "data set" else data
    model = flow(solver=COARSE)
    model.compile("sgd")
    for method in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=r"such as a label, needs an axis of features: `condition\[:, None\]`"):
            method(data, verbose=0)


class Guided(keras.layers.Layer):
    """A field that may do without its condition, as in classifier-free guidance."""

    def build(self, *shapes):
        self.plain, self.more = keras.layers.Dense(2), keras.layers.Dense(2)
        self.plain.build((None, 2))
        self.more.build((None, 3))

    def call(self, t, x, args=None):
        return self.plain(x) if args is None else self.plain(x) + self.more(args)


@pytest.mark.parametrize("first", [True, False])
def test_a_field_may_do_without_its_condition(first):
    x, condition = points(4, "float32"), np.zeros((4, 3), "float32")
    model = flow(Guided(), solver=COARSE)
    results = [model.log_prob(x, condition if given else None) for given in (first, not first)]
    np.testing.assert_allclose(*results, rtol=1e-6)  # the condition is zero, and so is the bias


def test_densities_of_lists_and_the_number_of_samples():
    model = flow(linear, solver=COARSE)
    np.testing.assert_array_equal(model.log_prob([[0.1, 0.2]]), model.log_prob(np.array([[0.1, 0.2]], "float32")))
    for n in (-1, 2.5, np.ones(3)):
        with pytest.raises(ValueError, match="`n` must be an integer, 0 or more"):
            model.sample(n)
    assert model.sample(3.0).shape == (3, 2)


def test_noise_inside_a_field_needs_hutchinsons_estimate():
    field = keras.Sequential([keras.layers.Dense(4), keras.layers.Dropout(0.5), keras.layers.Dense(2)])
    x = points(4, "float32")
    with pytest.raises(ValueError, match="dropout"):
        flow(field, solver=COARSE)(x, training=True)
    for model in (flow(field, solver=COARSE), flow(field, solver=COARSE, trace="hutchinson")):
        assert np.all(np.isfinite(model(x, training=model.trace == "hutchinson")))


def test_conditions_of_an_unknown_number():
    model = flow(turning, solver=COARSE, seed=0)
    condition = points(3, "float32")[:, :1]
    model((points(3, "float32"), condition))

    @tf.function(input_signature=[tf.TensorSpec((None, 1))])
    def draw(condition):
        x = model.sample(4, condition, seed=1)
        return x, model.as_distribution(condition).log_prob(x)

    x, log_prob = draw(condition)
    np.testing.assert_allclose(x, model.sample(4, condition, seed=1), rtol=1e-5)
    np.testing.assert_allclose(log_prob, model.log_prob(x, condition), rtol=1e-4)
    wide = tf.function(lambda condition: model.log_prob(x, condition), input_signature=[tf.TensorSpec((None, None))])
    np.testing.assert_allclose(wide(condition), log_prob, rtol=1e-4)


@pytest.mark.parametrize("objective", ["likelihood", "flow_matching"])
def test_inputs_of_several_ranks_after_one_another(objective):
    model = flow(lambda t, x: turning(t, x, 1.0), solver=COARSE, seed=0, objective=objective)
    model.compile("sgd")
    for x in (points(6, "float32"), points(6, "float32").reshape(2, 3, 2), points(6, "float32").reshape(2, 1, 3, 2)):
        expected = model.log_prob(x)
        np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5)
        np.testing.assert_allclose(model.evaluate(x, verbose=0), -np.mean(expected), rtol=1e-5)
        assert np.isfinite(model.fit(x, verbose=0).history["loss"])


def test_vectors_and_conditions_broadcast_against_each_other():
    model = flow(turning, solver=COARSE, seed=0)
    x, conditions = points(5, "float32"), points(4, "float32")[:, :1]
    pairs = np.repeat(x, 4, axis=0), np.tile(conditions, (5, 1))
    expected = np.reshape(model.log_prob(*pairs), (5, 4))
    np.testing.assert_allclose(model.log_prob(x[:, None], conditions), expected, rtol=1e-5)
    distribution = model.as_distribution(conditions)
    np.testing.assert_allclose(distribution.log_prob(x[:, None]), expected, rtol=1e-5)
    np.testing.assert_allclose(distribution.log_prob(x[0]), expected[0], rtol=1e-5)
    z, log_det = model.inverse(x[:, None], conditions)
    assert z.shape == (5, 4, 2) and log_det.shape == (5, 4)
    np.testing.assert_allclose(model.as_bijector(conditions).inverse(x[:, None]), z, rtol=1e-5)
    symbolic = model((keras.Input((1, 2)), keras.Input((7, 1))))
    assert symbolic.shape == (None, 7)
    for condition, shape in ((conditions, r"\(4, 1\)"), (tf.constant(1.0), r"\(\)")):
        with pytest.raises(ValueError, match=rf"must broadcast .*x.shape=\(5, 2\), condition.shape={shape}"):
            model.log_prob(x, condition)
