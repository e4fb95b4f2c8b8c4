"""A short use of all that leans on the versions of Keras and TensorFlow, for `make test-minimal`, on the oldest ones.

`make test` leaves this file out, since what it uses has stricter tests elsewhere.
"""

import keras
import numpy as np
import tensorflow as tf

import keras_node

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 5, 3)).astype("float32")
TIMES = np.cumsum(RNG.uniform(0.1, 0.5, size=(16, 5)), axis=1).astype("float32")


def field(units=4):
    return keras.Sequential([keras.layers.Dense(6, activation="tanh"), keras.layers.Dense(units)])


def model():
    x, times = keras.Input((5, 3), name="x"), keras.Input((5,), name="times")
    series = keras_node.ODERNN(keras.layers.GRUCell(4), field(), solver="midpoint")(x, times)
    depth = keras_node.ODELayer(field(), solver="bosh3", gradient="checkpointed")(series)
    return keras.Model([x, times], keras.layers.Dense(1)(depth))


def test_a_model_trains_is_saved_and_is_exported(tmp_path):
    keras.utils.set_random_seed(0)
    trained = model()
    trained.compile("adam", "mse", jit_compile=False)
    losses = trained.fit([X, TIMES], X[:, -1, :1], epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    expected = trained.predict([X, TIMES], verbose=0)
    trained.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict([X, TIMES], verbose=0), expected, atol=1e-6)
    trained.export(tmp_path / "served")
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve([X, TIMES]), expected, atol=1e-5)


def test_gradients_through_xla_and_dropout_are_those_of_direct():
    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.layers.Dense(6, activation="tanh"), keras.layers.Dropout(0.5), keras.layers.Dense(3)])
    net.build((None, 3))
    state = net.layers[1].seed_generator.state
    results = []
    for gradient in ("direct", "backsolve", "checkpointed"):

        @tf.function(jit_compile=gradient != "direct")
        def run(gradient=gradient):
            with tf.GradientTape() as tape:
                options = {"solver": keras_node.RungeKutta("bosh3", num_steps=20), "training": True}
                ys = keras_node.odeint(net, X[:, 0], [0.0, 1.0], gradient=gradient, **options).ys
                loss = tf.reduce_sum(ys[-1] ** 2)
            return tape.gradient(loss, [v.value for v in net.trainable_variables])

        start = state.numpy()
        results.append(run())
        state.assign(start)
    # Another compiler draws other noise; the two of one compiler have the same.
    for ours, theirs in zip(results[1], results[2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.max(np.abs(theirs)))
    assert all(np.any(g) for g in results[0])


def test_models_without_targets_train():
    flow = keras_node.ContinuousFlow(2, keras.layers.Dense(2, activation="tanh"), solver="midpoint")
    flow.compile("adam", jit_compile=False)
    assert np.isfinite(flow.fit(X[:, 0, :2], verbose=0).history["loss"]).all()
    latent = keras_node.LatentODE(2, solver="midpoint")
    latent.compile("adam", jit_compile=False)
    assert np.isfinite(latent.fit((TIMES, X, np.ones((16, 5, 3), bool)), verbose=0).history["loss"]).all()
    cde = keras_node.NeuralCDE(4)
    assert cde(X, TIMES).shape == (16, 4)


def test_dynamics_are_learnt_saved_and_forecast(tmp_path):
    times = np.linspace(0, 1, 9)
    values = np.exp(-0.7 * times)[None, :, None] * RNG.uniform(0.5, 2, (4, 1, 2))
    dynamics = keras_node.DynamicsModel(
        units=4, window=4, initial_states="trained", continuity=1.0, solver="midpoint", gradient="reversible"
    )
    dynamics.compile("adam")
    dynamics.fit((times, values), verbose=0, callbacks=[keras_node.GrowingHorizon(2, 4, 1)])
    dynamics.save(tmp_path / "dynamics.keras")
    loaded = keras.models.load_model(tmp_path / "dynamics.keras")
    expected = dynamics.forecast(values[:, 0], times)
    np.testing.assert_allclose(loaded.forecast(values[:, 0], times), expected, rtol=1e-5)
    np.testing.assert_allclose(loaded.predict((times, values), verbose=0), expected, rtol=1e-4)


def test_flow_matching_optimal_transport_and_penalties_on_paths():
    flow = keras_node.ContinuousFlow(
        2, solver="midpoint", objective="flow_matching", coupling="optimal_transport", seed=0
    )
    flow.compile("adam")
    assert np.isfinite(flow.fit(X[:, 0, :2], verbose=0).history["loss"][0])
    layer = keras_node.ODELayer(field(3), solver="bosh3", kinetic_energy=0.1, local_error=0.1)
    penalized = keras.Sequential([keras.Input((3,)), layer])
    penalized.compile("adam", "mse")
    logs = penalized.fit(X[:, 0], X[:, 1], verbose=0).history
    assert logs["loss"][0] > penalized.evaluate(X[:, 0], X[:, 1], verbose=0)
