"""Ways to run `fit`: several devices, `tf.data`, several steps an execution; all train to the same losses."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node

# Logical devices must be made before TensorFlow is used, so this runs in a process of its own.
SCRIPT = """
import json, numpy as np, tensorflow as tf, keras, keras_node
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
x = np.random.default_rng(0).normal(size=(32, 5, 4)).astype("float32")
times = np.cumsum(np.random.default_rng(1).uniform(size=(32, 5)), 1).astype("float32")

# Everything moves at the same speed, so the kinetic energy is the same at every random time.
class Drift(keras.layers.Layer):
    def build(self, shape):
        self.speed = self.add_weight(shape=shape[-1:], initializer="ones")

    def call(self, y):
        return self.speed + keras.ops.zeros_like(y)

def losses():
    keras.utils.set_random_seed(0)
    inputs = [keras.Input((5, 4)), keras.Input((5,))]
    solver = keras_node.RungeKutta("heun", num_steps=2)
    h = keras_node.ODERNN(keras.layers.GRUCell(4), keras.layers.Dense(4, "tanh"), solver=solver)(*inputs)
    h = keras_node.ODELayer(keras.layers.Dense(4, "tanh"), solver=solver, track_stats=True)(h)
    h = keras_node.ODELayer(Drift(), solver=solver, kinetic_energy=0.1, local_error=0.1)(h)
    model = keras.Model(inputs, h)
    model.compile("sgd", "mse", jit_compile=False)
    return model.fit([x, times], x[:, -1], 16, epochs=2, shuffle=False, verbose=0).history["loss"]

one = losses()
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    two = losses()
print(json.dumps([one, two]))
"""


def test_two_devices_train_like_one():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    one, two = json.loads(result.stdout.splitlines()[-1])
    np.testing.assert_allclose(two, one, rtol=1e-6)
    assert one[1] < one[0]


# Batches of seven samples end with three, of nine with one: two devices get two and one of them, or one and none.
LIKELIHOODS = """
import json, sys, numpy as np, tensorflow as tf, keras, keras_node
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
rng = np.random.default_rng(0)
weights = rng.uniform(size=9).astype("float32")
regularizer = keras.regularizers.L2(0.1)

def flow():
    field = keras.layers.Dense(2, "tanh", kernel_regularizer=regularizer)
    solver = keras_node.RungeKutta("heun", num_steps=2)
    options = {"kinetic_energy": 0.1, "jacobian_norm": 0.2, "seed": 0, "jit_compile": False}
    return keras_node.ContinuousFlow(2, field, solver=solver, **options)

points = rng.normal(size=(9, 2)).astype("float32")

@keras.saving.register_keras_serializable()
class Recalls(keras.layers.Layer):
    # Told the data as a condition, it gives `x - z + x W`, so that the loss is the same whatever noise is drawn.
    def build(self, t_shape, x_shape, condition_shape):
        self.kernel = self.add_weight(shape=(2, 2), initializer="ones", regularizer=regularizer)

    def call(self, t, x, condition):
        return (condition - x) / (1 - t) + condition @ self.kernel

def flow_matching():
    options = {"objective": "flow_matching", "solver": "euler", "seed": 0, "jit_compile": False}
    return keras_node.ContinuousFlow(2, Recalls(), **options)

times = np.cumsum(rng.uniform(0.1, 0.6, size=(9, 2)), axis=1).astype("float32")
series = times, rng.normal(size=(9, 2, 2)).astype("float32"), np.ones((9, 2, 2), "float32")

def latent_ode():
    options = {"units": 4, "solver": keras_node.RungeKutta("midpoint", num_steps=1), "gradient": "direct"}
    model = keras_node.LatentODE(2, vector_field=keras.layers.Dense(2, kernel_regularizer=regularizer), **options)
    model([a[:1] for a in series])
    for parameters, end in zip(model.posterior_parameters.variables, (0.0, -20.0)):
        value = parameters.numpy()  # so narrow a posterior that it does not matter what is drawn
        value[..., 2:] = end
        parameters.assign(value)
    return model

