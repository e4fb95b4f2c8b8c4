"""Time: steps are differences of readings, kinks and coinciding times cost nothing, large times keep their digits."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node.clock import make_clock, merge
from keras_node.gradients import GRADIENTS
from keras_node.gradients.direct import DirectGradient
from keras_node.solve import solve

EPOCH = 1_700_000_000.0
ROTATION = tf.constant([[0.0, 1.0], [-1.0, 0.0]])


def rotate(y):
    return tf.linalg.matvec(ROTATION, y)


def decay(y):
    return -y


def in_mode(mode, function):
    return function if mode == "eager" else tf.function(function, jit_compile=mode == "xla")


# Steps.


@pytest.mark.parametrize(("mode", "end"), [("graph", 30.0), ("xla", 1000.0)])
def test_many_constant_steps_in_float32_end_where_they_should(mode, end):
    solver = keras_node.RungeKutta("rk4", step_size=0.01, max_steps=200_000)
    run = in_mode(mode, lambda y0: keras_node.odeint(rotate, y0, [0.0, end], solver=solver, throw=False))
    solution = run(tf.constant([1.0, 0.0]))
    assert int(solution.status) == 0 and int(solution.stats.num_steps) == round(100 * end)
    # 6e-8 a step, at random: twice its root.
    np.testing.assert_allclose(solution.ys[-1], [np.cos(end), -np.sin(end)], atol=4e-5 if end == 1000 else 4e-6)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_many_constant_steps_in_float32(gradient):
    solver = keras_node.RungeKutta("rk4", step_size=0.02, max_steps=5_100)
    if gradient == "reversible":
        gradient = keras_node.ReversibleAdjoint(coupling=1)  # otherwise rounding errors grow by exp(5) over these steps

    @tf.function(jit_compile=True)
    def run(y0):
        with tf.GradientTape() as tape:
            tape.watch(y0)
            first = keras_node.odeint(rotate, y0, [0.0, 100.0], solver=solver, gradient=gradient, throw=False).ys[-1, 0]
        return tape.gradient(first, y0)

    np.testing.assert_allclose(run(tf.constant([1.0, 0.0])), [np.cos(100), np.sin(100)], atol=2e-5)


@pytest.mark.parametrize("num_steps", [853, 1999])
def test_so_many_steps_as_were_asked_for(num_steps):
    solver = keras_node.RungeKutta("euler", num_steps=num_steps)
    run = tf.function(
        lambda ts: keras_node.odeint(decay, tf.ones((1,)), ts, solver=solver, throw=False), jit_compile=True
    )
    for first, last in ((0, 1), (0, 0.7), (0, 3.3), (0, 20), (5, 2), (1000, 1000.001), (-1e-30, 1e-30)):
        solution = run(tf.constant([first, last], tf.float32))
        assert int(solution.status) == 0 and int(solution.stats.num_steps) == num_steps
        length = abs(float(np.float32(last)) - float(np.float32(first)))
        expected = (1 - np.sign(last - first) * length / num_steps) ** num_steps
        np.testing.assert_allclose(solution.ys[-1], [expected], rtol=1e-4)


def test_eagerly_and_between_several_times_as_well():
    for ts in ([0.0, 0.7], [0.0, 0.3, 0.3, 0.7]):
        solution = keras_node.odeint(decay, tf.ones((1,)), ts, solver=keras_node.RungeKutta("euler", num_steps=211))
        assert int(solution.stats.num_steps) == 211 * (len(set(ts)) - 1)


def test_what_passes_in_adaptive_steps_is_what_the_clock_shows():
    class Lengths(DirectGradient):
        def __init__(self):
            self.total = 0.0

        def __call__(self, problem):
            return solve(problem, observers=[self])[0]

        def start(self, y0):
            return ()

        def update(self, memory, step, progress):
            self.total += float(step.dt) if progress.accepted else 0.0
            return memory

    lengths = Lengths()
    solver = keras_node.RungeKutta("bosh3", rtol=1e-4)
    stats = keras_node.odeint(rotate, tf.constant([1.0, 0.0]), [0.0, 9.0], solver=solver, gradient=lengths).stats
    assert int(stats.num_steps) > 30
    np.testing.assert_allclose(lengths.total, 9.0, rtol=1e-8)


# Stops.


def test_times_that_coincide_share_a_stop():
    clock, stops = make_clock(tf.constant([2.0, 2.0, 1.5, 1.0, 1.0, 1.0]), tf.float32, per_sample=False)
    np.testing.assert_array_equal(stops, [0, 0, 1, 2, 2, 2])
    assert int(clock.count) == 2
    np.testing.assert_array_equal(clock.stops[:3], [0.0, 0.5, 1.0])
    np.testing.assert_array_equal(clock.speed[:2], [-1.0, -1.0])
    np.testing.assert_array_equal(clock.trimmed().stops, [0.0, 0.5, 1.0])
    own = tf.constant([[0.0, 1.0, 3.0], [0.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    clock, stops = make_clock(own, tf.float32, per_sample=True)
    np.testing.assert_array_equal(stops, [[0, 0, 0], [0, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(clock.count, [1, 1, 0])
    np.testing.assert_array_equal(clock.stops[1], [1.0, 1.0, 0.0])
    clock, stops = make_clock(own, tf.float32, per_sample=False)
    np.testing.assert_array_equal(clock.stops, [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(clock.speed, [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_clock_tells_at_each_reading_the_time_that_was_asked_for(per_sample):
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(size=(6, 4)), axis=0) * [1, 2, 0.1, 0]
    ts = np.sort(np.concatenate([times, rng.uniform(size=(9, 4)) * times[-1:]]), axis=0)
    ts[3] = ts[2]
    ends = np.stack([ts[0], ts[-1]])
    stops, _ = merge(tf.constant(ends), tf.constant([-1.0, 0.3, 0.05, 1.5, 0.3, 9.0], tf.float64))
    clock, _ = make_clock(stops, tf.float64, per_sample)
    readings = clock.readings_at(tf.constant(ts - ts[:1])).numpy()
    assert np.all(np.diff(readings, axis=0) >= 0) and np.all(readings <= clock.end)
    for i, sample in enumerate(ts.T):
        at = (clock.stops[:, i] if per_sample else clock.stops).numpy()
        told = np.interp(readings[:, i], at, clock.times[:, i])
        np.testing.assert_allclose(told, sample, atol=1e-14)


def test_where_given_times_end_up_among_more():
    times = tf.constant([[3.0, 0.0], [2.0, 0.5], [1.0, 2.0]])
    merged, place = merge(times, tf.constant([1.5, 9.0, 0.5]))
    np.testing.assert_array_equal(merged, [[3.0, 0.0], [3.0, 0.5], [2.0, 0.5], [1.5, 1.5], [1.0, 2.0], [1.0, 2.0]])
    np.testing.assert_array_equal(np.take_along_axis(merged.numpy(), place.numpy(), axis=0), times)


def test_memory_grows_with_the_number_of_times_and_not_its_square():
    for shape in ((500,), (500, 2)):
        solver = keras_node.RungeKutta("euler", num_steps=1)
        run = tf.function(lambda ts, s=solver: keras_node.odeint(decay, tf.ones((2, 1)), ts, solver=s).ys)
        graph = run.get_concrete_function(tf.TensorSpec(shape)).graph
        sizes = [x.shape.num_elements() or 0 for op in graph.get_operations() for x in op.outputs]
        assert max(sizes) <= 4 * 502


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed"])
def test_gradients_at_times_that_coincide_under_xla(gradient, per_sample):
    """Against the same losses at times that differ: a repeated time only adds up what is asked of its state."""
    solver = keras_node.RungeKutta("bosh3", rtol=1e-8, atol=1e-8, per_sample=per_sample, max_steps=400)
    weights = tf.constant([0.3, -1.0, 0.7, 2.0, 0.4, 1.1, -0.2], tf.float64)
    y0 = tf.constant([[1.0], [0.5]], tf.float64)

    @tf.function(jit_compile=True)
    def run(ts, w):
        with tf.GradientTape() as tape:
            tape.watch([y0, w])
            ys = keras_node.odeint(
                lambda t, y, w: -w * y * (1 + t), y0, ts, args=w, solver=solver, gradient=gradient, throw=False
            ).ys
            value = tf.reduce_sum(weights[:, None, None] * ys)
        return tape.gradient(value, [y0, w])

    ts = np.array([0.0, 0.0, 0.4, 0.4, 0.4, 1.0, 1.0])
    own = np.stack([ts, np.where(ts == 0.4, 0.0, ts) * 0.8], axis=1)
    times = own if per_sample else ts
    dy0, dw = run(tf.constant(times), tf.constant(1.5, tf.float64))
    times = np.broadcast_to(times.reshape(7, -1), (7, 2))
    passed = times + times**2 / 2
    path = weights.numpy()[:, None] * np.exp(-1.5 * passed)
    np.testing.assert_allclose(dy0[:, 0], path.sum(0), rtol=1e-6)
    np.testing.assert_allclose(dw, (-passed * path * [1.0, 0.5]).sum(), rtol=1e-6)


STEPS_TO_ALL_TIMES = {
    "rk4": keras_node.RungeKutta("rk4", num_steps=2),
    "leapfrog": keras_node.RungeKutta("leapfrog", step_size=0.25),
    "adaptive": keras_node.RungeKutta("bosh3"),
}


@pytest.mark.parametrize(
    ("solver", "gradient", "number"),
    [
        ("rk4", "direct", 2),
        ("rk4", "direct", None),
        ("rk4", "checkpointed", 3),
        ("leapfrog", "checkpointed", 2),
        ("leapfrog", "checkpointed", None),
        ("adaptive", "backsolve", 3),
        ("adaptive", "backsolve", None),
    ],
)
def test_a_sample_at_rest_beside_others_that_move_has_the_gradient_of_its_times(solver, number, gradient):
    ts = tf.constant([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]], tf.float64)[: number or 2]
    y0 = tf.constant([[0.5, -1.0], [1.5, 2.0]], tf.float64)

    def field(y):
        return tf.stack([y[:, 1], -(y[:, 0] ** 2)], axis=1)

    @tf.function(input_signature=[tf.TensorSpec((number, 2), tf.float64)])
    def derivative(ts):
        with tf.GradientTape() as tape:
            tape.watch(ts)
            ys = keras_node.odeint(field, y0, ts, solver=STEPS_TO_ALL_TIMES[solver], gradient=gradient).ys
            loss = tf.reduce_sum(ys[1:] ** 2)
        return tape.gradient(loss, ts)

    # For each of the later times, the derivative of the squared norm of a state that moves at the rate of the field.
    expected = 2 * np.sum(y0[1] * field(y0)[1])
    number = len(ts) - 1
    np.testing.assert_allclose(derivative(ts)[:, 1], [-number * expected, *[expected] * number], rtol=1e-12)


def test_coinciding_times_take_no_steps_backwards():
    calls = []

    def counted(t, y):
        calls.append(t)
        return -y

    def evaluations(ts):
        y0 = tf.ones((1,))
        with tf.GradientTape() as tape:
            tape.watch(y0)
            value = tf.reduce_sum(
                keras_node.odeint(counted, y0, ts, solver=keras_node.RungeKutta("rk4", num_steps=2)).ys
            )
        forwards = len(calls)
        calls.clear()
        tape.gradient(value, y0)
        backwards = len(calls)
        calls.clear()
        return forwards, backwards

    expected = evaluations([0.0, 0.5, 1.0])
    assert evaluations([0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 1.0]) == expected


# Precision.


@pytest.mark.parametrize("mode", ["eager", "xla"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_large_times_over_a_float32_state(gradient, mode):
    solver = keras_node.RungeKutta("bosh3", rtol=1e-5, max_steps=100)
    seen = []

    def driven(t, y, kick):
        seen.append(t.dtype)
        return kick - y

    def run(ts, kick):
        with tf.GradientTape() as tape:
            tape.watch([ts, kick])
            y0 = tf.ones((2, 1))
            ys = keras_node.odeint(driven, y0, ts, args=kick, solver=solver, gradient=gradient, throw=False).ys
            value = tf.reduce_sum(ys[-1])
        return ys, *tape.gradient(value, [ts, kick])

    run = in_mode(mode, run)
    own = np.array([[0.0, 0.5], [1.0, 1.0]])
    for ts in ([0.0, 0.25, 1.0], [0.0, 1.0], [1.0, 0.0], own) if mode == "eager" else (own,):
        ys, dts, dkick = run(tf.constant(ts, tf.float64) + EPOCH, tf.constant(0.0))
        ts = np.asarray(ts)
        y1 = np.exp(ts[0] - ts[-1]) * np.ones(2)
        np.testing.assert_allclose(ys[-1][:, 0], y1, rtol=1e-4)
        assert dts.dtype == tf.float64
        per_time = -y1 if ts.ndim == 2 else -y1.sum()
        np.testing.assert_allclose(dts[-1], per_time, rtol=1e-3)
        np.testing.assert_allclose(dts[0], -per_time, rtol=1e-3)
        np.testing.assert_allclose(dkick, np.sum(1 - y1), rtol=1e-3)
    assert set(seen) == {tf.float32}


def test_large_times_as_numbers_and_in_layers():
    numbers = np.array([EPOCH, EPOCH + 0.5, EPOCH + 1.0])
    expected = np.exp([-0.5, -1.0])
    solution = keras_node.odeint(decay, tf.ones((1,)), numbers)
    np.testing.assert_allclose(solution.ys[1:, 0], expected, rtol=2e-3)
    assert solution.ts.dtype == tf.float64
    layer = keras_node.ODELayer(decay, t0=EPOCH, t1=EPOCH + 1.0)
    np.testing.assert_allclose(layer(tf.ones((1, 1))), [[expected[1]]], rtol=2e-3)
    for ts in (numbers[1:], list(numbers[1:]), tf.constant(numbers[1:]), tf.constant(numbers[None, 1:])):
        np.testing.assert_allclose(layer(tf.ones((1, 1)), ts=ts)[0, :, 0], expected, rtol=2e-3)
    step_at = keras_node.RungeKutta("bosh3", step_at=[EPOCH - 9, EPOCH + 0.5, EPOCH + 77])
    kinked = keras_node.odeint(decay, tf.ones((1,)), numbers, solver=step_at)
    np.testing.assert_allclose(kinked.ys[1:, 0], expected, rtol=2e-3)
    for times in (numbers, tf.constant(numbers)):
        path = keras_node.control_path(times, tf.constant([[[0.0], [1.0], [3.0]]]), interpolation="linear")
        slopes = [float(path.derivative(tf.constant(t, tf.float64))[0, 0]) for t in numbers]
        np.testing.assert_allclose(slopes, [2.0, 4.0, 4.0])
        assert path(tf.constant(EPOCH + 0.75, tf.float64)).dtype == tf.float32


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_numbers_that_float32_would_round_keep_their_digits(mode):
    # In float32 these times are 0, 128 and 256 seconds apart from the first.
    ts, one = [EPOCH, EPOCH + 100, EPOCH + 300], lambda y: tf.ones_like(y)
    y0, fade = tf.zeros((1, 1)), lambda y: -y / 100
    never = keras_node.Event(lambda y: y[:, 0] - 1e6)
    dose = ([EPOCH + 50], np.ones((1, 1)))
    layer = keras_node.ODELayer(fade, t0=EPOCH, solver="dopri5")
    days = keras_node.ODELayer(lambda y: -1000 * y, t0=20_000.0, t1=20_000.001, solver="dopri5")

    def run():
        return (
            keras_node.odeint(one, y0, ts, event=never).ys[:, 0, 0],
            keras_node.odeint(one, y0, ts).ts - EPOCH,
            keras_node.odeint(fade, y0, ts, jumps=dose).ys[1:, 0, 0],
            layer(y0, ts=ts[1:], jumps=dose)[0, :, 0],
            days(y0, jumps=([20_000.0005], np.ones((1, 1))))[:, 0],
        )

    states, times, after_dose, of_layer, of_days = in_mode(mode, run)()
    np.testing.assert_allclose(states, [0, 100, 300], rtol=1e-5)
    np.testing.assert_array_equal(times, [0, 100, 300])
    for faded in (after_dose, of_layer):
        np.testing.assert_allclose(faded, np.exp([-0.5, -2.5]), rtol=3e-3)
    np.testing.assert_allclose(of_days, np.exp([-0.5]), rtol=3e-3)


def test_what_is_computed_from_such_numbers_keeps_their_digits():
    layer = keras_node.ODELayer(lambda y: tf.ones_like(y) / 100, t0=EPOCH, t1=EPOCH + 100.0, kinetic_energy=1.0)
    layer(tf.ones((2, 3)), training=True)
    np.testing.assert_allclose(layer.losses[0], 100 * 3 / 100**2, rtol=1e-4)
    path = keras_node.control_path(np.array([[1e6, 1e6 + 1.03, 1e6 + 2.97]]), np.ones((1, 3, 1), "float32"))
    np.testing.assert_allclose(path.times[0] - 1e6, [0, 1.03, 2.97], rtol=1e-6)


@pytest.mark.parametrize("ts", [[0.0, 0.3, 1.0], np.linspace(0, 1, 5), "tensor"], ids=["list", "array", "tensor"])
def test_no_float64_where_float32_tells_the_times_apart(ts):
    """LiteRT's builtin operators know little of it."""
    for options in ({}, {"step_at": [-1.0, 0.2, 5.0]}):
        solver = keras_node.RungeKutta("bosh3", **options)
        arguments = [tf.TensorSpec((3,))] if isinstance(ts, str) else []
        run = tf.function(lambda *t, s=solver: keras_node.odeint(decay, tf.ones((1,)), t[0] if t else ts, solver=s).ys)
        graph = run.get_concrete_function(*arguments).graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        assert not [n.name for n in nodes for a in n.attr.values() if a.type == tf.float64.as_datatype_enum]


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_bad_times_have_a_status_of_their_own(mode):
    def run(ts):
        return keras_node.odeint(decay, tf.ones((2, 1)), ts, throw=False)

    run = in_mode(mode, run)
    for ts in ([0.0, 1.0, 0.5], [0.0, np.nan, 1.0], [0.0, 1.0, np.inf]):
        solution = run(tf.constant(ts))
        assert keras_node.Status(int(solution.status)).name == "BAD_TIMES"
        assert np.isnan(solution.ys[1:]).all() and int(solution.stats.num_steps) == 0
    if mode == "graph":
        with pytest.raises(tf.errors.InvalidArgumentError, match="Status 4: `ts` is not finite or not monotonic"):
            tf.function(lambda ts: keras_node.odeint(decay, tf.ones((1,)), ts).ys)(tf.constant([0.0, 1.0, 0.5]))


