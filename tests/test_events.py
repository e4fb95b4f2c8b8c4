"""Events: their times, the states there, what follows them, and the derivatives of all of these."""

import keras
import numpy as np
import pytest
import scipy.integrate
import tensorflow as tf

import keras_node
from keras_node import Event, Status

TIGHT = keras_node.RungeKutta("dopri5", rtol=1e-10, atol=1e-12)
MODES = {
    "eager": lambda f: f,
    "graph": tf.function,
    "xla": lambda f: tf.function(f, jit_compile=True),
}
# Every gradient, and every mode of running it, in pairs.
PAIRS = [
    ("backsolve", "eager"),
    ("backsolve", "xla"),
    ("checkpointed", "graph"),
    ("direct", "graph"),
]


def f64(x):
    return tf.constant(x, tf.float64)


def oscillator(t, y):
    return tf.stack([y[:, 1], -y[:, 0]], axis=1)


def first(y):
    return y[:, 0]


FIRST_IS_ZERO = Event(lambda t, y: first(y))


class BouncingBall:
    """A ball that falls from height `h` in gravity `g` and bounces with restitution `e`, in closed form."""

    h, g, e = 9.8, 9.8, 0.8
    h2 = 4.9

    @staticmethod
    def field(t, y, args):
        return tf.stack([y[:, 1], tf.zeros_like(y[:, 1]) - args[0]], axis=1)

    @staticmethod
    def bounce(t, y, args):
        return tf.stack([y[:, 0], -args[1] * y[:, 1]], axis=1)

    @staticmethod
    def time(h, g, e, n):
        return np.sqrt(2 * h / g) * (1 + 2 * sum(e**k for k in range(1, n)))

    @classmethod
    def solve(cls, h, g, e, ts, **options):
        event = Event(lambda t, y: first(y), direction=-1, reset=cls.bounce)
        y0 = tf.stack([h, tf.zeros_like(h)], axis=1)
        return keras_node.odeint(cls.field, y0, ts, args=(g, e), event=event, **options)


@pytest.mark.parametrize(("gradient", "mode"), PAIRS)
def test_a_bouncing_ball_has_its_times_and_derivatives(gradient, mode):
    ball, n = BouncingBall, 10
    ts = [[0.0, 0.0], [3.0, 1.0], [11.5, 8.1]]  # shortly after the tenth bounce of each ball
    solver = keras_node.RungeKutta(max_steps=64)

    @MODES[mode]
    def run(h, g, e):
        with tf.GradientTape() as tape:
            tape.watch((h, g, e))
            solution = ball.solve(h, g, e, ts, gradient=gradient, max_events=12, solver=solver)
            total = solution.events.ts[n - 1, 0] + 2 * solution.ys[1, 0, 0]
        return solution, tape.gradient(total, (h, g, e))

    solution, gradients = run(f64([ball.h, ball.h2]), f64(ball.g), f64(ball.e))
    expected = [[ball.time(h, ball.g, ball.e, k) for h in (ball.h, ball.h2)] for k in range(1, n + 1)]
    np.testing.assert_allclose(solution.events.ts[:n], expected, rtol=1e-12)
    assert np.isnan(solution.events.ts[n:]).all()
    np.testing.assert_array_equal(solution.events.count, [n, n])
    np.testing.assert_array_equal(solution.events.index[:, 0], [0] * n + [-1] * 2)
    np.testing.assert_array_equal(solution.status, 0)
    # At time 3 the first ball has bounced once: y = v s - g s^2 / 2 with s = 3 - t_1 and v = e sqrt(2 g h).
    first_time, t = expected[0][0], expected[-1][0]
    s, v = 3 - first_time, ball.e * np.sqrt(2 * ball.g * ball.h)
    np.testing.assert_allclose(solution.ys[1, 0, 0], v * s - ball.g * s**2 / 2, rtol=1e-10)
    by_h = v / (2 * ball.h) * s + (v - ball.g * s) * -first_time / (2 * ball.h)
    by_g = v / (2 * ball.g) * s - s**2 / 2 + (v - ball.g * s) * first_time / (2 * ball.g)
    # The derivatives of t_10 = 11.209421811370 are t/2h, -t/2g, and 44.136923743864 by e.
    np.testing.assert_allclose(gradients[0], [t / (2 * ball.h) + 2 * by_h, 0], rtol=1e-9, atol=1e-12)
    of_constants = [-t / (2 * ball.g) + 2 * by_g, 44.136923743864 + 2 * v / ball.e * s]
    np.testing.assert_allclose([gradients[1], gradients[2]], of_constants, rtol=1e-9)


