"""Trains models on one device and on two, and prints their losses and weights; `test_distribute.py` runs this script.

Logical devices must be made before TensorFlow is used, so all of this runs in a separate process.
"""

import contextlib
import json

import keras
import numpy as np
import tensorflow as tf

import keras_node

REGULARIZER = keras.regularizers.L2(0.1)
COUNTS = [7, 9]  # in batches of 4: the last one leaves a device with fewer samples, or with none
rng = np.random.default_rng(0)
weights = rng.uniform(size=9).astype("float32")
points = rng.normal(size=(9, 2)).astype("float32")
times = np.cumsum(rng.uniform(0.1, 0.6, size=(9, 2)), axis=1).astype("float32")
series = times, rng.normal(size=(9, 2, 2)).astype("float32"), np.ones((9, 2, 2), "float32")


class Drift(keras.layers.Layer):
    """Everything moves at the same speed, so the kinetic energy is the same at every random time."""

    def build(self, shape):
        self.speed = self.add_weight(shape=shape[-1:], initializer="ones")

    def call(self, y):
        return self.speed + keras.ops.zeros_like(y)


TIMES = np.linspace(0, 1, 5, dtype="float32")
TRAJECTORIES = np.random.default_rng(4).normal(size=(8, 5, 2)).astype("float32")


def layers():
    """The losses of a model of several layers."""
    x = np.random.default_rng(0).normal(size=(32, 5, 4)).astype("float32")
    times = np.cumsum(np.random.default_rng(1).uniform(size=(32, 5)), 1).astype("float32")
    keras.utils.set_random_seed(0)
    inputs = [keras.Input((5, 4)), keras.Input((5,))]
    solver = keras_node.RungeKutta("heun", num_steps=2)
    h = keras_node.ODERNN(keras.layers.GRUCell(4), keras.layers.Dense(4, "tanh"), solver=solver)(*inputs)
    h = keras_node.ODELayer(keras.layers.Dense(4, "tanh"), solver=solver, track_stats=True)(h)
    h = keras_node.ODELayer(Drift(), solver=solver, kinetic_energy=0.1, local_error=0.1)(h)
    model = keras.Model(inputs, h)
    model.compile("sgd", "mse", jit_compile=False)
    return model.fit([x, times], x[:, -1], 16, epochs=2, shuffle=False, verbose=0).history["loss"]


def flow():
    field = keras.layers.Dense(2, "tanh", kernel_regularizer=REGULARIZER)
    solver = keras_node.RungeKutta("heun", num_steps=2)
    options = {"kinetic_energy": 0.1, "jacobian_norm": 0.2, "seed": 0, "jit_compile": False}
    return keras_node.ContinuousFlow(2, field, solver=solver, **options)


@keras.saving.register_keras_serializable()
class Recalls(keras.layers.Layer):
    """Told the data as a condition, it gives `x - z + x W`, so that the loss is the same whatever noise is drawn."""

    def build(self, t_shape, x_shape, condition_shape):
        self.kernel = self.add_weight(shape=(2, 2), initializer="ones", regularizer=REGULARIZER)

    def call(self, t, x, condition):
        return (condition - x) / (1 - t) + condition @ self.kernel


def flow_matching():
    options = {"objective": "flow_matching", "solver": "euler", "seed": 0, "jit_compile": False}
    return keras_node.ContinuousFlow(2, Recalls(), **options)


def latent_ode():
    options = {"units": 4, "solver": keras_node.RungeKutta("midpoint", num_steps=1), "gradient": "direct"}
    model = keras_node.LatentODE(2, vector_field=keras.layers.Dense(2, kernel_regularizer=REGULARIZER), **options)
    model([a[:1] for a in series])
    for parameters, end in zip(model.posterior_parameters.variables, (0.0, -20.0), strict=True):
        value = parameters.numpy()  # so narrow a posterior that it does not matter what is drawn
        value[..., 2:] = end
        parameters.assign(value)
    return model


def train(make, data, eagerly):
    """The losses, measures and weights of a model that needs no targets."""
    keras.utils.set_random_seed(0)
    model = make()
    model.compile(keras.optimizers.SGD(0.01), jit_compile=False, run_eagerly=eagerly)
    results = []
    for count in COUNTS:
        x = tuple(a[:count] for a in data) if isinstance(data, tuple) else data[:count]
        options = {"batch_size": 4, "sample_weight": weights[:count], "shuffle": False, "verbose": 0}
        results += model.fit(x, **options).history.values()
    return np.concatenate([np.ravel(a) for a in (*results, *model.get_weights())]).tolist()


def dynamics(scope):
    """The losses and weights of a `DynamicsModel` that is made in a scope, and trained outside it."""
    keras.utils.set_random_seed(0)
    solver = keras_node.RungeKutta("midpoint", num_steps=1)
    with scope:
        model = keras_node.DynamicsModel(units=2, solver=solver, window=2, initial_states="trained", jit_compile=False)
        model.compile(keras.optimizers.SGD(0.01), jit_compile=False)
    history = model.fit((TIMES, TRAJECTORIES), batch_size=4, epochs=2, shuffle=False, verbose=0).history
    return np.concatenate([np.ravel(a) for a in (*history.values(), *model.get_weights())]).tolist()


def noise(strategy):
    """The noise that two devices draw in two steps of flow matching."""
    with strategy.scope():
        field = keras.layers.Dense(1, kernel_initializer="zeros")
        options = {"objective": "flow_matching", "coupling": "optimal_transport", "solver": "euler", "seed": 0}
        model = keras_node.ContinuousFlow(1, field, **options)
        model.build((None, 1))

    @tf.function
    def draw():
        losses = strategy.run(lambda: model.sample_losses(tf.zeros((20, 1)), None, None, training=True)[0])
        return strategy.experimental_local_results(losses)  # the squares of the noise

    return [np.sort(one).tolist() for _ in range(2) for one in draw()]


def main():
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    one = layers()
    with strategy.scope():
        two = layers()
    results = {"layers": [one, two], "noise": noise(strategy)}
    results["dynamics"] = [dynamics(scope) for scope in (contextlib.nullcontext(), strategy.scope())]
    for make, data in ((flow, points), (latent_ode, series), (flow_matching, (points, points))):
        one = train(make, data, eagerly=True)
        with strategy.scope():
            two = train(make, data, eagerly=False)
        results[make.__name__] = [one, two]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
