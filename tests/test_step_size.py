"""Every option of a solver does what its documentation says: the formulas again in NumPy, and SciPy's first step."""

import dataclasses
import functools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.integrate import RK23

import keras_node
from keras_node import RungeKutta, Status, odeint
from keras_node.step_size import first_step_size, rms_norm

BASE = RungeKutta("heun", rtol=1e-2, atol=1e-3, first_step=2.0)
END = 2.0
Y0 = np.array([1.0, -0.5])


def field(t, y, functions=np):
    """It turns ever faster, so that steps grow and shrink, and are rejected."""
    return 5.0 * functions.cos(t**3) * y - t


def reference(solver):
    """The states at the end and the attempted steps of Heun's method with Soderlind's PID controller."""
    t, y, h, past, steps = 0.0, Y0, solver.first_step, [1.0, 1.0], []
    while t < END:
        left = END - t
        h = left if 1.01 * h >= left else h
        k1 = field(t, y)
        k2 = field(t + h, y + h * k1)
        y1 = y + h * (k1 + k2) / 2
        scale = solver.atol + solver.rtol * np.maximum(np.abs(y), np.abs(y1))
        e = np.sqrt(np.mean((h * (k2 - k1) / 2 / scale) ** 2))
        accepted = e <= 1
        # The controller acts on the logarithms: the error, its difference and its second difference.
        now, before, earlier = np.log([max(e, 1e-10), *past])
        control = solver.icoeff * now + solver.pcoeff * (now - before) + solver.dcoeff * (now - 2 * before + earlier)
        factor = solver.safety * np.exp(-control / 2)
        most = solver.max_factor
        if (solver.pcoeff or solver.dcoeff) and not accepted:
            most = solver.safety
        steps.append((h, accepted))
        if accepted:
            t, y, past = t + h, y1, [e, past[0]]
        h = h * max(min(factor, most), solver.min_factor)
    return y, steps


def solve(solver, y0=Y0, ts=(0.0, END)):
    return odeint(lambda t, y: field(t, y, tf), tf.constant(y0), list(ts), solver=solver)


def check(solution, expected):
    y, steps = expected
    accepted = sum(step[1] for step in steps)
    assert [int(solution.stats.num_steps), int(solution.stats.num_rejected)] == [accepted, len(steps) - accepted]
    np.testing.assert_allclose(solution.ys[-1], y, rtol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rtol": 1e-3},
        {"atol": 1e-1},
        {"first_step": 0.3},
        {"safety": 0.6},
        {"min_factor": 0.7},
        {"max_factor": 1.3},
        {"icoeff": 0.6},
        {"pcoeff": 0.4, "icoeff": 0.3},
        {"dcoeff": 0.2},
        {"pcoeff": 0.2, "icoeff": 0.5, "dcoeff": 0.1, "safety": 0.8, "max_factor": 1.3},
    ],
    ids=str,
)
def test_steps_are_those_of_the_formulas(options):
    expected = reference(dataclasses.replace(BASE, **options))
    assert {accepted for _, accepted in expected[1]} == {False, True}
    if options:  # it makes a difference
        assert np.abs(expected[0] - reference(BASE)[0]).max() > 1e-6
    check(solve(dataclasses.replace(BASE, **options)), expected)


def test_steps_are_the_same_under_xla():
    solver = dataclasses.replace(BASE, pcoeff=0.2, icoeff=0.5, dcoeff=0.1)
    check(tf.function(lambda: solve(solver), autograph=False, jit_compile=True)(), reference(solver))


def test_the_first_step_is_that_of_scipy():
    ends = []
    for tolerance in (1e-3, 1e-6):
        scipy = RK23(field, 0.0, Y0, END, rtol=tolerance, atol=tolerance)
        ends.append(scipy.h_abs)
        # A solve that may attempt one step fails after it, unless it is as long as the first.
        for length, status in ((0.99, Status.SUCCESS), (1.02, Status.MAX_STEPS)):
            solver = RungeKutta("bosh3", rtol=tolerance, atol=tolerance, max_steps=1)
            ts = [0.0, length * scipy.h_abs]
            solution = odeint(lambda t, y: field(t, y, tf), tf.constant(Y0), ts, solver=solver, throw=False)
            assert int(solution.status) == status
    assert ends[0] > 5 * ends[1] > 1e-4