@pytest.mark.parametrize(("gradient", "mode"), [("backsolve", "xla"), ("checkpointed", "graph"), ("direct", "graph")])
def test_a_decay_to_a_level_has_its_first_and_second_derivatives(gradient, mode):
    y0, k, c = [2.0, 3.0], 0.7, 0.5
    weights = [1.3, -0.7, 0.4]

    @MODES[mode]
    def run(y0, k, c):
        sources = (y0, k, c)
        event = Event(lambda t, y, args: y - args[1])
        with tf.GradientTape() as outer:
            outer.watch(sources)
            with tf.GradientTape() as tape:
                tape.watch(sources)
                solution = keras_node.odeint(
                    lambda t, y, args: -args[0] * y,
                    y0[:, None],
                    [0.0, 30.0],
                    args=(k, c),
                    event=event,
                    gradient=gradient,
                    solver=keras_node.RungeKutta("dopri5", rtol=1e-10, atol=1e-12, max_steps=256),
                )
                total = tf.reduce_sum(solution.events.ts)
            gradients = tape.gradient(total, sources)
            # One combination of the derivatives, since every gradient of a gradient is traced anew.
            combined = sum(w * tf.reduce_sum(d) for w, d in zip(weights, gradients, strict=True))
        return solution.events.ts[0], gradients, outer.gradient(combined, sources)

    times, gradients, second = run(f64(y0), f64(k), f64(c))
    y0 = np.array(y0)
    t = np.log(y0 / c) / k
    np.testing.assert_allclose(times, t, rtol=1e-9)
    np.testing.assert_allclose(gradients[0], 1 / (k * y0), rtol=1e-8)
    np.testing.assert_allclose([gradients[1], gradients[2]], [-np.sum(t) / k, -2 / (k * c)], rtol=1e-8)
    by_y0, by_k, by_c = (
        (-1 / (k * y0**2), -1 / (k**2 * y0), 0 * y0),
        (np.sum(-1 / (k**2 * y0)), np.sum(2 * t / k**2), 2 / (c * k**2)),
        (0, 2 / (c * k**2), 2 / (c**2 * k)),
    )
    for computed, derivatives in zip(second, (by_y0, by_k, by_c), strict=True):
        expected = sum(w * d for w, d in zip(weights, derivatives, strict=True))
        np.testing.assert_allclose(computed, expected, rtol=1e-7, atol=1e-8)


class Switching:
    """A driven pendulum that is pushed back at an angle, with parameters of the field, the event and the reset."""

    y0 = f64([[1.0, 0.0], [0.5, 1.0]])
    parameters = f64([2.0, 0.8, 0.1])

    @staticmethod
    def loss(p, gradient, solver, t1=3.1):
        def field(t, y, args):
            return tf.stack([y[:, 1], -tf.sin(y[:, 0]) * args[0] + 0.3 * tf.cos(t[:, 0])], axis=1)

        def reset(t, y, args):
            return tf.stack([y[:, 0], -args[1] * y[:, 1] + 0.1 * tf.sin(t[:, 0])], axis=1)

        event = Event(lambda t, y, args: y[:, 0] - args[2] * (1 + 0.1 * t[:, 0]), direction=-1, reset=reset)
        solution = keras_node.odeint(
            field,
            Switching.y0,
            [0.0, 0.4, t1],
            args=tf.unstack(p, 3),
            event=event,
            gradient=gradient,
            solver=solver,
            max_events=4,
        )
        happened = solution.events.index >= 0
        return tf.reduce_sum(solution.ys**2) + tf.reduce_sum(tf.where(happened, solution.events.ts, 0))

    @staticmethod
    def gradient(p, *arguments):
        with tf.GradientTape() as tape:
            tape.watch(p)
            loss = Switching.loss(p, *arguments)
        return tape.gradient(loss, p)


def central_differences(function, x, eps=1e-5):
    return np.array([(function(x + eps * e) - function(x - eps * e)) / (2 * eps) for e in np.eye(len(x))])


def test_the_gradient_of_resets_equals_finite_differences():
    solver = keras_node.RungeKutta("dopri5", rtol=1e-9, atol=1e-11, max_steps=128)
    loss = tf.function(lambda p: Switching.loss(p, "backsolve", solver))
    expected = central_differences(lambda p: loss(p).numpy(), Switching.parameters)
    assert np.all(np.abs(expected) > 0.1)
    for gradient in ("backsolve", "checkpointed"):  # the next test takes "direct" as well
        computed = tf.function(lambda p, gradient=gradient: Switching.gradient(p, gradient, solver))
        np.testing.assert_allclose(computed(Switching.parameters), expected, rtol=1e-6, err_msg=gradient)


def test_the_second_derivative_of_resets_equals_finite_differences():
    solver, weights = keras_node.RungeKutta("dopri5", step_size=0.15), np.array([1.0, 2.0, -1.0])
    t1 = 2.5  # some steps after the event of each sample
    computed = tf.function(lambda p: Switching.gradient(p, "backsolve", solver, t1))
    expected = central_differences(lambda p: weights @ computed(p).numpy(), Switching.parameters)
    for gradient in ("backsolve", "checkpointed", "direct"):
        p = Switching.parameters
        with tf.GradientTape() as tape:
            tape.watch(p)
            total = tf.tensordot(Switching.gradient(p, gradient, solver, t1), f64(weights), 1)
        second = tape.gradient(total, p)
        np.testing.assert_allclose(second, expected, rtol=1e-4, err_msg=gradient)


