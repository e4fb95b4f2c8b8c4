"""Faults thrown in: broken numbers, fields and sizes end with a status or an error; nothing hangs, leaks or spreads."""

import gc
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node import RungeKutta, Status
from keras_node.gradients import GRADIENTS
from keras_node.jit_compile import CompileLater

BROKEN = [np.nan, np.inf, -np.inf]


def solve(field, y0, ts=(0.0, 1.0), mode="eager", **options):
    """A solve that does not raise, and the gradient of the sum of its last states with respect to `y0`."""

    def run(y0):
        with tf.GradientTape() as tape:
            tape.watch(y0)
            solution = keras_node.odeint(field, y0, ts, throw=False, **options)
            value = tf.reduce_sum(solution.ys[-1])
        return solution, tape.gradient(value, y0)

    run = run if mode == "eager" else tf.function(run, autograph=False, jit_compile=mode == "xla")
    return run(tf.constant(y0))


EMPTY = {
    "ODERNN": lambda: (keras_node.ODERNN(keras.layers.GRUCell(2), keras.layers.Dense(2), solver="midpoint"), 2),
    "NeuralCDE": lambda: (keras_node.NeuralCDE(2, solver="midpoint"), 2),
    "checkpointed": lambda: (keras_node.ODELayer(keras.layers.Dense(2), gradient="checkpointed"), 1),
    "reversible": lambda: (
        keras_node.ODELayer(keras.layers.Dense(2), solver=RungeKutta("bosh3", per_sample=True), gradient="reversible"),
        1,
    ),
    "flow": lambda: (keras_node.ContinuousFlow(2, solver="midpoint", gradient="checkpointed"), 1),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_batch_of_none_whose_size_is_unknown(kind):
    # With several devices the last batch may leave one of them without samples.
    layer, number = EMPTY[kind]()
    shapes = [(None, 3, 2), (None, 3)] if number == 2 else [(None, 2)]

    @tf.function(input_signature=[tf.TensorSpec(shape) for shape in shapes])
    def gradients(*inputs):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(*inputs, training=True))
        return loss, tape.gradient(loss, [v.value for v in layer.trainable_variables])

    layer(*(tf.ones([2, *shape[1:]]) for shape in shapes))
    loss, found = gradients(*(tf.zeros([0, *shape[1:]]) for shape in shapes))
    assert float(loss) == 0 and found
    for gradient in found:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@pytest.mark.parametrize("mode", ["eager", "xla"])
