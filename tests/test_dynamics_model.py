"""Dynamics from trajectories: the loss against NumPy and closed forms, windows, horizons, grey boxes, forecasts."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.integrate import solve_ivp

import keras_node
from keras_node import DynamicsModel, GreyBoxField, RungeKutta, TrainableScalar

RK4 = RungeKutta("rk4", num_steps=4)
TIMES = np.array([0.0, 0.3, 0.5, 1.1, 1.4, 2.0, 2.1])


@keras.saving.register_keras_serializable(package="test_dynamics_model")
def decay(y, rate):
    return -rate * y


def decay_field(rate=0.7):
    return GreyBoxField(decay, {"rate": TrainableScalar(rate, minimum=0.0)})


def model_of(field=None, **options):
    whole = options.pop("whole", False)
    model = DynamicsModel(decay_field() if field is None else field, **{"solver": RK4, "jit_compile": False, **options})
    model.compile(keras.optimizers.SGD(0.0), jit_compile=whole)
    return model


def noisy(seed=0, batch=3):
    """Irregular times of every trajectory, values with noise, and a mask in which steps and channels are missing."""
    rng = np.random.default_rng(seed)
    times = TIMES + rng.uniform(0, 0.05, (batch, 1))
    values = np.exp(-0.7 * times)[..., None] * rng.uniform(0.5, 2, (batch, 1, 2)) + 0.1 * rng.normal(
        size=(batch, len(TIMES), 2)
    )
    mask = rng.uniform(size=values.shape) < 0.7
    mask[:, [0, 2, 4, 6]] = True
    mask[1, 3] = False
    return times, values, mask


def loss_by_hand(times, values, mask, scale, window, rate=0.7, horizon=99):
    """The loss of windows that begin at observed states, for `y(t) = y0 exp(-rate t)`."""
    losses = []
    for t, v, m in zip(times, values, mask, strict=True):
        squares = []
        for i in range(1, len(t)):
            start = (i - 1) // window * window
            if i - start <= horizon:
                errors = (v[start] * np.exp(-rate * (t[i] - t[start])) - v[i]) / scale
                squares += list(errors[m[i]] ** 2)
        losses.append(np.mean(squares))
    return np.mean(losses)


@pytest.mark.parametrize(("window", "missing"), [(None, "mask"), (4, "nan"), (2, "mask")])
def test_the_loss_is_the_mean_square_over_what_was_observed(window, missing):
    times, values, mask = noisy()
    garbage = np.where(mask, values, np.nan if missing == "nan" else 1e6)
    times_with_garbage = np.where(mask.any(-1), times, -1e5)
    x = (times_with_garbage, garbage) if missing == "nan" else (times_with_garbage, garbage, mask)
    model = model_of(window=window)
    history = model.fit(x, verbose=0, batch_size=3).history
    observed = np.where(mask, values, np.nan).reshape(-1, 2)
    scale = np.nanstd(observed, axis=0)
    np.testing.assert_allclose(model.scale, scale, rtol=1e-5)
    np.testing.assert_allclose(model.center, np.nanmean(observed, axis=0), rtol=1e-5)
    expected = loss_by_hand(times, values, mask, scale, window or 99)
    np.testing.assert_allclose(history["loss"], [expected], rtol=1e-4)
    results = model.evaluate(x, verbose=0, return_dict=True)
    np.testing.assert_allclose(results["loss"], expected, rtol=1e-4)
    model.fit((times, 3 * values), verbose=0)
    np.testing.assert_allclose(model.scale, scale, rtol=1e-5)  # the scale is that of the first data
    unscaled = loss_by_hand(times, values, mask, 1.0, window or 99)
    assert abs(results["mse"] / unscaled - 1) < 0.2  # a mean over all values, and not of those of trajectories


@pytest.mark.parametrize(
    ("mode", "gradient"), [("eager", "checkpointed"), ("graph", "backsolve"), ("xla", "reversible")]
)
def test_the_gradient_is_that_of_finite_differences(mode, gradient):
    times, values, mask = noisy()
    x = {"times": times, "values": values, "mask": mask}
    keras.config.set_dtype_policy("float64")
    try:
        model = model_of(window=2, solver=RungeKutta("rk4", num_steps=30), gradient=gradient)
    finally:
        keras.config.set_dtype_policy("float32")
    model.adapt(x)
    (w,) = model.trainable_variables

    def slope():
        with tf.GradientTape() as tape:
            value = model.compute_loss(x, training=True)
        return tape.gradient(value, w.value)

    slope = slope if mode == "eager" else tf.function(slope, jit_compile=mode == "xla")
    computed = float(slope())
    scale = np.asarray(model.scale)
    ends = [loss_by_hand(times, values, mask, scale, 2, rate=0.7 * np.exp(d)) for d in (1e-5, -1e-5)]
    np.testing.assert_allclose(computed, (ends[0] - ends[1]) / 2e-5, rtol=1e-4)


def test_trained_initial_states_and_the_gap():
    times, values, _ = noisy()
    model = model_of(window=2, initial_states="trained", continuity=0.5)
    model.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    history = model.fit((times, values), verbose=0, batch_size=3).history
    scale = np.asarray(model.scale)
    starts = values[:, [0, 2, 4]]  # they begin at the observed states
    np.testing.assert_allclose(model.window_states, starts, atol=1e-6)
    squares = [
        (starts[:, w] * np.exp(-0.7 * (times[:, i] - times[:, 2 * w]))[:, None] - values[:, i]) ** 2
        for w in range(3)
        for i in range(2 * w, 2 * w + 3)  # the first state of a window counts too
    ]
    gaps = [
        (starts[:, w] * np.exp(-0.7 * (times[:, 2 * w + 2] - times[:, 2 * w]))[:, None] - starts[:, w + 1]) ** 2
        for w in range(2)
    ]
    gap = np.mean(np.array(gaps) / scale**2)
    np.testing.assert_allclose(history["gap"], [gap], rtol=1e-4)
    np.testing.assert_allclose(history["loss"], [np.mean(np.array(squares) / scale**2) + 0.5 * gap], rtol=1e-4)
    # In evaluation, windows begin at observed states, and a gap has no weight.
    results = model.evaluate((times, values), verbose=0, return_dict=True)
    everything = np.ones(values.shape, bool)
    np.testing.assert_allclose(results["loss"], loss_by_hand(times, values, everything, scale, 2), rtol=1e-4)
    # A horizon of one interval ends before the gaps.
    model.horizon.assign(1)
    history = model.fit((times, values), verbose=0, batch_size=3).history
    near = [squares[3 * w + i] for w in range(3) for i in (0, 1)]
    assert history["gap"] == [0]
    np.testing.assert_allclose(history["loss"], [np.mean(np.array(near) / scale**2)], rtol=1e-4)
    with pytest.raises(ValueError, match=r"Only a model.*Received: a model with initial_states='observed'"):
        _ = model_of().window_states
    with pytest.raises(ValueError, match=r"3 trajectories with 3 windows.*Received: 2 trajectories"):
        model.fit((times[:2], values[:2]), verbose=0)


def test_trained_states_remove_the_noise_and_find_the_rate():
    """Closed form: with the true rate, the best initial state is the weighted mean of all observations."""
    rng = np.random.default_rng(1)
    times, start = np.linspace(0, 2, 21), rng.uniform(1, 2, (4, 1, 1))
    values = start * np.exp(-0.7 * times)[:, None] + 0.1 * rng.normal(size=(4, 21, 1))
    model = DynamicsModel(decay_field(2.0), solver=RungeKutta("rk4", num_steps=1), initial_states="trained")
    model.compile(keras.optimizers.Adam(0.05))
    model.fit((times, values), epochs=150, batch_size=4, verbose=0)
    rate = float(model.vector_field.scalars["rate"].value)
    basis = np.exp(-rate * times)
    best = np.einsum("bt,t->b", values[..., 0], basis) / np.sum(basis**2)
    trained = np.asarray(model.window_states)[:, 0, 0]
    np.testing.assert_allclose(trained, best, atol=2e-3)
    # The best rate for these data, by a search in NumPy.
    rates = np.linspace(0.5, 0.9, 4001)
    curves = np.exp(-rates[:, None] * times)
    fitted = np.einsum("bt,rt->br", values[..., 0], curves) ** 2 / np.sum(curves**2, axis=1)
    assert abs(rate - rates[np.argmax(fitted.sum(0))]) < 3e-3


def test_a_horizon_grows_without_another_trace():
    times, values, mask = noisy()
    traces, losses = [], []

    @keras.saving.register_keras_serializable(package="test_dynamics_model")
    def counted(y):
        traces.append(1)
        return -0.7 * y

    class Losses(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs):
            losses.append((int(self.model.horizon), logs["loss"], len(traces)))

    model = model_of(counted, window=4)
    growing = keras_node.GrowingHorizon(1, 4, epochs=3)
    model.fit((times, values, mask), epochs=4, verbose=0, batch_size=3, callbacks=[growing, Losses()])
    assert [horizon for horizon, *_ in losses] == [1, 2, 4, 4]
    assert len({number for *_, number in losses}) == 1
    scale = np.asarray(model.scale)
    for horizon, loss, _ in losses:
        expected = loss_by_hand(times, values, mask, scale, 4, horizon=horizon)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
    other = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    other.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"for a `keras_node.DynamicsModel`.*Received"):
        other.fit(np.ones((2, 1)), np.ones((2, 1)), verbose=0, callbacks=[growing])


@keras.saving.register_keras_serializable(package="test_dynamics_model")
class Driven(keras.layers.Layer):
    """`dy/dt = u(t) - y`, with a weight that does nothing."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.w = self.add_weight(shape=(), name="w")

    def call(self, t, y, args):
        return keras_node.ControlPath(*args)(t) - y + 0 * self.w