# What times may be.


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_variables_as_times_have_their_gradient(dtype, gradient):
    both, last = keras.Variable([0.0, 1.0], dtype=dtype), keras.Variable(1.0, dtype=dtype)
    plain = tf.Variable([0.0, 1.0], dtype=dtype)

    def run(ts, watched):
        with tf.GradientTape() as tape:
            y1 = keras_node.odeint(
                decay, tf.ones((1,)), ts, gradient=gradient, solver=keras_node.RungeKutta(rtol=1e-5)
            ).ys[-1]
        return tape.gradient(y1, watched)

    slope = np.exp(-1.0)
    np.testing.assert_allclose(run(both, both.value), [slope, -slope], rtol=1e-3)
    np.testing.assert_allclose(run(plain, plain), [slope, -slope], rtol=1e-3)
    np.testing.assert_allclose(run([0.0, last], last.value), -slope, rtol=1e-3)
    in_graph = tf.function(lambda: run(both, both.value))()
    np.testing.assert_allclose(in_graph, [slope, -slope], rtol=1e-3)


@pytest.mark.parametrize(
    "ts", [range(3), (0, 1, 2), np.arange(3), tf.constant([0, 1, 2]), tf.constant([0, 1, 2], tf.int64)], ids=repr
)
def test_times_may_be_integers(ts):
    for y0 in (tf.ones((1,)), np.ones(1)):
        solution = keras_node.odeint(decay, y0, ts, solver=keras_node.RungeKutta(rtol=1e-5))
        np.testing.assert_allclose(solution.ys[:, 0], np.exp([0.0, -1.0, -2.0]), rtol=1e-4)
    layer = keras_node.ODELayer(decay, t0=-1, solver=keras_node.RungeKutta(rtol=1e-5))
    np.testing.assert_allclose(layer(tf.ones((1, 1)), ts=ts)[0, :, 0], np.exp([-1.0, -2.0, -3.0]), rtol=1e-4)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_batch_of_none_with_times_of_its_own(gradient, per_sample):
    net = keras.layers.Dense(3)
    net.build((None, 3))
    solver = keras_node.RungeKutta("bosh3", per_sample=per_sample, max_steps=50)

    def run(ts):
        with tf.GradientTape() as tape:
            tape.watch(ts)
            ys = keras_node.odeint(net, tf.ones((0, 3)), ts, solver=solver, gradient=gradient).ys
            value = tf.reduce_sum(ys)
        gradients = tape.gradient(value, [net.kernel.value, ts], unconnected_gradients="zero")
        return ys, *gradients

    for mode in ("graph", "xla" if per_sample else "eager"):
        ys, dkernel, dts = in_mode(mode, run)(tf.ones((3, 0)))
        assert ys.shape == (3, 0, 3) and dts.shape == (3, 0)
        np.testing.assert_array_equal(dkernel, np.zeros((3, 3)))