def first_step_by_hand(rate, y0, end, tolerance, order):
    """The algorithm of Hairer, Norsett & Wanner, II.4, for a state of one number."""
    scale = tolerance + tolerance * abs(y0)
    d0, d1 = abs(y0) / scale, abs(rate(0.0, y0)) / scale
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    h0 = min(h0, end)
    d2 = abs(rate(h0, y0 + h0 * rate(0.0, y0)) - rate(0.0, y0)) / scale / h0
    h1 = max(1e-6, 1e-3 * h0) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / order)
    h = min(100 * h0, h1, end)
    return h if np.isfinite(h) else h0


@pytest.mark.parametrize(
    ("rate", "y0", "end"),
    [
        (lambda t, y: -3 * y + t, 2.0, 5.0),
        (lambda t, y: 100.0 + 0 * y, 0.01, 5.0),  # a hundred trial steps are shorter than the others
        (lambda t, y: 100.0 + 0 * y, 0.01, 1e-5),  # the solve is
        (lambda t, y: 1e-3 * (1 + t**2) + 0 * y, 50.0, 2.0),  # the trial step is longer than the solve
        (lambda t, y: 1e-3 + 0 * y, 0.0, 5.0),
        (lambda t, y: 1e-3 + 0 * y, 1.5e-8, 5.0),
        (lambda t, y: 1.5e-8 + 0 * y, 1e-3, 1e6),
        (lambda t, y: 1.5e-18 + 0 * y, 1e-3, 1e6),
        (lambda t, y: 0 * y, 1e-3, 1e6),
        (lambda t, y: 1.0 / np.float64(t == 0) + 0 * y, 2.0, 5.0),  # the trial step leaves the domain
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_the_first_step_is_chosen_by_the_textbook(rate, y0, end):
    controller = RungeKutta("bosh3", rtol=1e-3, atol=1e-3).controller

    def rate_of_change(t, y):
        return tf.constant([rate(t.numpy(), y.numpy().item())], tf.float64)

    y = tf.constant([y0], tf.float64)
    k1 = rate_of_change(tf.constant(0.0, tf.float64), y)
    norm = functools.partial(rms_norm, per_sample=False)
    chosen = first_step_size(rate_of_change, y, k1, tf.constant(end, tf.float64), controller, norm)
    np.testing.assert_allclose(chosen, first_step_by_hand(rate, y0, end, 1e-3, controller.error_order), rtol=1e-12)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shapes", [[(3, 2), (3,)], [(1, 1)], [(2, 0)]], ids=str)
def test_the_norm_is_the_root_of_the_mean_square(shapes, known):
    rng = np.random.default_rng(0)
    x = [rng.normal(size=shape) for shape in shapes]
    specs = [tf.TensorSpec(shape if known else [None] * len(shape), tf.float64) for shape in shapes]
    norms = tf.function(lambda x: [rms_norm(x, per_sample) for per_sample in (False, True)], input_signature=[specs])
    rows = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in x], axis=1)
    expected = [np.sqrt(np.mean(rows**2)), np.sqrt(np.mean(rows**2, axis=1))] if rows.size else [0.0, [0.0] * len(rows)]
    for computed, wanted in zip(norms([tf.constant(leaf) for leaf in x]), expected, strict=True):
        np.testing.assert_allclose(computed, wanted, rtol=1e-14)


def test_an_infinite_first_step_attempts_the_whole_way():
    solution = odeint(lambda y: -y, tf.ones(2), [0.0, 1e-3], solver=RungeKutta(first_step=math.inf))
    assert int(solution.stats.num_steps) == 1 and int(solution.stats.num_evaluations) == 7
    np.testing.assert_allclose(solution.ys[-1], np.full(2, np.exp(-1e-3)), rtol=1e-6)


def test_a_solve_has_max_steps_and_no_more():
    attempts = len(reference(BASE)[1])
    enough = dataclasses.replace(BASE, max_steps=attempts)
    assert int(solve(enough).status) == Status.SUCCESS
    with pytest.raises(tf.errors.InvalidArgumentError, match="`max_steps` was reached"):
        solve(dataclasses.replace(BASE, max_steps=attempts - 1))


def euler(ends, length):
    t, y = 0.0, Y0
    for end in ends:
        while t < end - 1e-9:
            h = min(length(end), end - t)
            t, y = t + h, y + h * field(t, y)
    return y