@pytest.mark.parametrize("window", [None, 4])
def test_controls_and_jumps(window):
    """Against SciPy, from dose to dose, for a control between whose observations the path is linear."""
    times = np.linspace(0, 2, 9)
    controls = np.sin(3 * times)[None, :, None] * np.array([1.0, 2.0])[:, None, None]
    jump_times, amounts = np.array([[0.3, 1.0], [1.2, 5.0]]), np.array([[[1.0], [0.5]], [[-1.0], [9.0]]])
    expected = []
    for b in range(2):
        y, path, t = np.array([0.5 + b]), [], 0.0
        for end in times:
            for when, amount in zip(jump_times[b], amounts[b], strict=True):
                if t <= when < end:
                    y = solve_piece(times, controls[b, :, 0], y, t, when) + amount
                    t = when
            y, t = solve_piece(times, controls[b, :, 0], y, t, end), end
            path.append(y)
        expected.append(path)
    expected = np.array(expected)
    model = model_of(Driven(), window=window, interpolation="linear", solver=RungeKutta("rk4", num_steps=4))
    x = {"times": times, "values": expected, "controls": controls, "jump_times": jump_times, "jump_amounts": amounts}
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=2e-4)
    assert model.evaluate(x, verbose=0, return_dict=True)["mse"] < 1e-7
    path = keras_node.control_path(times, tf.constant(controls, tf.float32), interpolation="linear")
    forecast = model.forecast(expected[:, 0], times, args=path, jumps=(jump_times, amounts))
    np.testing.assert_allclose(forecast, expected, atol=2e-4)