@pytest.mark.parametrize("ts", [np.linspace(0.1, 1.0, 6), [0.1, 0.5, 1.0], np.linspace(0, 1, 6)[None] * [[1.0], [2.0]]])
def test_a_layer_computes_no_gradient_of_numbers(ts):
    calls = []

    def counted(y):
        calls.append(1)
        return -y

    layer = keras_node.ODELayer(counted, solver="bosh3")
    x = tf.ones((2, 1))
    counts = []
    times = np.asarray(ts).T
    for run in (
        lambda: layer(x, ts=ts),
        lambda: layer(x, ts),
        lambda: keras_node.odeint(counted, x, np.concatenate([0 * times[:1], times]), solver="bosh3").ys[1:],
    ):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = tf.reduce_sum(run())
        calls.clear()
        tape.gradient(value, x)
        counts.append(len(calls))
    assert counts[0] == counts[1] == counts[2]


def test_a_latent_ode_counts_large_times_from_its_t0():
    model = keras_node.LatentODE(2, units=4, solver="bosh3", t0=EPOCH)
    times, values, mask = np.array([[0.2, 0.5, 0.9]]), np.ones((1, 3, 1), "float32"), np.ones((1, 3, 1), bool)
    far = model((EPOCH + times, values, mask))
    model.dynamics.t0 = 0.0
    near = model((times.astype("float32"), values, mask))
    assert np.ptp(near) > 1e-3
    np.testing.assert_allclose(far, near, atol=1e-6)