def test_constant_steps_have_their_length_and_the_last_is_shorter():
    solution = solve(RungeKutta("euler", step_size=0.3))
    assert int(solution.stats.num_steps) == 7
    np.testing.assert_allclose(solution.ys[-1], euler([END], lambda end: 0.3), rtol=1e-10)


def test_constant_steps_are_counted_between_two_times():
    solution = solve(RungeKutta("euler", num_steps=4), ts=(0.0, 0.4, 2.0))
    assert int(solution.stats.num_steps) == 8
    expected = euler([0.4, 2.0], lambda end: 0.1 if end == 0.4 else 0.4)
    np.testing.assert_allclose(solution.ys[-1], expected, rtol=1e-10)


def test_steps_of_a_sample_do_not_depend_on_the_others():
    y0 = np.stack([Y0, 100 * Y0])
    together = solve(dataclasses.replace(BASE, per_sample=True), y0)
    for i in range(2):
        alone = solve(BASE, y0[i])
        np.testing.assert_allclose(together.ys[-1, i], alone.ys[-1], rtol=1e-10)
        assert int(together.stats.num_steps[i]) == int(alone.stats.num_steps)
    assert np.abs(solve(BASE, y0).ys[-1, 0] - together.ys[-1, 0]).max() > 1e-6


def test_solvers_are_values():
    solver = RungeKutta("dopri5", rtol=1e-5, step_at=[1, 2])
    same = RungeKutta("dopri5", rtol=np.float64(1e-5), step_at=np.array([1.0, 2.0]))
    assert solver == same and hash(solver) == hash(same)
    assert solver != dataclasses.replace(solver, atol=1e-3)
    assert repr(solver) == "RungeKutta('dopri5', rtol=1e-05, step_at=(1.0, 2.0))"
    assert RungeKutta.from_config(solver.get_config()) == solver
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(solver)) == solver
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.rtol = 1.0
    with pytest.raises(TypeError):
        RungeKutta("dopri5", 1e-5)


@pytest.mark.parametrize("name", ["num_steps", "max_steps"])
def test_whole_numbers_become_integers(name):
    solver = RungeKutta("bosh3", **{name: 4.0})
    assert type(getattr(solver, name)) is int and solver == RungeKutta("bosh3", **{name: np.int64(4)})


def test_checkpoints_are_counted_in_integers():
    for kind in (keras_node.BacksolveAdjoint, keras_node.CheckpointedAdjoint):
        assert type(kind(num_checkpoints=3.0).num_checkpoints) is int
        with pytest.raises(ValueError, match=r"`num_checkpoints` must be a positive integer\. Received: .*2\.5"):
            kind(num_checkpoints=2.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "RK4", "num_steps": 2}, "must be one of euler.*Did you mean 'rk4'.*Received: method='RK4'"),
        ({"method": ["rk4"]}, "`method` must be one of euler"),
        ({"step_at": 0.5}, r"must be a list of finite times, such as \[0.5\]. Received: step_at=0.5"),
        ({"step_at": [0.5, np.inf]}, "must be a list of finite times"),
        ({"max_steps": None}, "`max_steps` must be a positive integer. Received: max_steps=None"),
        ({"max_steps": True}, "`max_steps` must be a positive integer. Received: max_steps=True"),
        ({"num_steps": 2.5}, "`num_steps` must be a positive integer. Received: num_steps=2.5"),
        ({"rtol": None}, "`rtol` must be a number. Received: rtol=None"),
        ({"rtol": "1e-3"}, "`rtol` must be a number. Received: rtol='1e-3'"),
        ({"atol": 0.0}, "`atol` must be positive. Received: atol=0.0"),
        ({"first_step": -1.0}, "`first_step` must be positive"),
        ({"pcoeff": np.nan}, "`pcoeff` must be a number"),
        ({"safety": 1.1}, "needs `safety <= 1`"),
        ({"min_factor": 1.0}, "and `max_factor > 1`. Received: safety=0.9, min_factor=1.0"),
        ({"max_factor": 1.0}, "max_factor=1.0"),
        (
            {"num_steps": 2, "first_step": 0.1},
            "no effect with constant steps.*Received: first_step=0.1",
        ),
        ({"num_steps": 2, "step_at": [0.5]}, r"no effect with `num_steps`.*Received: step_at=\(0.5,\)"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RungeKutta(**options)