def solve_piece(times, controls, y0, t0, t1):
    if t1 == t0:
        return y0
    rate = lambda t, y: np.interp(t, times, controls) - y  # noqa: E731
    return solve_ivp(rate, (t0, t1), y0, rtol=1e-9, atol=1e-10, max_step=0.02).y[:, -1]


def test_errors_of_forecasts_by_the_number_of_steps():
    times, values, mask = noisy()
    model = model_of()
    errors = model.forecast_errors((times, values, mask), horizon=2)
    for ahead in (1, 2):
        squares = [
            (values[b, s] * np.exp(-0.7 * (times[b, s + ahead] - times[b, s])) - values[b, s + ahead]) ** 2
            * np.where(mask[b, s + ahead], 1, np.nan)
            for b in range(3)
            for s in (0, 2, 4)
        ]
        np.testing.assert_allclose(errors[ahead - 1], np.sqrt(np.nanmean(squares, axis=0)), rtol=1e-4)
    assert model.forecast_errors((times, values)).shape == (6, 2)


def test_a_model_is_read_in_another_process(tmp_path):
    times, values, _ = noisy()
    model = DynamicsModel(units=4, window=3, initial_states="trained", continuity=1.0, solver="bosh3")
    model.compile("adam")
    model.fit((TIMES, values), verbose=0, validation_data=(times, values), epochs=2)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "values.npy", values)
    script = f"""
import keras, keras_node, numpy as np
model = keras.models.load_model({str(tmp_path / "model.keras")!r})
values = np.load({str(tmp_path / "values.npy")!r})
np.save({str(tmp_path / "states.npy")!r}, model.predict(({TIMES.tolist()}, values), verbose=0))
np.save({str(tmp_path / "window_states.npy")!r}, model.window_states)
model.fit((np.array({TIMES.tolist()}), values), verbose=0)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    np.testing.assert_allclose(
        np.load(tmp_path / "states.npy"), model.predict((TIMES, values), verbose=0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(np.load(tmp_path / "window_states.npy"), model.window_states)


def test_data_sets_weights_and_whole_model_xla():
    times, values, mask = noisy()
    arrays = {"times": times.astype("float32"), "values": values.astype("float32"), "mask": mask}
    weights = np.array([1.0, 0.0, 2.0], "float32")
    model = model_of(window=2, whole=True)
    model.adapt(arrays)
    scale = np.asarray(model.scale)
    each = [loss_by_hand(times[[b]], values[[b]], mask[[b]], scale, 2) for b in range(3)]
    data = tf.data.Dataset.from_tensor_slices((arrays,)).batch(3)
    np.testing.assert_allclose(model.fit(data, verbose=0).history["loss"], [np.mean(each)], rtol=1e-4)
    weighted = model.fit(arrays, sample_weight=weights, batch_size=3, verbose=0).history["loss"]
    np.testing.assert_allclose(weighted, [np.mean(weights * each)], rtol=1e-4)
    trained = model_of(window=3, initial_states="trained")
    trained.adapt(arrays)
    with pytest.raises(ValueError, match=r"which trajectory is which.*not a data set"):
        trained.fit(data, verbose=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "`window` must be a positive integer"),
        ({"continuity": 1.0}, r'needs `initial_states="trained"`.*Received: continuity=1.0'),
        ({"initial_states": "train"}, "Did you mean 'trained'"),
        ({"interpolation": "rectilinear"}, "must be one of hermite, linear"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicsModel(**options)


VALUES = np.ones((2, 7, 1))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ((TIMES,), r"Received: tuple of length 1"),
        ({"times": TIMES, "value": np.ones((2, 7, 1))}, r"Received: \['times', 'value'\]"),
        ({"times": TIMES, "values": VALUES, "jump_times": np.ones((2, 1))}, "both `jump_times`"),
        ((TIMES, np.ones((2, 7))), r"`values` must be .*Received: values of shape \(2, 7\)"),
        ((TIMES[:-1], VALUES), r"`times` must be of shape \(batch, T\) or \(T,\).*'times': \(6,\)"),
        ((np.tile(TIMES, (3, 1)), VALUES), r"`times` must be .*\(3, 7\)"),
        ((TIMES, VALUES, np.ones((2, 6))), r"`mask` must be of shape .*\(2, 6\)"),
        ({"times": TIMES, "values": VALUES, "controls": np.ones((7, 2))}, r"`controls` must be .*\(7, 2\)"),
        (
            {"times": TIMES, "values": VALUES, "jump_times": np.ones((2, 1)), "jump_amounts": np.ones((2, 2, 1))},
            r"`jump_amounts` must be of shape \(batch, J, D\).*\(2, 2, 1\)",
        ),
        ({"times": TIMES, "values": VALUES, "jump_times": [1.0], "jump_amounts": [[1.0]]}, "`jump_times` must be"),
        ((np.arange(7).astype("M8[D]"), VALUES), "Times must be numbers"),
        ((TIMES[:1], np.ones((2, 1, 1))), r"must have 2 steps or more. Received: values of shape \(2, 1, 1\)"),
        ((TIMES, VALUES[0]), r"A single trajectory needs an axis for the batch.*Received: values of shape \(7, 1\)"),
        (([[0.0, 1.0], [0.0]], [[[1.0], [2.0]], [[1.0]]]), r"`times` must be an array. Pad.*lists of unequal length"),
        ((TIMES, tf.ragged.constant([[[1.0], [2.0]], [[1.0]]])), "`values` must be an array. Pad.*a RaggedTensor"),
        ([], "Received: list of length 0"),
        (VALUES, r"a data set yields `\(\(times, values\),\)`. Received: one array of shape \(2, 7, 1\)"),
        (
            tf.data.Dataset.from_tensors((np.tile(TIMES, (2, 1)), VALUES)),
            r"a data set yields `\(\(times, values\),\)`. Received: one array of shape \(2, 7\)",
        ),
    ],
)
def test_data_of_another_shape(x, message):
    with pytest.raises(ValueError, match=message):
        model_of().fit(x, verbose=0)


@pytest.mark.parametrize(
    ("name", "place"), [("values", (1, 2, 0)), ("controls", (0, 6, 0)), ("jump_amounts", (1, 0, 0))], ids=str
)
def test_infinite_observations_are_refused_and_leave_the_model_as_it_was(name, place):
    """Their mean and standard deviation would stay in the model."""
    x = {"times": TIMES, "values": VALUES, "controls": np.ones((2, 7, 1))}
    x |= {"jump_times": np.ones((2, 1)), "jump_amounts": np.ones((2, 1, 1))}
    spoiled = {key: np.array(part) for key, part in x.items()}
    spoiled[name][place] = -np.inf
    model = model_of(lambda t, y, args: -y + 0 * args(t))
    model.compile("sgd", run_eagerly=True)
    for method in (model.fit, model.adapt, model.evaluate, model.predict):
        options = {} if method == model.adapt else {"verbose": 0}
        with pytest.raises(
            ValueError, match=rf"`{name}` must be finite.*Received: -inf at {name}\[{str(place)[1:-1]}\]"
        ):
            method(spoiled, **options)
    assert np.isfinite(model.fit(x, verbose=0).history["loss"][0])
    masked = {**x, "values": np.where(np.arange(7)[:, None] == 2, np.inf, VALUES), "mask": np.arange(7) != 2}
    masked["mask"] = np.tile(masked["mask"], (2, 1))
    masked |= {"jump_times": np.full((2, 1), np.inf), "jump_amounts": np.full((2, 1, 1), np.inf)}  # padding
    assert np.isfinite(model.evaluate(masked, verbose=0)[0])


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("predict", {}),
        ("evaluate", {"window": 3, "solver": "bosh3"}),
        ("evaluate", {"initial_states": "trained", "continuity": 1.0, "window": 2}),
        ("fit", {"whole": True}),
    ],
    ids=str,
)
def test_trajectories_may_be_of_another_length_than_the_last_ones(way, options):
    """Keras traces for an unknown number of steps when a second one comes."""

    def data(steps):
        rng = np.random.default_rng(steps)
        times = np.cumsum(rng.uniform(0.1, 0.4, (3, steps)), axis=1)
        values = rng.normal(size=(3, steps, 2))
        values[0, 2] = np.nan
        jumps = {"jump_times": times[:, :1] + 0.1, "jump_amounts": np.ones((3, 1, 2))}
        return {"times": times, "values": values, "controls": rng.normal(size=(3, steps, 1)), **jumps}

    def field(t, y, args):
        return -0.5 * y + args(t)

    def result(model, steps):
        value = getattr(model, way)(data(steps), verbose=0)
        return value.history["loss"] if way == "fit" else value

    model, eager = model_of(field, **options), model_of(field, **options)
    eager.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    for each in (model, eager):
        each.adapt(data(7))
    for steps in (7, 9, 6):
        np.testing.assert_allclose(result(model, steps), result(eager, steps), rtol=1e-4, atol=1e-5)


def test_states_of_another_shape_are_refused_in_a_forecast():
    model = model_of()
    model.adapt((TIMES, VALUES))
    with pytest.raises(ValueError, match=r"`y0` must be of shape \(batch, 1\). Received: y0 of shape \(2, 3\)"):
        model.forecast(np.ones((2, 3)), TIMES)
    with pytest.raises(ValueError, match=r"`y0` must be of shape \(batch, D\). Received: y0 of shape \(1,\)"):
        model_of().forecast(np.ones(1), TIMES)


def test_times_may_be_integers():
    model, expected = model_of(), model_of().evaluate((np.arange(7.0), VALUES), verbose=0)
    model.compile("sgd", run_eagerly=True)
    for given in (np.arange(7, dtype="int32"), np.tile(np.arange(7), (2, 1)), list(range(7))):
        model.adapt((given, VALUES))
        np.testing.assert_allclose(model.evaluate((given, VALUES), verbose=0), expected, rtol=1e-6)


def test_a_model_adapts_to_times_that_only_a_data_set_can_hand_over():
    times = 1.7e9 + np.tile(TIMES, (2, 1))
    model, x = model_of(), {"times": times, "values": VALUES}
    with pytest.raises(ValueError, match=r"pass a `tf.data.Dataset`"):
        model.fit(x, verbose=0)
    model.adapt(x)
    near = model.evaluate(tf.data.Dataset.from_tensors(({**x, "times": times - 1.7e9},)), verbose=0)
    np.testing.assert_allclose(model.evaluate(tf.data.Dataset.from_tensors((x,)), verbose=0), near, rtol=1e-4)


@pytest.mark.parametrize("order", [[6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 4, 3, 5, 6]])
def test_observed_times_must_not_decrease(order):
    model, times = model_of(), np.tile(TIMES, (2, 1))
    times[1] = TIMES[order]
    message = "must not decrease from one valid step to the next.*sample 1"
    for method in (model.fit, model.evaluate, model.predict):
        with pytest.raises(ValueError, match=message):
            method((times, VALUES), verbose=0)
    with pytest.raises(ValueError, match=message):
        model((times, VALUES))
    signature = [(tf.TensorSpec([None, 7], tf.float64), tf.TensorSpec([None, 7, 1], tf.float64))]
    with pytest.raises(tf.errors.InvalidArgumentError, match="must not decrease"):
        tf.function(model, input_signature=signature)((times, VALUES))
    y = tf.function(model, jit_compile=True)((tf.constant(times), tf.constant(VALUES)))
    assert np.isnan(y[1]).all()
    # The times of steps without observations may be anything.
    mask = np.ones((2, 7), bool)
    mask[1] = np.maximum.accumulate(times[1]) == times[1]
    assert np.isfinite(model((times, VALUES, mask))).all()


def test_data_sets_do_not_tell_trajectories_apart():
    times, values, mask = noisy()
    model = model_of(window=2, initial_states="trained")
    model.fit((times, values, mask), verbose=0)
    data = {"times": times[:, :3], "values": values[:, :3], "index": np.arange(3, dtype="int32")}
    with pytest.raises(ValueError, match=r"3 trajectories.*Received: .*1 windows"):
        model.fit(tf.data.Dataset.from_tensors(data), verbose=0)


def test_validation_data_may_be_a_tuple_of_one():
    times, values, mask = noisy()
    data = {"times": times, "values": values, "mask": mask}
    model = model_of()
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    losses = [
        model.fit(data, validation_data=validation, verbose=0).history["val_loss"] for validation in (data, (data,))
    ]
    assert losses[0] == losses[1]


def test_a_model_has_the_shape_of_the_values():
    data = {"times": keras.Input((7,)), "values": keras.Input((7, 2))}
    assert model_of()(data).shape == (None, 7, 2)
    with pytest.raises(ValueError, match="number of channels of `values` must be known"):
        model_of()({**data, "values": keras.Input((7, None))})


def test_targets_are_refused():
    with pytest.raises(ValueError, match=r"without targets.*Received"):
        model_of().fit((TIMES, np.ones((2, 7, 1))), np.ones((2, 7, 1)), verbose=0)


# Scalars and grey boxes


@pytest.mark.parametrize(
    ("options", "closed_form"),
    [
        ({}, lambda w: 3 + 3 * w),
        ({"minimum": 1.0}, lambda w: 1 + 2 * np.exp(w)),
        ({"maximum": 5.0}, lambda w: 5 - 2 * np.exp(w)),
        ({"minimum": 1.0, "maximum": 5.0}, lambda w: 1 + 4 / (1 + np.exp(-w))),
    ],
)
def test_scalars_stay_within_their_bounds(options, closed_form):
    scalar = TrainableScalar(3.0, **options)
    np.testing.assert_allclose(scalar.value, 3.0, rtol=1e-6)
    for w in (-3.0, 0.5, 2.0):
        scalar.w.assign(w)
        np.testing.assert_allclose(scalar.value, closed_form(w), rtol=1e-6)
    copy = TrainableScalar.from_config(scalar.get_config())
    np.testing.assert_allclose(copy.value, 3.0, rtol=1e-6)
    np.testing.assert_allclose(TrainableScalar(0.0).value, 0.0)


@pytest.mark.parametrize(("initial", "options"), [(0.0, {"minimum": 0.0}), (2.0, {"maximum": 1.0}), (np.inf, {})])
def test_scalars_outside_their_bounds_are_refused(initial, options):
    with pytest.raises(ValueError, match=r"inside the bounds.*Received: initial="):
        TrainableScalar(initial, **options)


@keras.saving.register_keras_serializable(package="test_dynamics_model")
def pendulum(t, y, args, gravity, friction):
    angle, velocity = y[..., :1], y[..., 1:]
    force = -gravity * keras.ops.sin(angle) - friction * velocity + args * keras.ops.sin(t)
    return keras.ops.concatenate([velocity, force], axis=-1)


@pytest.mark.parametrize("mode", ["eager", "xla"])
def test_a_grey_box_is_the_sum_of_its_parts(mode, tmp_path):
    network = keras.Sequential([keras.layers.Dense(2, kernel_initializer="ones")])
    field = GreyBoxField(pendulum, {"gravity": TrainableScalar(9.0, minimum=0), "friction": 0.5}, network)
    y, args = tf.constant([[0.5, -1.0], [0.2, 0.3]]), tf.constant([[1.0], [2.0]])

    def run():
        with tf.GradientTape() as tape:
            y1 = keras_node.odeint(field, y, [0.0, 1.0], args=args, solver=RungeKutta(rtol=1e-6)).ys[-1]
        return y1, tape.gradient(y1, field.trainable_variables)

    y1, slopes = (run if mode == "eager" else tf.function(run, jit_compile=True))()
    for b in range(2):

        def rate(t, y, b=b):
            known = [y[1], -9 * np.sin(y[0]) - 0.5 * y[1] + float(args[b, 0]) * np.sin(t)]
            return np.array(known) + np.sum(y)

        exact = solve_ivp(rate, (0, 1), y[b].numpy(), rtol=1e-9, atol=1e-9).y[:, -1]
        np.testing.assert_allclose(y1[b], exact, rtol=2e-4)
    assert len(slopes) == 4 and all(np.abs(slope).max() > 1e-3 for slope in slopes)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(field))
    assert list(copy.scalars) == ["gravity", "friction"] and copy.scalars["gravity"].minimum == 0


def test_scalars_that_the_equations_do_not_take_are_refused():
    with pytest.raises(ValueError, match=r"every scalar by its name.*Received: known\(y, rate\)"):
        GreyBoxField(decay, {"rate": 1.0, "gravity": 2.0})
    with pytest.raises(ValueError, match=r"The known part of a field must take"):
        GreyBoxField(lambda a, b, c, d, rate: a, {"rate": 1.0})


def test_a_model_without_weights_has_a_config():
    model = keras_node.DynamicsModel(units=3)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
    assert again.units == 3 and not again.built


@keras.saving.register_keras_serializable(package="test_dynamics_model")
class DrivenNetwork(keras.layers.Layer):
    """A field with controls whose weights are made when it is called first."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(2)

    def call(self, t, y, args):
        return self.dense(keras.ops.concatenate([y, keras_node.ControlPath(*args)(t)], axis=-1))


