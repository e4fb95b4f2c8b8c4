"""gradcheck finds nothing wrong with a right gradient, and finds a wrong one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node
from keras_node.gradients import GRADIENTS

Y0 = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")


@pytest.fixture(scope="module")
def layer():
    keras.utils.set_random_seed(0)
    field = keras.Sequential([keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(3)])
    field.build((None, 3))
    return field


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_layer_is_checked_in_float64(layer, gradient):
    solver = keras_node.RungeKutta("dopri5", rtol=1e-9, atol=1e-9)
    checks = keras_node.gradcheck(layer, Y0, [0.0, 0.5, 1.0], gradient=gradient, solver=solver, verbose=False)
    names = [check.name for check in checks]
    assert names[:2] == ["y0", "ts"] and len(names) == 6 and "kernel" in names[2]
    assert [check.size for check in checks] == [12, 3, 15, 5, 15, 3]
    assert max(check.error for check in checks) < 1e-6
    assert layer.variables[0].dtype == "float32"


def test_arguments_and_nests_are_checked_and_a_table_is_printed(capsys):
    checks = keras_node.gradcheck(
        lambda t, y, args: {"a": args["w"] * y["b"], "b": -t * y["a"]},
        {"a": Y0, "b": Y0},
        np.stack([np.zeros(4), np.arange(1.0, 5.0)]),
        args={"w": 2.0, "count": 3},
        solver=keras_node.RungeKutta("rk4", num_steps=20),
        gradient="checkpointed",
    )
    lines = capsys.readouterr().out.splitlines()
    assert (
        [line.split()[0] for line in lines[1:]]
        == [check.name for check in checks]
        == ["y0[0]", "y0[1]", "ts", "args[0]"]
    )
    assert max(check.error for check in checks) < 1e-7


def test_a_wrong_gradient_is_found():
    @tf.custom_gradient
    def wrong(y):
        return -y, lambda upstream: -1.1 * upstream

    checks = keras_node.gradcheck(lambda y: wrong(y), Y0, [0.0, 1.0], verbose=False)
    assert checks[0].error > 0.05


def test_loose_tolerances_show():
    errors = []
    for rtol in (1e-2, 1e-4):
        solver = keras_node.RungeKutta("bosh3", rtol=rtol, atol=rtol)
        checks = keras_node.gradcheck(lambda t, y: tf.sin(5 * t) * y, Y0, [0.0, 2.0], solver=solver, verbose=False)
        errors.append(checks[0].error)
    assert errors[0] > 10 * errors[1] > 0


@pytest.mark.parametrize("ts", [[0.0, 0.5, 0.5, 1.0, 1.0], [2.0, 2.0, 1.0], [1.7e9, 1.7e9 + 1.0], [0.0, 1e-7, 2e-7]])
def test_times_may_be_equal_large_or_close_to_each_other(ts):
    rate = 1 / np.ptp(ts)
    solver = keras_node.RungeKutta("dopri5", rtol=1e-11, atol=1e-11)
    checks = keras_node.gradcheck(lambda y: -rate * y, np.array([[1.0, 2.0]]), ts, solver=solver, verbose=False)
    assert [check.name for check in checks] == ["y0", "ts"]
    assert checks[0].error < 1e-8 and checks[1].error < 1e-6
    assert abs(checks[1].gradient) > 0.01 * rate


def test_a_state_of_integers_is_converted():
    checks = keras_node.gradcheck(lambda y: -y, np.array([[1, 2]]), [0, 1], solver="rk4", verbose=False)
    assert checks[0].error < 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_directions": 0}, "`num_directions` must be a positive integer"),
        ({"epsilon": 0.0}, "`epsilon` must be positive. Received: epsilon=0.0"),
        ({"ts": 1.0}, r"`ts` must be of shape \(T,\)"),
        ({"ts": [0.0, 2.0, 1.0]}, "finite and monotonic"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        keras_node.gradcheck(lambda y: -y, Y0, **{"ts": [0.0, 1.0], **options})
