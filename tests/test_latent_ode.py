"""The latent ODE, against closed forms, SciPy, finite differences, and a Python loop over the observations."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from scipy import stats

import keras_node
from keras_node import LatentODE, ODERNNCell, RungeKutta

BATCH, STEPS, FEATURES, LATENT = 4, 5, 2, 3
COARSE = RungeKutta("midpoint", num_steps=1)


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


@pytest.fixture
def float64():
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy("float32")


def latent_ode(**kwargs):
    return LatentODE(LATENT, **{"units": 6, "solver": COARSE, "gradient": "direct", **kwargs})


def series(dtype="float32", steps=STEPS, seed=0):
    """Two of the moments of a sample are one, channels are missing, and the last samples end in padding."""
    rng = np.random.default_rng(seed)
    times = 0.3 + np.cumsum(rng.uniform(0.1, 0.6, size=(BATCH, steps)), axis=1)
    times[0, 2] = times[0, 1]
    values = rng.normal(size=(BATCH, steps, FEATURES))
    mask = rng.uniform(size=values.shape) < 0.7
    mask[..., 0] |= ~mask.any(axis=-1)
    for sample in (2, 3):
        mask[sample, 3:], times[sample, 3:] = False, 0
    return times.astype(dtype), values.astype(dtype), mask


def garbage(x):
    """The same series, with other values where none was observed and other times in the padding."""
    times, values, mask = x
    values = np.where(mask, values, np.nan).astype(values.dtype)
    return np.where(mask.any(axis=-1), times, [-7, 1e9, 3, 0, np.nan]).astype(times.dtype), values, mask


def fixed_draw(model, x, y=None, **kwargs):
    """The loss for a draw that is the same every time, and the metrics."""
    model.seed_generator.state.assign([1, 2])
    model.reset_metrics()
    loss = model.compute_loss(x, y, **kwargs)
    return loss, {name: float(value) for name, value in model.get_metrics_result().items()}


def draw_of(model, x):
    posterior = model.posterior(x)
    seed = keras.random.SeedGenerator()
    seed.state.assign([1, 2])
    loc = posterior.mean()
    return loc + posterior.stddev() * keras.random.normal(loc.shape, dtype=loc.dtype, seed=seed)


@pytest.mark.parametrize("targets", [False, True], ids=["reconstructing", "with targets"])
@pytest.mark.parametrize("noise_scale", [0.3, None], ids=["fixed noise", "learnt noise"])
def test_the_loss_is_the_negative_elbo(targets, noise_scale, float64):
    from tensorflow_probability import distributions as tfd

    model, x = latent_ode(noise_scale=noise_scale), series("float64")
    y = series("float64", steps=7, seed=1) if targets else None
    loss, metrics = fixed_draw(model, x, y)
    if noise_scale is None:
        model.log_noise_scale.assign([-0.5, 0.2])
        noise_scale = np.exp([-0.5, 0.2])
        loss, metrics = fixed_draw(model, x, y)

    times, values, mask = x if y is None else y
    times = np.maximum.accumulate(times, axis=1)  # padded times are zero
    mean = model.decode(draw_of(model, x), times).numpy()
    log_prob = stats.norm.logpdf(values, mean, noise_scale)
    np.testing.assert_allclose(metrics["nll"], -log_prob[mask].sum() / BATCH, rtol=1e-6)
    np.testing.assert_allclose(metrics["mse"], np.mean((mean - values)[mask] ** 2), rtol=1e-6)

    posterior = model.posterior(x)
    loc, scale = posterior.mean().numpy(), posterior.stddev().numpy()
    closed_form = np.sum((scale**2 + loc**2 - 1) / 2 - np.log(scale), axis=1)
    np.testing.assert_allclose(closed_form, tfd.kl_divergence(posterior, model.prior), rtol=1e-10)
    np.testing.assert_allclose(metrics["kl"], closed_form.mean(), rtol=1e-6)
    np.testing.assert_allclose(loss, -log_prob[mask].sum() / BATCH + closed_form.mean(), rtol=1e-10)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)


def test_sample_weights_weigh_the_series(float64):
    model, x = latent_ode(), series("float64")
    parts = [fixed_draw(model, x, sample_weight=np.eye(BATCH)[i]) for i in range(BATCH)]
    loss, metrics = fixed_draw(model, x)
    np.testing.assert_allclose(sum(part for part, _ in parts), loss)
    np.testing.assert_allclose(np.mean([part["nll"] for _, part in parts]), metrics["nll"], rtol=1e-6)


@pytest.mark.parametrize("ode_rnn", [False, True], ids=["GRU", "ODE-RNN"])
def test_the_encoder_reads_the_observations_backwards(ode_rnn, float64):
    gru, field = layers.GRUCell(6), layers.Dense(6, activation="tanh", bias_initializer="normal")
    model = latent_ode(encoder_cell=ODERNNCell(gru, field, solver=COARSE) if ode_rnn else gru, t0=0.1)
    times, values, mask = series("float64")
    posterior = model.posterior((times, values, mask))
    for sample in range(BATCH):
        state, after = tf.zeros((1, 6), "float64"), None
        for i in [*reversed(np.flatnonzero(mask[sample].any(axis=-1))), None]:
            seen = np.zeros(FEATURES) if i is None else mask[sample, i]
            step = [np.where(seen, 0.0 if i is None else values[sample, i], 0), seen]
            t = 0.1 if i is None else times[sample, i]
            elapsed = 0.0 if after is None else after - t
            if ode_rnn:
                state = keras_node.odeint(field, state, [0.0, elapsed], solver=COARSE).ys[-1]
            step = np.concatenate(step if ode_rnn else [*step, [elapsed]])[None]
            _, (state,) = gru(step, [state])
            after = t
        loc, scale = np.split(model.posterior_parameters(state).numpy(), 2, axis=-1)
        np.testing.assert_allclose(posterior.mean()[sample], loc[0], rtol=1e-10)
        np.testing.assert_allclose(posterior.stddev()[sample], np.log1p(np.exp(scale[0])) + 1e-5, rtol=1e-10)


@pytest.mark.parametrize("targets", [False, True], ids=["observations", "targets"])
def test_what_was_not_observed_has_no_effect(targets, float64):
    model, x = latent_ode(), series("float64")
    given = (x, series("float64", seed=1)) if targets else (x, None)
    spoilt = (given[0], garbage(given[1])) if targets else (garbage(x), None)

    def loss_and_gradients(x, y):
        with tf.GradientTape() as tape:
            loss, metrics = fixed_draw(model, x, y)
        return [loss, metrics["mse"], *tape.gradient(loss, model.trainable_variables)]

    for clean, dirty in zip(loss_and_gradients(*given), loss_and_gradients(*spoilt), strict=True):
        np.testing.assert_array_equal(clean, dirty)
    np.testing.assert_array_equal(model(given[0]), model(spoilt[0]))


def test_missing_values_may_be_nan_and_a_mask_of_steps_is_enough(float64):
    model, (times, values, mask) = latent_ode(), series("float64")
    expected, _ = fixed_draw(model, (times, values, mask))
    missing = np.where(mask, values, np.nan)
    for given in ((times, missing), (times, missing, mask.any(-1)), (times, missing, np.ones_like(mask))):
        np.testing.assert_array_equal(fixed_draw(model, given)[0], expected)
    steps = mask.any(-1)
    steps[:, 1] = False
    by_steps, _ = fixed_draw(model, (times, missing, steps))
    np.testing.assert_array_equal(by_steps, fixed_draw(model, (times, values, mask & steps[..., None]))[0])
    assert abs(by_steps - expected) > 1e-3


def test_more_padding_changes_nothing(float64):
    model, x = latent_ode(), series("float64")
    longer = [np.pad(a, [(0, 0), (0, 3)] + [(0, 0)] * (a.ndim - 2)) for a in x]
    np.testing.assert_allclose(fixed_draw(model, longer)[0], fixed_draw(model, x)[0], rtol=1e-14)
    np.testing.assert_array_equal(model(longer)[:, :STEPS], model(x))


def test_a_sample_does_not_depend_on_its_batch(float64):
    model, x = latent_ode(), series("float64")
    alone = np.concatenate([model(tuple(a[i : i + 1] for a in x)) for i in range(BATCH)])
    np.testing.assert_allclose(model(x), alone, rtol=1e-12)


@pytest.mark.parametrize("solver", [COARSE, RungeKutta("tsit5", rtol=1e-8, atol=1e-9)], ids=["constant", "adaptive"])
def test_reconstruction_is_extrapolation_to_the_times_observed(solver, float64):
    model, x = latent_ode(solver=solver), series("float64")
    observed = x[2].any(axis=-1)
    times = np.maximum.accumulate(x[0], axis=1)
    reconstruction = model.reconstruct(x)
    np.testing.assert_allclose(reconstruction[observed], model.extrapolate(x, times)[observed], rtol=1e-12)
    np.testing.assert_array_equal(reconstruction, model.decode(model.posterior(x).mean(), times))
    np.testing.assert_array_equal(reconstruction, model(x))


def test_moments_without_observations_are_reconstructed(float64):
    model, (times, values, mask) = latent_ode(solver=RungeKutta("tsit5", rtol=1e-10, atol=1e-12)), series("float64")
    mask[:, 1] = False
    mask[0, 4] = False  # the last one
    np.testing.assert_allclose(
        model((times, values, mask))[:2], model.extrapolate((times, values, mask), np.maximum.accumulate(times, 1))[:2]
    )
    assert not np.allclose(model((times, values, mask))[0, 4], model((times, values, mask))[0, 3])


def test_times_of_the_batch_may_be_shared(float64):
    model, (_, values, _) = latent_ode(solver=RungeKutta("rk4", num_steps=4)), series("float64")
    shared, mask = np.linspace(0.2, 2.0, STEPS), np.ones(values.shape, bool)
    own = np.tile(shared, (BATCH, 1))
    np.testing.assert_allclose(model((shared, values, mask)), model((own, values, mask)), rtol=1e-12)
    np.testing.assert_allclose(
        fixed_draw(model, (shared, values, mask))[0], fixed_draw(model, (own, values, mask))[0], rtol=1e-12
    )
    before = model.extrapolate((own, values, mask), [0.0, -0.5, -1.0])  # the solve may run backwards from t0
    assert before.shape == (BATCH, 3, FEATURES) and np.isfinite(before).all()


def test_the_gradient_of_the_elbo_is_that_of_finite_differences(float64):
    model, x = latent_ode(), series("float64")
    model.compute_loss(x)  # makes the weights

    def loss():
        return fixed_draw_loss(model, x)

    with tf.GradientTape() as tape:
        value = loss()
    gradients = tape.gradient(value, model.trainable_variables)
    rng, eps = np.random.default_rng(0), 1e-5
    for variable, gradient_of_variable in zip(model.trainable_variables, gradients, strict=True):
        start, direction = variable.numpy(), rng.normal(size=variable.shape)
        ends = []
        for sign in (1, -1):
            variable.assign(start + sign * eps * direction)
            ends.append(float(loss()))
        variable.assign(start)
        expected = (ends[0] - ends[1]) / (2 * eps)
        np.testing.assert_allclose(np.sum(gradient_of_variable * direction), expected, rtol=1e-5, atol=1e-7)


def fixed_draw_loss(model, x):
    model.seed_generator.state.assign([1, 2])
    return model.compute_loss(x)


def test_the_weight_of_the_divergence_rises_in_training_only(float64):
    model, x = latent_ode(kl_annealing_steps=4), series("float64")
    assert float(model.kl_weight) == 1  # not compiled
    model.compile(keras.optimizers.SGD(0.0))
    weights = []

    def note(batch, logs):
        weights.append((logs["loss"] - logs["nll"]) / logs["kl"])

    model.fit(
        x, epochs=6, batch_size=BATCH, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=note)]
    )
    np.testing.assert_allclose(weights, [0, 0.25, 0.5, 0.75, 1, 1], atol=1e-5)
    model.compile(keras.optimizers.SGD(0.0))
    assert float(model.kl_weight) == 0
    logs = model.evaluate(x, verbose=0, return_dict=True)
    np.testing.assert_allclose(logs["loss"], logs["nll"] + logs["kl"], rtol=1e-6)


def without_noise(model):
    """Makes the posterior so narrow that it does not matter what is drawn: XLA draws other numbers."""
    for parameters, end in zip(model.posterior_parameters.variables, (0.0, -20.0), strict=True):
        value = parameters.numpy()
        value[..., LATENT:] = end
        parameters.assign(value)


def test_xla_computes_the_same_loss_and_gradients(float64):
    model, x = latent_ode(noise_scale=0.1), series("float64")
    model(x)
    without_noise(model)

    def loss_and_gradients():
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x)
        return loss, tape.gradient(loss, model.trainable_variables)

    loss, gradients = tf.function(loss_and_gradients, jit_compile=True, autograph=False)()
    expected, expected_gradients = loss_and_gradients()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_fit_under_xla_takes_the_step_of_the_gradient_and_the_model_is_saved(tmp_path, float64):
    model, y = latent_ode(kl_annealing_steps=10), series("float64")
    half = (y[0], y[1], y[2] & (np.arange(STEPS) % 2 == 0)[:, None])
    model(half)
    without_noise(model)
    model.compile(keras.optimizers.SGD(1e-3), jit_compile=True)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(half, y)
    expected = [
        w - 1e-3 * g
        for w, g in zip(model.trainable_variables, tape.gradient(loss, model.trainable_variables), strict=True)
    ]
    history = model.fit(half, y, batch_size=BATCH, verbose=0).history
    assert sorted(history) == ["kl", "loss", "mse", "nll"]
    np.testing.assert_allclose(history["loss"], [loss], rtol=1e-5)
    for found, value in zip(model.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(half), model(half))
    np.testing.assert_array_equal(loaded.log_noise_scale, model.log_noise_scale)
    assert float(loaded.kl_weight) == pytest.approx(0.1)  # the annealing goes on where it was


def test_the_configuration_survives_a_round_trip():
    settings = {
        "noise_scale": 0.1,
        "kl_annealing_steps": 7,
        "t0": -1.0,
        "track_stats": True,
        "units": 5,
        "dtype": "float64",
    }
    cell = ODERNNCell(layers.GRUCell(4), layers.Dense(4))
    model = latent_ode(
        **settings, encoder_cell=cell, vector_field=layers.Dense(LATENT, "tanh"), decoder=layers.Dense(2)
    )
    again = LatentODE.from_config(json.loads(json.dumps(model.get_config())))
    assert again.get_config() == model.get_config()
    assert isinstance(again.encoder.cell, ODERNNCell) and again.dynamics.t0 == -1.0
    x = series("float64")
    model.compute_loss(x), again.compute_loss(x)
    again.set_weights(model.get_weights())
    np.testing.assert_array_equal(again(x), model(x))
    assert again(x).dtype == "float64" and len(again.get_weights()) == len(model.get_weights())


def test_unknown_batch_size_and_export(tmp_path):
    model, x = latent_ode(), series()
    expected = model(x)
    signature = [tf.TensorSpec([None, None]), *[tf.TensorSpec([None, None, FEATURES])] * 2]
    function = tf.function(lambda *x: (model(x), model.compute_loss(x)), input_signature=signature, autograph=False)
    outputs, loss = function(*(tf.cast(a, "float32") for a in x))
    np.testing.assert_allclose(outputs, expected, rtol=1e-6, atol=1e-6)
    assert np.isfinite(loss)

    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(
        served.serve(tuple(a[:3].astype("float32") for a in x)), expected[:3], rtol=1e-6, atol=1e-6
    )


def test_half_precision_is_for_the_networks_only():
    model, x = latent_ode(dtype="mixed_bfloat16"), series()
    assert model(x).dtype == "bfloat16"
    assert model.posterior(x).mean().dtype == "float32"
    assert model.compute_loss(x).dtype == "float32"
    assert all(v.dtype == "float32" for v in model.trainable_variables)


def test_samples_are_paths_from_the_prior():
    class Still(layers.Layer):
        def call(self, z):
            return keras.ops.zeros_like(z)

    model = LatentODE(2, vector_field=Still(), decoder=layers.Identity(), solver=COARSE)
    model(series())
    paths = model.sample(4000, [0.0, 1.0, 2.0]).numpy()
    np.testing.assert_array_equal(paths[:, 0], paths[:, 2])
    assert all(stats.kstest(paths[:, 0, i], "norm").pvalue > 0.01 for i in range(2))
    assert not np.array_equal(paths, model.sample(4000, [0.0, 1.0, 2.0]))


def test_statistics_of_the_solves_are_in_the_logs():
    model, x = latent_ode(track_stats=True), series()
    model.compile("sgd")
    logs = model.evaluate(x, verbose=0, return_dict=True)
    assert logs["dynamics_steps"] == STEPS and logs["dynamics_failed"] == 0


def test_regularizers_of_layers_count(float64):
    field = layers.Dense(LATENT, kernel_regularizer=keras.regularizers.L2(0.5))
    model, x = latent_ode(vector_field=field), series("float64")
    loss, metrics = fixed_draw(model, x)
    np.testing.assert_allclose(
        loss - metrics["nll"] - metrics["kl"], 0.5 * np.sum(field.kernel.numpy() ** 2), rtol=1e-5
    )


def test_arrays_with_shared_times_train_like_those_with_own_times():
    _, values, _ = series()
    shared, mask = np.linspace(0.2, 2.0, STEPS, dtype="float32"), np.ones(values.shape, bool)
    own = np.tile(shared, (BATCH, 1))

    def results(times):
        keras.utils.set_random_seed(0)
        model, x = latent_ode(solver=RungeKutta("rk4", num_steps=2), jit_compile=False), (times, values, mask)
        model.compile("adam", run_eagerly=True)
        history = model.fit(x, x, validation_data=(x, x), batch_size=BATCH - 1, shuffle=False, verbose=0).history
        return [*history.values(), model.evaluate(x, verbose=0), model.predict(x, batch_size=2, verbose=0)]

    for with_shared, with_own in zip(results(shared), results(own), strict=True):
        np.testing.assert_array_equal(with_shared, with_own)


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_arrays_of_times_that_keras_would_round_are_refused(method):
    model, (times, values, mask) = latent_ode(t0=1.7e9), series("float64")
    model.compile("adam")
    with pytest.raises(ValueError, match="would change most differences of these times"):
        getattr(model, method)((1.7e9 + times, values, mask), verbose=0)


def test_errors_say_what_arrived():
    x = series()
    with pytest.raises(ValueError, match=r"leave `loss` out.*Received: loss='mse'"):
        latent_ode().compile("adam", loss="mse")
    with pytest.raises(ValueError, match=r"as many channels.*Received: a decoder with output"):
        latent_ode(decoder=layers.Dense(5)).compute_loss(x)
    with pytest.raises(ValueError, match="how many channels an observation has"):
        latent_ode().sample(3, [0.0, 1.0])
    with pytest.raises(ValueError, match=r"tuple `\(times, values, mask\)`"):
        latent_ode().compute_loss(x[:1])
    with pytest.raises(ValueError, match=r"\(batch, T, features\).*Received: data of shape"):
        latent_ode()((x[0], x[1][..., 0], x[2]))
    model = latent_ode()
    model.compile("adam")
    with pytest.raises(ValueError, match=r"tuple `\(times, values, mask\)`.*Received: data of shape \(2, 7, 2\)"):
        model.fit(np.ones((2, 7, 2)), verbose=0)
    for part in (x[0][:, 1:], *x[1:]), (*x[:2], x[2][..., :1]), (*x[:2], x[2][:, 1:]):
        with pytest.raises(ValueError, match=r"\(batch, T, features\).*Received: data of shape"):
            latent_ode()(part)
    for channels in (1, 3):
        y = np.arange(1.0, STEPS + 1, dtype="float32"), np.ones((BATCH, STEPS, channels), "float32")
        with pytest.raises(ValueError, match=r"the channels that the decoder returns.*for 2 channels"):
            latent_ode().compute_loss(x, y)
    with pytest.raises(ValueError, match="must not decrease"):
        latent_ode()((-x[0], *x[1:]))
    with pytest.raises(ValueError, match=r"`noise_scale` must be positive. Received: noise_scale=0.0"):
        latent_ode(noise_scale=0.0)