@pytest.mark.parametrize("kind", ["layer", "grey box"])
def test_a_field_with_controls_that_has_no_weights_yet_trains_and_is_saved(kind, tmp_path):
    rng = np.random.default_rng(0)
    times, values, controls = np.linspace(0, 1, 4), rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 4, 1))
    x = {"times": times, "values": values, "controls": controls}
    field = DrivenNetwork()
    if kind == "grey box":
        field = keras_node.GreyBoxField(driven_decay, {"rate": 1.0}, network=keras.Sequential([keras.layers.Dense(2)]))
    model = DynamicsModel(field, solver="euler", jit_compile=False)
    model.compile("adam", run_eagerly=kind == "grey box")
    model.fit(x, verbose=0, validation_data=(x, None, np.ones(3)))
    assert len(model.optimizer.variables) == 2 + 2 * len(model.trainable_variables) > 4
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert int(loaded.optimizer.iterations) == 1
    loaded.fit(x, verbose=0)


@keras.saving.register_keras_serializable(package="test_dynamics_model")
def driven_decay(t, y, args, rate):
    return keras_node.ControlPath(*args)(t) - rate * y


def test_a_moment_without_value_before_padding():
    # The second sample is observed at 0 and 1; the moment 2 has no value, and zeros follow.
    times = np.array([[0.0, 1, 2, 3], [0, 1, 2, 0]])
    mask = np.array([[True] * 4, [True, True, False, False]])
    x = {"times": times, "values": np.ones((2, 4, 1)), "mask": mask, "controls": np.ones((2, 4, 1))}
    model = DynamicsModel(lambda t, y, args: -y, solver=RK4, jit_compile=False)
    model.compile("adam")
    expected = np.exp(-np.array([[0.0, 1, 2, 3], [0, 1, 2, 2]]))
    np.testing.assert_allclose(model.predict(x, 1, verbose=0)[..., 0], expected, rtol=1e-3)
    assert np.isfinite(model.evaluate(x, verbose=0)).all()


def test_arrays_of_times_that_keras_would_round_are_refused():
    times, values = 1.7e9 + np.linspace(0, 1, 5), np.ones((2, 5, 1))
    model = DynamicsModel(lambda y: -y, solver=RK4)
    model.compile("adam")
    for call in (model.fit, model.evaluate, model.predict):
        with pytest.raises(
            ValueError, match=r"Count times from an origin.*Received: steps of 0.25 at times near 17000"
        ):
            call((times, values), verbose=0)
    np.testing.assert_allclose(model((times, values))[0, :, 0], np.exp(-np.linspace(0, 1, 5)), rtol=1e-3)
    close = np.array([0.0, 0.5, 0.5 + 1e-9, 1.0, 1.5])  # two observations at nearly the same time
    assert np.isfinite(model.predict((close, values), verbose=0)).all()
    latent = keras_node.LatentODE(2)
    latent.compile("adam")
    with pytest.raises(ValueError, match="Count times from an origin"):
        latent.fit((np.tile(times, (2, 1)), values, values > 0), verbose=0)
