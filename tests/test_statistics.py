"""Solver statistics in the logs, and the callback that reads them."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node

X = np.random.default_rng(0).normal(size=(24, 3)).astype("float32")
TIMES = np.cumsum(np.random.default_rng(1).uniform(size=(8, 4)), axis=1).astype("float32")


def ode_model(field=None, **options):
    field = field or keras.layers.Dense(3, activation="tanh")
    layer = keras_node.ODELayer(field, name="ode", track_stats=True, **options)
    return keras.Sequential([keras.Input((3,)), layer])


@pytest.mark.parametrize(("gradient", "jit_compile"), [("backsolve", False), ("checkpointed", True), ("direct", False)])
def test_the_logs_tell_what_a_solve_took(gradient, jit_compile, tmp_path):
    model = ode_model(gradient=gradient, solver=keras_node.RungeKutta("bosh3", num_steps=5))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit_compile)
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = model.fit(X, X, 8, epochs=2, verbose=0, validation_data=(X, X), callbacks=[log]).history
    expected = {"evaluations": 16, "steps": 5, "rejected": 0, "failed": 0}
    for kind, value in expected.items():
        assert history[f"ode_{kind}"] == history[f"val_ode_{kind}"] == [value, value]
    if gradient == "direct":
        assert not any("backward" in name for name in history)
    else:
        assert history["ode_backward_steps"] == [5, 5]
        # Of five steps, three states are kept: two are replayed.
        assert history["ode_backward_evaluations"] == [16 if gradient == "backsolve" else 3 * (5 + 2)] * 2
        assert history["val_ode_backward_steps"] == [0, 0]
    with open(tmp_path / "log.csv") as file:
        assert float(next(csv.DictReader(file))["ode_evaluations"]) == 16


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_recurrent_layer_counts_its_solves(jit_compile):
    x, times = keras.Input((4, 3)), keras.Input((4,))
    solver = keras_node.RungeKutta("bosh3", num_steps=2)
    h = keras_node.ODERNN(keras.layers.GRUCell(3), keras.layers.Dense(3), solver=solver, track_stats=True)(x, times)
    model = keras.Model([x, times], h)
    model.compile("sgd", "mse", jit_compile=jit_compile)
    logs = model.evaluate([np.ones((8, 4, 3)), TIMES], np.ones((8, 3)), verbose=0, return_dict=True)
    (name,) = (name for name in logs if name.endswith("_evaluations") and "backward" not in name)
    # No time passes before the first observation.
    np.testing.assert_allclose(logs[name], (3 * 7 + 1) / 4, rtol=1e-6)
    logs = model.fit([np.ones((8, 4, 3)), TIMES], np.ones((8, 3)), verbose=0).history
    np.testing.assert_allclose(logs[name], [(3 * 7 + 1) / 4], rtol=1e-6)


@pytest.mark.parametrize("gradient", ["backsolve", "checkpointed", "direct"])
@pytest.mark.parametrize("layer", ["ODERNN", "NeuralCDE"])
def test_the_solves_of_a_recurrent_layer_attempt_the_whole_interval_first(layer, gradient):
    if layer == "ODERNN":
        rnn = keras_node.ODERNN(keras.layers.GRUCell(3), keras.layers.Dense(3), gradient=gradient, track_stats=True)
        expected = (3 * 7 + 1) / 4  # a step to each observation, and none to the first
    else:
        rnn = keras_node.NeuralCDE(3, keras.layers.Dense(3 * 4), gradient=gradient, track_stats=True)
        expected = 7
    rnn.build((8, 4, 3))
    tf.function(rnn)(np.full((8, 4, 3), 0.1, "float32"), 1e-2 * TIMES, training=True)
    evaluations = next(float(m.result()) for m in rnn.metrics if m.name.endswith("evaluations"))
    if gradient == "direct":  # tries a first step
        assert evaluations >= expected + 1
    else:
        assert evaluations == expected


@pytest.mark.parametrize("ts", [None, [0.3, 0.7, 1.0]])
@pytest.mark.parametrize(
    ("gradient", "solver"),
    [
        ("backsolve", "bosh3"),  # evaluates the field once more where the cotangent of a state is added
        ("checkpointed", "bosh3"),
        (keras_node.CheckpointedAdjoint(2), "heun"),
        (keras_node.CheckpointedAdjoint(2), "dopri8"),  # has further stages where a time falls into a step
        ("checkpointed", keras_node.RungeKutta("rk4", num_steps=5)),
        ("checkpointed", "trbdf2"),
        ("reversible", "bosh3"),
        ("reversible", "dopri8"),
    ],
)
def test_the_evaluations_of_a_gradient_are_counted(gradient, solver, ts):
    calls = []

    class Counted(keras.layers.Layer):
        def build(self, shape):
            self.rate = self.add_weight(shape=(), initializer="ones", name="rate")

        def call(self, y):
            calls.append(1)
            return -self.rate * y

    layer = keras_node.ODELayer(Counted(), solver=solver, gradient=gradient, track_stats=True, name="ode")
    layer.build((2, 1))
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(layer(tf.ones((2, 1)), ts=ts, training=True))
    calls.clear()
    tape.gradient(value, layer.trainable_variables[0].value)
    (counted,) = (float(m.result()) for m in layer.metrics if m.name == "ode_backward_evaluations")
    assert counted == len(calls)


def test_off_it_leaves_no_trace():
    layer = keras_node.ODELayer(keras.layers.Dense(3))
    layer(X)
    assert not layer.metrics and len(layer.variables) == 2


def test_statistics_survive_saving(tmp_path):
    model = ode_model()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [m.name for m in loaded.layers[0].metrics] == [m.name for m in model.layers[0].metrics]
    np.testing.assert_array_equal(loaded(X), model(X))


def test_a_metric_is_made_again_from_its_config():
    metric = ode_model().layers[0].metrics[0]
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    assert (copy.name, copy.layer, copy.kind) == (metric.name, "ode", metric.kind)


def test_the_monitor_names_the_layer_that_takes_too_many_evaluations():
    model = ode_model(solver=keras_node.RungeKutta("bosh3", num_steps=5))
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match=r"Epoch 1: Solves of layer 'ode' take 16 evaluations. Loosen.*kinetic_energy"):
        history = model.fit(X, X, epochs=3, verbose=0, callbacks=[keras_node.SolverMonitor(15, stop=True)])
    assert len(history.history["loss"]) == 1


def test_the_monitor_sees_failures_under_xla():
    @keras.saving.register_keras_serializable(package="keras_node_tests")
    def explosion(y):
        return 1e3 * y**2

    model = ode_model(explosion)
    model.compile("sgd", "mse", jit_compile=True)
    with pytest.warns(UserWarning, match=r"Solves of layer 'ode' failed \(100.0% of them\)"):
        model.fit(X, X, epochs=1, verbose=0, callbacks=[keras_node.SolverMonitor()])


def test_the_monitor_is_quiet_where_all_is_well(recwarn):
    model = ode_model()
    model.compile("sgd", "mse")
    model.fit(X, X, verbose=0, callbacks=[keras_node.SolverMonitor()])
    assert not [w for w in recwarn if "Epoch" in str(w.message)]


def test_the_monitor_needs_statistics_and_sensible_bounds():
    model = keras.Sequential([keras.Input((3,)), keras_node.ODELayer(keras.layers.Dense(3))])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="track_stats=True"):
        model.fit(X, X, verbose=0, callbacks=[keras_node.SolverMonitor()])
    with pytest.raises(ValueError, match="max_failed=2"):
        keras_node.SolverMonitor(max_failed=2)


def test_odeint_takes_no_part_unless_asked():
    assert (
        not tf.function(lambda: keras_node.odeint(lambda y: -y, tf.ones(2), [0.0, 1.0]).ys)
        .get_concrete_function()
        .variables
    )


def test_layers_of_one_name_are_refused_by_the_monitor():
    parts = [ode_model(solver="euler"), ode_model(solver="euler")]
    model = keras.Sequential([keras.Input((3,)), *parts])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"different names\. Received: several layers 'ode'"):
        model.fit(X, X, verbose=0, callbacks=[keras_node.SolverMonitor()])


@pytest.mark.parametrize("training", [None, True])
def test_a_layer_inside_a_field_cannot_count(training):
    inner = keras.Sequential([keras_node.ODELayer(keras.layers.Dense(3), track_stats=True, name="inner")])
    with pytest.raises(ValueError, match=r"leave out its `track_stats`.*layer 'inner'"):
        keras_node.ODELayer(inner)(X, training=training)


def test_names_in_the_logs_begin_with_that_of_the_layer():
    options = {"track_stats": True, "name": "mine"}
    rnn = keras_node.ODERNN(keras.layers.GRUCell(3), keras.layers.Dense(3), **options)
    flow = keras_node.ContinuousFlow(2, solver="euler", **options)
    for layer in (keras_node.NeuralCDE(3, **options), keras_node.ODELayer(keras.layers.Dense(3), **options), flow):
        assert "mine_steps" in {metric.name for metric in layer.metrics}
    kinds = ("evaluations", "steps", "rejected", "bound_by_stability", "failed")
    assert {metric.name for metric in rnn.metrics} == {f"mine_cell_{kind}" for kind in kinds}
    flow.compile("sgd")
    assert flow.fit(X[:, :2], verbose=0).history["mine_steps"] == [10]