@pytest.mark.parametrize("gradient", [name for name in GRADIENTS if name != "direct"])
def test_a_broken_sample_stays_alone_where_samples_step_by_themselves(gradient, mode):
    y0 = np.tile([[0.5, 1.0]], (len(BROKEN) + 1, 1))
    y0[1:, 1] = BROKEN
    solver = RungeKutta("bosh3", rtol=1e-7, atol=1e-7, per_sample=True)
    solution, dy0 = solve(lambda y: -y, y0, mode=mode, gradient=gradient, solver=solver)
    np.testing.assert_array_equal(solution.status, [Status.SUCCESS, *[Status.NON_FINITE] * len(BROKEN)])
    np.testing.assert_allclose(solution.ys[-1, 0], y0[0] * np.exp(-1), rtol=1e-5)
    np.testing.assert_allclose(dy0[0], np.exp(-1), rtol=1e-5)
    assert np.isnan(solution.ys[-1, 1:]).all() and np.isnan(dy0[1:]).all()


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("solver", [RungeKutta("bosh3"), RungeKutta("rk4", num_steps=3)], ids=str)
def test_joint_steps_say_that_a_sample_is_broken(value, solver):
    solution, dy0 = solve(lambda y: -y, [[0.5], [value]], solver=solver)
    assert int(solution.status) == Status.NON_FINITE
    assert np.isnan(solution.ys[-1]).all() and np.isnan(dy0).all()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_a_field_raises_comes_through(gradient):
    class Unhappy(Exception):
        pass

    def field(t, y):
        if float(t) > 0.5:
            raise Unhappy("past the middle")
        return -y

    with pytest.raises(Unhappy, match="past the middle"):
        keras_node.odeint(field, tf.ones(2), [0.0, 1.0], gradient=gradient)
    # Nothing stays behind in Keras' or TensorFlow's state.
    np.testing.assert_allclose(keras_node.odeint(lambda y: -y, tf.ones(2), [0.0, 1.0]).ys[-1], np.exp(-1), rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_an_explosion_ends_with_a_status(per_sample, dtype):
    # y = 1 / (1 / y0 - t): the second sample has a pole at 0.2.
    solver = RungeKutta("tsit5", per_sample=per_sample)
    solution, dy0 = solve(lambda y: y**2, np.array([[0.1], [5.0]], dtype), solver=solver, mode="graph")
    status = np.broadcast_to(solution.status, 2)
    assert status[1] in (Status.MAX_STEPS, Status.NON_FINITE, Status.STEP_SIZE_UNDERFLOW)
    assert np.isnan(solution.ys[-1, 1]).all() and np.isnan(dy0[1]).all()
    if per_sample:
        assert status[0] == Status.SUCCESS
        np.testing.assert_allclose(solution.ys[-1, 0], 1 / 9, rtol=1e-3)
        np.testing.assert_allclose(dy0[0], 1 / 0.81, rtol=1e-2)


@pytest.mark.parametrize(("mode", "dtype", "per_sample"), [("eager", "float64", False), ("xla", "float32", True)])
def test_a_step_that_rounding_keeps_from_becoming_shorter_ends_the_solve(mode, dtype, per_sample):
    # At the pole, steps are one rounding error long, are rejected, and the next would be as long again.
    solver = RungeKutta("tsit5", max_steps=5000, per_sample=per_sample)
    solution, _ = solve(
        lambda t, y: 1 / (1 - t) ** 2 + 0 * y, np.ones((1, 1), dtype), [0.0, 2.0], solver=solver, mode=mode
    )
    assert np.all(solution.status == Status.STEP_SIZE_UNDERFLOW)
    assert np.max(solution.stats.num_rejected) < 200
    # Here each attempt is a fifth as long as the one before, until it is too short to move the time.
    solution, _ = solve(lambda t, y: tf.where(t < 0.5, y, y * np.nan), np.ones((1, 1), dtype), solver=solver, mode=mode)
    assert np.all(solution.status == Status.NON_FINITE)
    assert np.max(solution.stats.num_rejected) < 200


def test_an_adjoint_that_fails_for_a_sample_spoils_what_all_samples_share():
    few = keras_node.BacksolveAdjoint(solver=RungeKutta("dopri5", per_sample=True, max_steps=8))
    y0, rate = tf.ones((2, 1), tf.float64), tf.constant(1.0, tf.float64)
    speeds = tf.constant([[0.1], [50.0]], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch([y0, rate])
        solution = keras_node.odeint(
            lambda t, y, rate: -rate * speeds * y,
            y0,
            [0.0, 1.0],
            args=rate,
            solver=RungeKutta("dopri5", per_sample=True),
            gradient=few,
            throw=False,
        )
        y1 = solution.ys[-1]
    assert np.all(solution.status == Status.SUCCESS)
    dy0, drate = tape.gradient(y1, [y0, rate])
    np.testing.assert_allclose(dy0[0], np.exp(-0.1), rtol=1e-3)
    assert np.isnan(dy0[1]) and np.isnan(drate)


def test_a_field_that_is_not_lipschitz_is_solved_to_its_edge():
    # From above, y = (sqrt(y0) - t / 2)^2 until it is zero at t = 2, where solutions are not unique.
    field, options = lambda y: -tf.sqrt(tf.abs(y)), {"gradient": "checkpointed", "mode": "graph"}
    options["solver"] = RungeKutta("tsit5", rtol=1e-7, atol=1e-9)
    solution, dy0 = solve(field, np.array([1.0]), [0.0, 1.0, 1.9], **options)
    np.testing.assert_allclose(solution.ys[:, 0], [1, 0.25, 0.0025], rtol=1e-4)
    np.testing.assert_allclose(dy0, 0.05, rtol=1e-3)
    past, _ = solve(field, np.array([1.0]), [0.0, 3.0], **options)
    assert np.isfinite(past.ys[-1]).all() == (int(past.status) == Status.SUCCESS)


@pytest.mark.parametrize(("mode", "dtype"), [("eager", "float64"), ("xla", "float32")])
@pytest.mark.parametrize(
    "solver", [RungeKutta("tsit5"), RungeKutta("rk4", num_steps=3), RungeKutta("rk4", step_size=0.1)], ids=str
)
def test_no_time_and_hardly_any_time(solver, mode, dtype):
    tiny = np.finfo(dtype).tiny
    y0 = tf.constant([1.0, 2.0], dtype)

    def run(ts):
        with tf.GradientTape() as tape:
            tape.watch(y0)
            solution = keras_node.odeint(lambda y: -y, y0, ts, solver=solver, throw=False)
            y = solution.ys[-1]
        return solution.status, y, tape.gradient(y, y0)

    run = run if mode == "eager" else tf.function(run, autograph=False, jit_compile=True)
    for end in (0.0, tiny, tiny / 8, -tiny):
        status, y, dy0 = run(tf.constant([0.0, end], dtype))
        assert int(status) == Status.SUCCESS, end
        np.testing.assert_array_equal(y, y0)
        np.testing.assert_allclose(dy0, 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tolerances_below_rounding_end(dtype):
    solver = RungeKutta("dopri5", rtol=1e-30, atol=1e-30, max_steps=200)
    solution, _ = solve(lambda y: -y, np.array([1.0], dtype), solver=solver, mode="xla", gradient="checkpointed")
    assert int(solution.status) in (Status.MAX_STEPS, Status.STEP_SIZE_UNDERFLOW)
    assert np.isnan(solution.ys[-1]).all()


def test_absurd_sizes():
    solution, dy0 = solve(lambda y: -y, np.ones((3, 0)), solver="rk4")
    assert solution.ys.shape == (2, 3, 0) and dy0.shape == (3, 0)
    solution, dy0 = solve(lambda y: -y, np.ones(1_000_000, "float32"), solver=RungeKutta("euler", num_steps=1))
    assert not np.any(solution.ys[-1]) and not np.any(dy0)
    ts = np.linspace(0, 1, 2001)
    solution, dy0 = solve(lambda y: -y, np.ones(1), ts, solver=RungeKutta("euler", num_steps=1), mode="graph")
    np.testing.assert_allclose(solution.ys[:, 0], (1 - 1 / 2000) ** np.arange(2001), rtol=1e-10)


# Memory and threads.


def model():
    keras.utils.set_random_seed(0)
    field = keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(4)])
    layer = keras_node.ODELayer(field, solver=RungeKutta("bosh3", rtol=1e-2))
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def resident():
    """The memory of this process, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def growth(call, calls):
    """By how many bytes, and by how many graphs, `calls` more calls make a process grow once it is warm."""

    def graphs():
        gc.collect()
        return sum(isinstance(thing, tf.Graph) for thing in gc.get_objects())

    for _ in range(max(3, calls // 10)):
        call()
    memory, number = resident(), graphs()
    for _ in range(calls):
        call()
    number = graphs() - number
    return resident() - memory, number


def repeated_calls():
    """Calls by name that a program may make thousands of times."""
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    trained, field = model(), keras.layers.Dense(4, activation="tanh")
    trained.fit(x, x[:, :1], epochs=CompileLater.SOLVES + 1, verbose=0)  # XLA takes memory when it begins to compile

    def eager():
        with tf.GradientTape() as tape:
            y = keras_node.odeint(field, x, [0.0, 1.0], solver=RungeKutta("bosh3", rtol=1e-2)).ys[-1]
        tape.gradient(y, [v.value for v in field.trainable_variables])

    return {
        "fit": lambda: trained.fit(x, x[:, :1], verbose=0),
        "predict": lambda: trained.predict(x, verbose=0),
        "odeint": eager,
    }


@pytest.mark.skipif(not hasattr(threading, "get_native_id"), reason="needs /proc")
def test_memory_stays_flat_over_many_calls():
    for name, call in repeated_calls().items():
        for _ in range(3):
            memory, graphs = growth(call, calls=15)
            assert graphs <= 0, name
            # A solve's graph, or the states of a tape, would be a megabyte for every few calls, in every round. What
            # other threads of this process take and give back is not, so that one round without growth is enough.
            if memory < 20 * 2**20:
                break
        else:
            pytest.fail(f"{name} takes more memory with every call")


def test_eight_threads_predict_what_one_does():
    served = model()
    batches = [np.random.default_rng(i).normal(size=(5, 4)).astype("float32") for i in range(8)]
    function = tf.function(served, input_signature=[tf.TensorSpec((None, 4))])
    expected = [served.predict(x, verbose=0) for x in batches]
    results = {}

    def work(i):
        results[i] = [served(batches[i], training=False), function(batches[i]), served.predict_on_batch(batches[i])]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for i, ys in results.items():
        for y in ys:
            np.testing.assert_allclose(y, expected[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", ["checkpointed", "reversible"])
def test_a_solve_that_fails_for_a_sample_spoils_the_gradient_of_what_all_samples_share(gradient):
    y0, rate, ts = tf.constant([[1.0], [100.0]], tf.float64), tf.constant(1.0, tf.float64), tf.constant([0.0, 0.5])
    solver = keras_node.RungeKutta("bosh3", per_sample=True, max_steps=200)
    with tf.GradientTape() as tape:
        tape.watch((y0, rate, ts))
        solution = keras_node.odeint(
            lambda t, y, rate: rate * y**2, y0, ts, args=rate, gradient=gradient, solver=solver, throw=False
        )
        total = tf.reduce_sum(solution.ys[-1])
    np.testing.assert_array_equal(solution.status == 0, [True, False])
    by_start, by_rate, by_times = tape.gradient(total, (y0, rate, ts))
    np.testing.assert_array_equal(np.isfinite(by_start), [[True], [False]])
    assert np.isnan(by_rate) and np.isnan(by_times).all()