SYSTEMS = {
    "decay": (lambda t, y: -0.5 * y, [3.0], 4.0, lambda t, y: y[0] - 1, 0),
    "oscillator": (lambda t, y: [y[1], -y[0]], [1.0, 0.3], 12.0, lambda t, y: y[0], 0),
    "rising": (lambda t, y: [y[1], -y[0]], [1.0, 0.3], 12.0, lambda t, y: y[0] + 0.2, 1),
    "falling": (lambda t, y: [y[1], -y[0]], [1.0, 0.3], 12.0, lambda t, y: y[0] + 0.2, -1),
    "van der Pol": (lambda t, y: [y[1], (1 - y[0] ** 2) * y[1] - y[0]], [2.0, 0.0], 15.0, lambda t, y: y[1] - y[0], 0),
    "Lotka-Volterra": (
        lambda t, y: [1.5 * y[0] - y[0] * y[1], -3 * y[1] + y[0] * y[1]],
        [1.0, 1.0],
        10.0,
        lambda t, y: y[0] - 2 * y[1],
        0,
    ),
    "Lorenz": (
        lambda t, y: [10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]],
        [1.0, 1.0, 1.0],
        3.0,
        lambda t, y: y[2] - 27,
        0,
    ),
    "pendulum": (lambda t, y: [y[1], -9.8 * y[0] + 1.5 * y[0] ** 3], [1.0, 0.2], 5.0, lambda t, y: y[1] + 0.3 * t, 0),
    "driven": (lambda t, y: [t * t - y[0]], [1.0], 3.0, lambda t, y: y[0] - 2 + t, 0),
    "backward": (lambda t, y: [y[1], -y[0]], [1.0, 0.3], -8.0, lambda t, y: y[0] - 0.1 * t, 1),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_events_are_where_scipy_finds_them(name):
    field, y0, t1, function, direction = SYSTEMS[name]
    function.direction = direction
    expected = scipy.integrate.solve_ivp(
        lambda t, y: field(t, y), (0, t1), y0, "DOP853", events=[function], rtol=1e-12, atol=1e-12
    )
    event = Event(lambda t, y: function(t[:, 0], tf.unstack(y, axis=1)), direction, terminal=False)

    @tf.function
    def run():
        return keras_node.odeint(
            lambda t, y: (
                tf.stack(tf.nest.flatten(field(t[:, 0], tf.unstack(y, axis=1))), axis=1)
                if len(y0) > 1
                else tf.reshape(field(t, y), tf.shape(y))
            ),
            f64([y0]),
            [0.0, t1],
            event=event,
            solver=TIGHT,
        )

    solution = run()
    count = int(solution.events.count[0])
    assert count == len(expected.t_events[0]) >= 1
    np.testing.assert_allclose(solution.events.ts[:count, 0], expected.t_events[0], rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(solution.events.ys[:count, 0], expected.y_events[0], rtol=1e-6, atol=1e-6)
    # An event that is only noted does not change the solution.
    np.testing.assert_allclose(solution.ys[-1, 0], expected.y[:, -1], rtol=1e-6)


@pytest.mark.parametrize("per_sample", [False, True])
def test_samples_stop_at_their_own_events(per_sample):
    # cos(t + phase) falls to -0.01; the last sample stays at zero, away from the level.
    phases = np.array([0.0, 0.7, 1.2])
    y0 = f64(np.concatenate([np.stack([np.cos(phases), -np.sin(phases)], axis=1), [[0.0, 0.0]]]))
    event = Event(lambda t, y: y[:, 0] + 0.01, direction=-1)
    times = np.arccos(-0.01) - phases
    ts = [0.0, 0.5, 1.0, 4.0]
    solver = keras_node.RungeKutta("dopri5", rtol=1e-10, atol=1e-12, per_sample=per_sample)
    solution = keras_node.odeint(oscillator, y0, ts, event=event, solver=solver)
    np.testing.assert_allclose(solution.events.ts[0, :3], times, rtol=1e-8)
    np.testing.assert_array_equal(solution.events.index[0], [0, 0, 0, -1])
    np.testing.assert_array_equal(solution.events.count, [1, 1, 1, 0])
    assert np.isnan(solution.events.ts[0, 3])
    assert np.isnan(solution.events.ys[0, 3]).all()
    for t, states in zip(ts, solution.ys.numpy(), strict=True):
        moment = np.minimum(t, times) + phases
        np.testing.assert_allclose(states[:3], np.stack([np.cos(moment), -np.sin(moment)], axis=1), atol=1e-7)
    np.testing.assert_array_equal(solution.ys[-1, :3], solution.events.ys[0, :3])


def test_an_event_that_never_comes_changes_nothing():
    y0 = f64([[1.0, 0.0], [2.0, 1.0]])
    event = Event(lambda t, y: first(y) - 5)
    for ts in ([0.0, 1.0, 3.0], [0.0, 0.5]):
        plain = keras_node.odeint(oscillator, y0, ts)
        watched = keras_node.odeint(oscillator, y0, ts, event=event)
        np.testing.assert_allclose(watched.ys, plain.ys, rtol=1e-12)
        np.testing.assert_array_equal(watched.stats.num_evaluations, [plain.stats.num_evaluations] * 2)
        assert np.isnan(watched.events.ts).all()


def test_constant_implicit_steps_find_events():
    y0 = f64([[2.0], [3.0]])
    event = Event(lambda t, y: first(y) - 1)
    solver = keras_node.RungeKutta("trbdf2", num_steps=20)
    solution = keras_node.odeint(lambda y: -y, y0, [0.0, 3.0], event=event, solver=solver)
    np.testing.assert_allclose(solution.events.ts, [np.log([2.0, 3.0])], rtol=2e-3)


def test_samples_do_not_depend_on_each_other():
    y0 = f64([[1.0, 0.3], [0.2, -2.0], [4.0, 0.0]])
    solver = keras_node.RungeKutta(per_sample=True)
    event = Event(lambda t, y: first(y), reset=lambda t, y: -0.5 * y, direction=-1)

    def run(y0):
        return keras_node.odeint(oscillator, y0, [0.0, 2.0, 5.0], event=event, solver=solver, max_events=4)

    together, alone = run(y0), run(y0[1:2])
    np.testing.assert_allclose(together.ys[:, 1:2], alone.ys, rtol=1e-12)
    np.testing.assert_allclose(together.events.ts[:, 1:2], alone.events.ts, rtol=1e-12)


def test_a_zero_at_the_start_is_not_an_event():
    y0 = f64([[0.0, 1.0], [0.0, -1.0]])
    solution = keras_node.odeint(oscillator, y0, [0.0, 5.0], event=FIRST_IS_ZERO, solver=TIGHT)
    np.testing.assert_allclose(solution.events.ts[0], [np.pi, np.pi], rtol=1e-8)


@pytest.mark.parametrize("t1", [1.0, 0.3, 1e3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_event_exactly_at_the_last_time_counts(t1, dtype):
    for start in (0.0, 7.0):
        event = Event(lambda t, y, end=start + t1: y[:, 0] - end)
        y0 = tf.constant([[start]], dtype)
        solution = keras_node.odeint(lambda t, y: tf.ones_like(y), y0, [start, start + t1], event=event)
        np.testing.assert_array_equal(solution.events.count, [1])
        np.testing.assert_allclose(solution.events.ts[0], start + t1, rtol=1e-6 if dtype == "float32" else 1e-14)


def moving(y):
    return tf.ones_like(y)


@pytest.mark.parametrize(
    ("gradient", "mode", "speed"), [("backsolve", "eager", 1), ("checkpointed", "xla", -1), ("direct", "graph", 1)]
)
def test_an_event_at_the_last_time_is_noted_once(gradient, mode, speed):
    event = Event(lambda y: y[:, 0] - speed, terminal=False)

    @MODES[mode]
    def run(y0):
        with tf.GradientTape() as tape:
            tape.watch(y0)
            solution = keras_node.odeint(moving, y0, [0.0, 1.0 * speed], event=event, gradient=gradient, solver="bosh3")
            total = tf.reduce_sum(solution.events.ts[0])
        return solution, tape.gradient(total, y0)

    solution, gradient = run(f64([[0.0], [0.5 * speed]]))
    np.testing.assert_array_equal(solution.events.count, [1, 1])
    np.testing.assert_allclose(solution.events.ts[0], [1.0 * speed, 0.5 * speed], rtol=1e-14)
    assert abs(solution.events.ts[0, 0]) <= 1
    np.testing.assert_allclose(gradient, [[-1.0], [-1.0]], rtol=1e-12)


@pytest.mark.parametrize("per_sample", [False, True])
def test_events_at_the_rounding_error_of_the_last_time_are_noted_once(per_sample):
    y0 = np.random.default_rng(0).uniform(1.5, 5, 2000).astype("float32")
    t1 = np.log(y0.astype("float64")).astype("float32")
    solution = keras_node.odeint(
        lambda y: -y,
        tf.constant(y0[:, None]),
        np.stack([0 * t1, t1]),
        event=Event(lambda y: y[:, 0] - 1, terminal=False),
        solver=keras_node.RungeKutta(rtol=1e-6, atol=1e-7, per_sample=per_sample),
    )
    np.testing.assert_array_equal(solution.events.count, np.ones(2000))
    np.testing.assert_allclose(solution.events.ts[0], t1, rtol=2e-6)
    assert np.all(solution.events.ts[0] <= t1)


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_zero_within_a_rounding_error_of_the_start_is_noted_once_at_most(start):
    level = start + np.float32(1.2e-7) * np.arange(-4, 40, dtype="float32")
    solution = keras_node.odeint(
        moving,
        tf.fill((44, 1), start),
        [start, start + 1.0],
        event=Event(lambda y: y[:, 0] - level, reset=lambda y: y + 0.1),
        solver=keras_node.RungeKutta(per_sample=True),
    )
    count = solution.events.count.numpy()
    assert set(count[:4]) == {0} and set(count) <= {0, 1}
    np.testing.assert_allclose(solution.ys[-1, :, 0], start + 1 + 0.1 * count, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_state_at_the_last_time_is_the_one_before_a_reset(dtype):
    event, y0 = Event(lambda y: y[:, 0] - 1, reset=lambda y: 0 * y), tf.constant([[0.0], [0.5]], dtype)
    solution = keras_node.odeint(moving, y0, np.arange(5.0), event=event)
    np.testing.assert_allclose(solution.ys[:, 0, 0], [0, 1, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(solution.ys[:, 1, 0], [0.5, 0.5, 0.5, 0.5, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(solution.events.count, [4, 4])
    np.testing.assert_allclose(solution.events.ts[:4], [[1, 0.5], [2, 1.5], [3, 2.5], [4, 3.5]], rtol=1e-6)


@pytest.mark.parametrize(("amount", "times"), [(0.5, [1.0]), (-0.5, [1.0, 1.5])])
def test_an_event_at_the_time_of_a_jump_is_noted_once(amount, times):
    event, y0 = Event(lambda y: y[:, 0] - 1, terminal=False), f64([[0.0]])
    solution = keras_node.odeint(moving, y0, [0.0, 2.0], event=event, jumps=([1.0], [[amount]]))
    np.testing.assert_array_equal(solution.events.count, [len(times)])
    np.testing.assert_allclose(solution.events.ts[: len(times), 0], times, rtol=1e-13)
    np.testing.assert_allclose(solution.ys[-1], [[2 + amount]], rtol=1e-13)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 5e-7), ("float64", 1e-14)])
def test_event_times_are_as_exact_as_the_precision_allows(dtype, rtol):
    heights = np.array([0.01, 3.0, 500.0])
    y0 = tf.constant(np.stack([heights, 0 * heights], axis=1), dtype)
    solution = keras_node.odeint(
        lambda t, y: tf.stack([y[:, 1], -9.8 * tf.ones_like(y[:, 0])], axis=1),
        y0,
        [0.0, 20.0],
        event=FIRST_IS_ZERO,
        solver=keras_node.RungeKutta("dopri5", per_sample=True),
    )
    np.testing.assert_allclose(solution.events.ts[0], np.sqrt(2 * heights / 9.8), rtol=rtol)


def test_of_two_events_the_first_one_counts():
    y0 = f64([[1.0, 0.0], [-1.0, 0.0]])
    events = [Event(lambda t, y: y[:, 1] - 0.5), Event(lambda t, y: y[:, 1] + 0.5), Event(lambda t, y: t - 10)]
    solution = keras_node.odeint(oscillator, y0, [0.0, 12.0], event=events, solver=TIGHT)
    np.testing.assert_array_equal(solution.events.index, [[1, 0]])
    np.testing.assert_allclose(solution.events.ts[0], [np.pi / 6, np.pi / 6], rtol=1e-8)


def test_events_at_the_same_time_happen_in_the_order_of_the_list():
    # Two balls in one sample that reach the ground at the same time, and a third state that counts the bounces.
    def field(t, y):
        falls = -9.8 * tf.ones_like(y[:, 1])
        return tf.stack([y[:, 1], falls, y[:, 3], falls, tf.zeros_like(falls)], axis=1)

    def bounce(ball):
        mirror = np.ones(5)
        mirror[2 * ball + 1] = -0.5
        count = np.zeros(5)
        count[4] = 10.0**ball
        return lambda t, y: y * mirror + count

    events = [Event(lambda t, y, i=i: y[:, 2 * i], direction=-1, reset=bounce(i)) for i in range(2)]
    y0 = f64([[4.9, 0.0, 4.9, 0.0, 0.0]])
    solution = keras_node.odeint(field, y0, [0.0, 1.5], event=events, max_events=4)
    np.testing.assert_array_equal(solution.events.index[:, 0], [0, 1, -1, -1])
    np.testing.assert_allclose(solution.events.ts[:2, 0], [1.0, 1.0], rtol=1e-12)
    height = 4.9 * 0.5 - 4.9 * 0.25
    np.testing.assert_allclose(solution.ys[-1, 0], [height, 0.0, height, 0.0, 11.0], atol=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("first", [lambda t, y: 3 * y[:, 0] - 3, lambda t, y: y[:, 0] ** 3 - 1])
def test_rounding_does_not_change_the_order_of_events_at_the_same_time(first, dtype):
    # Both are zero where the state is 1, but the numbers in which they become zero differ by rounding.
    y0 = tf.constant(np.linspace(0, 0.9, 37)[:, None], dtype)
    events = [
        Event(first, reset=lambda t, y: y + 5),
        Event(lambda t, y: y[:, 0] - 1, reset=lambda t, y: tf.zeros_like(y)),
    ]
    solution = keras_node.odeint(lambda y: tf.ones_like(y), y0, [0.0, 4.0], event=events)
    np.testing.assert_array_equal(solution.events.count, 1)
    np.testing.assert_array_equal(solution.events.index[0], 0)
    np.testing.assert_allclose(solution.ys[-1], y0 + 9, rtol=1e-6 if dtype == "float32" else 1e-12)


def test_events_that_are_close_to_each_other_happen_in_the_order_of_time():
    levels = [5.00001, 5.0]
    events = [Event(lambda t, y, level=level: y[:, 0] - level, terminal=False) for level in levels]
    solution = keras_node.odeint(lambda y: tf.ones_like(y), tf.zeros((1, 1)), [0.0, 10.0], event=events)
    np.testing.assert_array_equal(solution.events.index[:2, 0], [1, 0])
    np.testing.assert_allclose(solution.events.ts[:2, 0], [5.0, 5.00001], rtol=2e-7)


def test_an_event_that_does_not_happen_is_not_noted_by_steps_as_short_as_the_rounding_of_times():
    # In float32, times near 1e6 are 0.06 apart. The steps of 0.5 are shorter than the doubt about such a time.
    ts = tf.constant([1e6, 1e6 + 10], tf.float32)
    events = [Event(lambda t, y: y[:, 0] - 1e9), Event(lambda t, y: y[:, 0] - 3.3, reset=lambda t, y: y - 3)]
    solver = keras_node.RungeKutta("rk4", num_steps=20)
    solution = keras_node.odeint(lambda y: tf.ones_like(y), tf.zeros((2, 1)), ts, event=events, solver=solver)
    np.testing.assert_array_equal(solution.events.index[:4, 0], [1, 1, 1, -1])
    np.testing.assert_allclose(solution.events.ys[:3, 0], [[3.3]] * 3, rtol=1e-5)


def test_endless_bouncing_ends_with_a_status():
    solution = BouncingBall.solve(f64([1.0, 1e4]), f64(9.8), f64(0.5), [0.0, 1.0, 3.0], max_events=6, throw=False)
    np.testing.assert_array_equal(solution.status, [Status.MAX_EVENTS, Status.SUCCESS])
    np.testing.assert_array_equal(solution.events.count, [6, 0])
    assert np.isfinite(solution.ys[1]).all()
    assert np.isnan(solution.ys[2, 0]).all()
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"MAX_EVENTS.*increase `max_events`"):
        BouncingBall.solve(f64([1.0]), f64(9.8), f64(0.5), [0.0, 3.0], max_events=6)


def test_a_loss_can_leave_out_samples_with_too_many_events():
    h, g, e = f64([1.0, 20.0]), f64(9.8), f64(0.5)
    with tf.GradientTape() as tape:
        tape.watch((h, g))
        ys = BouncingBall.solve(h, g, e, [0.0, 1.0, 3.0], max_events=6, throw=False).ys[-1, :, 0]
        total = tf.reduce_sum(tf.where(tf.math.is_nan(ys), f64(0.0), ys))
    by_h, by_g = tape.gradient(total, (h, g))
    assert np.isnan(ys[0])
    # The second ball has bounced once, at t_1: y = v s - g s^2 / 2 with s = 3 - t_1 and v = e sqrt(2 g h).
    t, v = np.sqrt(40 / 9.8), 0.5 * np.sqrt(2 * 9.8 * 20)
    s = 3 - t
    np.testing.assert_allclose(by_h, [0, v / 40 * s - (v - 9.8 * s) * t / 40], rtol=1e-9, atol=1e-12)
    expected = v / 19.6 * s - s**2 / 2 + (v - 9.8 * s) * t / 19.6
    np.testing.assert_allclose(by_g, expected, rtol=1e-9)


def test_a_state_that_stays_on_the_surface_of_an_event_ends_with_a_status():
    # A ball that loses all its speed lies on the ground, where its height does not change.
    solution = BouncingBall.solve(f64([4.9]), f64(9.8), f64(0.0), [0.0, 0.5, 2.0], throw=False)
    np.testing.assert_array_equal(solution.status, [Status.GRAZING_EVENT])
    np.testing.assert_array_equal(solution.events.count, [1])
    assert np.isfinite(solution.ys[1]).all()
    assert np.isnan(solution.ys[2]).all()


def test_an_event_that_is_only_noted_may_graze():
    # y = (t - 1)^3 crosses zero where it does not move. A solve that only notes this can go on.
    def run(**options):
        event = Event(lambda t, y: first(y), **options)
        solver = keras_node.RungeKutta("dopri5", step_size=0.7)
        return keras_node.odeint(
            lambda t, y: 3 * (t - 1) ** 2, f64([[-1.0]]), [0.0, 3.0], event=event, solver=solver, throw=False
        )

    noted = run(terminal=False)
    np.testing.assert_array_equal(noted.status, [Status.SUCCESS])
    np.testing.assert_allclose(noted.events.ts[0], [1.0], atol=1e-3)
    np.testing.assert_allclose(noted.ys[-1], [[8.0]], rtol=1e-9)


def test_a_touch_without_a_crossing_is_not_an_event():
    # y = (t - 1)^2 is zero at 1 but does not change its sign.
    solution = keras_node.odeint(lambda t, y: 2 * (t - 1), f64([[1.0]]), [0.0, 3.0], event=FIRST_IS_ZERO)
    np.testing.assert_array_equal(solution.status, [Status.SUCCESS])
    np.testing.assert_allclose(solution.ys[-1], [[4.0]], rtol=1e-12)


@pytest.mark.parametrize(
    "solver",
    [
        keras_node.RungeKutta("rk4", num_steps=40),
        keras_node.RungeKutta("rk38", step_size=0.07),
        keras_node.RungeKutta("dopri8", rtol=1e-9, atol=1e-11),
        keras_node.RungeKutta("esdirk54", rtol=1e-8, atol=1e-10),
        keras_node.RungeKutta("dopri5", rtol=1e-9, atol=1e-11, step_at=(1.0, 2.0, 9.0)),
    ],
    ids=lambda solver: solver.method,
)
def test_every_kind_of_step_finds_events_and_their_derivatives(solver):
    # The second zero of a cos(t) + b sin(t), whose derivatives are by a: b/(a^2+b^2), by b: -a/(a^2+b^2), up to a sign.
    start = f64([[1.0, 0.4], [0.3, 1.0]])
    event = Event(lambda t, y: first(y), terminal=False)
    gradient = None if solver.tableau.implicit else "checkpointed"

    def run(y0):
        with tf.GradientTape() as tape:
            tape.watch(y0)
            solution = keras_node.odeint(
                oscillator, y0, [0.0, 2.0, 6.2], event=event, solver=solver, gradient=gradient, max_events=2
            )
            second = solution.events.ts[1]
        return solution, tape.gradient(second, y0)

    # Many stages take long to trace, and few steps are soon taken.
    solution, gradient = (run if solver.method == "dopri8" else tf.function(run))(start)
    a, b = start.numpy().T
    expected = np.pi + np.mod(np.arctan2(-a, b), np.pi)
    np.testing.assert_allclose(solution.events.ts[1], expected, rtol=1e-6)
    by_start = np.stack([-b, a], axis=1) / (a**2 + b**2)[:, None]
    np.testing.assert_allclose(gradient, by_start, rtol=2e-5)


def test_the_gradient_of_times_that_are_given():
    # Before its event a state moves with its time; after the event it follows the first time alone.
    event = Event(lambda t, y: y[:, 0] - 2 + 0.5 * y[:, 1])
    for gradient in ("backsolve", "checkpointed", "direct"):
        ts = f64([0.0, 1.0, 3.0])
        with tf.GradientTape() as tape:
            tape.watch(ts)
            solution = keras_node.odeint(
                lambda t, y: tf.stack([y[:, 0], tf.cos(t[:, 0])], axis=1),
                f64([[1.0, 0.0], [0.05, 0.0]]),
                ts,
                event=event,
                gradient=gradient,
                solver=TIGHT,
            )
            total = tf.reduce_sum(solution.ys) + 3 * solution.events.ts[0, 0]
        by_time = tape.gradient(total, ts)
        # e^(t - a) and sin t - sin a, for the first time a. In sample 0 the event is at e^t + sin(t) / 2 = 2.
        t = float(solution.events.ts[0, 0])
        np.testing.assert_allclose(np.exp(t) + 0.5 * np.sin(t), 2, rtol=1e-9)
        later = -(-np.exp(t) - 0.5) / (np.exp(t) + 0.5 * np.cos(t))  # dt*/da
        by_start = 2 * (np.exp(t) * (later - 1) + np.cos(t) * later - 1) + 3 * later
        # Sample 1 is solved to the end.
        others = 0.05 * np.array([-np.e - np.exp(3), np.e, np.exp(3)]) + np.array([-2, np.cos(1.0), np.cos(3.0)])
        np.testing.assert_allclose(by_time, others + np.array([by_start, 0, 0]), rtol=1e-7, err_msg=gradient)


@pytest.mark.parametrize("height", [0.0, -1e-16, 1e-16])
def test_a_ball_that_is_thrown_from_the_ground_comes_back(height):
    # The first step passes the whole flight, and the ball starts on the ground but for a rounding error.
    y0 = f64([[height, 4.9]])
    field = BouncingBall.field
    solver = keras_node.RungeKutta("dopri5", first_step=np.inf)
    solution = keras_node.odeint(field, y0, [0.0, 3.0], args=[f64(9.8)], event=FIRST_IS_ZERO, solver=solver)
    np.testing.assert_allclose(solution.events.ts[0], [1.0], rtol=1e-12)


def test_samples_that_have_stopped_do_not_hide_the_error_of_the_others():
    y0 = f64(np.concatenate([np.full((99, 2), [0.01, -1.0]), [[5.0, 0.0]]]))
    event = Event(lambda t, y: tf.where(tf.norm(y, axis=1) < 2, first(y), f64(1.0)), direction=-1)
    together = keras_node.odeint(oscillator, y0, [0.0, 20.0], event=event)
    alone = keras_node.odeint(oscillator, y0[-1:], [0.0, 20.0])
    np.testing.assert_array_equal(together.events.count, [1] * 99 + [0])
    assert int(together.stats.num_steps[-1]) >= 0.9 * int(alone.stats.num_steps)


def test_an_event_function_has_one_noise_for_a_solve_and_no_state():
    dropout, seen = keras.layers.Dropout(0.5, seed=1), []

    def level(t, y):
        noise = dropout(tf.ones_like(y))
        seen.append(noise.numpy())
        return first(y) - 0.1 * first(noise)

    def solve(function):
        return keras_node.odeint(lambda t, y: -y, tf.ones((8, 2)), [0.0, 4.0], event=Event(function), training=True)

    masks = []
    for _ in range(2):
        solve(level)
        np.testing.assert_array_equal(seen, np.broadcast_to(seen[0], np.shape(seen)))
        masks.append(seen[0])
        seen.clear()
    assert np.any(masks[0] != masks[1])
    normalization = keras.layers.BatchNormalization(name="the_culprit")
    with pytest.raises(ValueError, match=r"cannot update a state.*Received: .*the_culprit"):
        solve(lambda t, y: first(normalization(y)))


def test_a_sample_whose_times_are_equal_does_not_change_the_first_step_of_the_others():
    event, solver = Event(lambda t, y: first(y) - 99), keras_node.RungeKutta("bosh3", rtol=1e-3)

    def solve(y0, ts):
        return keras_node.odeint(oscillator, f64(y0), f64(ts), solver=solver, event=event)

    alone = solve([[1.0, 0.0]], [[0.0], [2.0]])
    beside = solve([[1.0, 0.0], [50.0, 3.0]], [[0.0, 0.5], [2.0, 0.5]])
    np.testing.assert_array_equal(beside.ys[-1, 0], alone.ys[-1, 0])
    assert int(beside.stats.num_steps[0]) == int(alone.stats.num_steps[0])


def test_an_event_in_the_last_of_so_many_steps_is_landed_on():
    """The step in which an event is found does not count, so it takes one more than there are."""
    solver = keras_node.RungeKutta("rk4", num_steps=3)
    solution = keras_node.odeint(
        lambda t, y: tf.ones_like(y), f64([[0.0]]), [0.0, 3.0], event=Event(lambda t, y: first(y) - 2.5), solver=solver
    )
    assert int(solution.status[0]) == Status.SUCCESS
    np.testing.assert_allclose(solution.events.ts[0], [2.5], rtol=1e-12)


@pytest.mark.parametrize("origin", [1e4, 1.7e9])
@pytest.mark.parametrize("terminal", [False, True])
def test_events_of_a_state_in_single_precision_far_from_time_zero(origin, terminal):
    ts = f64([origin, origin + 1])
    event = Event(lambda y: y[:, 0], terminal=terminal)
    # The state rises by 1: one sample passes zero soon after the start, one never, one late.
    y0 = tf.constant([[-0.002], [-1.2], [-0.9]])
    solution = keras_node.odeint(lambda y: tf.ones_like(y), y0, ts, event=event, solver="rk4", throw=False)
    np.testing.assert_array_equal(solution.status, [0, 0, 0])
    np.testing.assert_array_equal(solution.events.count, [1, 0, 1])
    np.testing.assert_allclose(solution.events.ts[0] - origin, [0.002, np.nan, 0.9], atol=1e-6)
    numbers = keras_node.odeint(lambda y: tf.ones_like(y), y0, [origin, origin + 1], event=event, solver="rk4")
    np.testing.assert_allclose(numbers.events.ts[0] - origin, [0.002, np.nan, 0.9], atol=1e-6)