def train(make, data, eagerly):
    keras.utils.set_random_seed(0)
    model = make()
    model.compile(keras.optimizers.SGD(0.01), jit_compile=False, run_eagerly=eagerly)
    results = []
    for count in counts:
        x = tuple(a[:count] for a in data) if isinstance(data, tuple) else data[:count]
        options = {"batch_size": 4, "sample_weight": weights[:count], "shuffle": False, "verbose": 0}
        results += model.fit(x, **options).history.values()
    return np.concatenate([np.ravel(a) for a in (*results, *model.get_weights())]).tolist()

counts = [7, 9]  # in batches of 4: the last one leaves a replica with fewer samples, or with none
cases = {"flow": (flow, points), "latent_ode": (latent_ode, series), "flow_matching": (flow_matching, (points, points))}
case = cases[sys.argv[1]]
one = train(*case, eagerly=True)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    two = train(*case, eagerly=False)
print(json.dumps([one, two]))
"""


@pytest.mark.parametrize("kind", ["flow", "latent_ode", "flow_matching"])
def test_likelihoods_train_like_on_one_device_also_in_partial_batches(kind):
    """Losses, measures and weights, with sample weights, regularizers and energies."""
    command = [sys.executable, "-c", LIKELIHOODS, kind]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    one, two = json.loads(result.stdout.splitlines()[-1])
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)
    assert np.all(np.isfinite(one))


NOISE = """
import json, numpy as np, tensorflow as tf, keras, keras_node
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    field = keras.layers.Dense(1, kernel_initializer="zeros")
    options = {"objective": "flow_matching", "coupling": "optimal_transport", "solver": "euler", "seed": 0}
    model = keras_node.ContinuousFlow(1, field, **options)
    model.build((None, 1))

@tf.function
def noise():
    losses = strategy.run(lambda: model.sample_losses(tf.zeros((20, 1)), None, None, training=True)[0])
    return strategy.experimental_local_results(losses)  # the squares of the noise

print(json.dumps([np.sort(one).tolist() for _ in range(2) for one in noise()]))
"""


def test_replicas_draw_their_own_noise_for_flow_matching():
    result = subprocess.run([sys.executable, "-c", NOISE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    draws = np.array(json.loads(result.stdout.splitlines()[-1]))
    assert draws.shape == (4, 20) and np.unique(draws).size == draws.size
    assert 0.3 < np.mean(draws) < 2


@pytest.mark.parametrize("kind", ["ODELayer", "ODERNN"])
def test_tf_data_and_several_steps_an_execution_change_nothing(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5, 4)).astype("float32")
    times = np.cumsum(rng.uniform(size=(40, 5)), 1).astype("float32")
    y = x[:, -1]

    def fit(*data, steps=1):
        keras.utils.set_random_seed(0)
        inputs = [keras.Input((5, 4)), keras.Input((5,))]
        field = keras.layers.Dense(4, "tanh")
        options = {"solver": keras_node.RungeKutta("heun", num_steps=2), "jit_compile": False}
        if kind == "ODELayer":
            h = keras_node.ODELayer(field, **options)(inputs[0][:, -1])
        else:
            h = keras_node.ODERNN(keras.layers.GRUCell(4), field, **options)(*inputs)
        model = keras.Model(inputs, h)
        model.compile("adam", "mse", jit_compile=False, steps_per_execution=steps)
        return model.fit(*data, epochs=2, shuffle=False, verbose=0).history["loss"]

    # Forty are five batches: the last of three steps at once finds two.
    expected = fit([x, times], y, 8)
    dataset = tf.data.Dataset.from_tensor_slices(((x, times), y)).batch(8).prefetch(2)
    np.testing.assert_allclose(fit(dataset), expected, rtol=1e-6)
    np.testing.assert_allclose(fit(dataset, steps=3), expected, rtol=1e-6)
    assert expected[1] < expected[0]
