"""What the models that bring their own loss share, by a model whose loss and gradient have a closed form."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_node import ContinuousFlow, LatentODE, RungeKutta
from keras_node.arguments import non_negative_integer, positive_integer
from keras_node.models.likelihood_model import LikelihoodModel

RATE = 0.1
X = np.random.default_rng(0).normal(size=(10, 1)).astype("float32")
WEIGHTS = np.random.default_rng(1).uniform(size=10).astype("float32")


class Gaussian(LikelihoodModel):
    """The density of numbers with a mean to learn and the variance 1."""

    measures = ("distance",)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mean = self.add_weight(name="mean", initializer="ones", regularizer=keras.regularizers.L2(0.5))

    def call(self, x):
        return (x - self.mean)[..., 0]

    def sample_losses(self, x, y, y_pred, training):
        distance = self(x) if y is None else self(x - y)
        return 0.5 * distance**2, {"distance": (ops.abs(distance), ops.ones_like(distance))}


def loss(x, mean=1.0, weights=1.0):
    return np.mean(weights * 0.5 * (x[:, 0] - mean) ** 2) + 0.5 * mean**2


def step(x, mean=1.0, weights=1.0):
    return mean - RATE * (np.mean(weights * (mean - x[:, 0])) + mean)


def gaussian(**kwargs):
    model = Gaussian()
    model.compile(keras.optimizers.SGD(RATE), **{"jit_compile": False, **kwargs})
    return model


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return X, {"sample_weight": WEIGHTS}  # Keras takes no `None` here


def dataset():
    return tf.data.Dataset.from_tensors((X, WEIGHTS)).map(lambda x, w: (x, None, w))


DATA = {
    "arrays": lambda: {"x": X, "sample_weight": WEIGHTS, "batch_size": 10},
    "tensors": lambda: {"x": tf.constant(X), "sample_weight": tf.constant(WEIGHTS), "batch_size": 10},
    "a column of weights": lambda: {"x": X, "sample_weight": WEIGHTS[:, None], "batch_size": 10},
    "a list of weights": lambda: {"x": X, "sample_weight": WEIGHTS.tolist(), "batch_size": 10},
    "arrays and targets": lambda: {"x": X + 2, "y": 0 * X + 2, "sample_weight": WEIGHTS, "batch_size": 10},
    "tf.data": lambda: {"x": dataset()},
    "generator": lambda: {"x": (batch for batch in [(X, None, WEIGHTS)])},
    "PyDataset": lambda: {"x": Batches()},
}


MODES = {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, "graph") for kind in DATA), ("arrays", "eager"), ("arrays", "xla"), ("tf.data", "xla")]
)
def test_sample_weights_reach_the_loss(kind, mode):
    model = gaussian(**MODES[mode])
    metrics = model.evaluate(**DATA[kind](), verbose=0, return_dict=True)
    np.testing.assert_allclose(metrics["loss"], loss(X, weights=WEIGHTS), rtol=1e-5)
    np.testing.assert_allclose(metrics["distance"], np.average(np.abs(X[:, 0] - 1), weights=WEIGHTS), rtol=1e-5)
    history = model.fit(**DATA[kind](), verbose=0).history
    np.testing.assert_allclose(history["loss"], [loss(X, weights=WEIGHTS)], rtol=1e-5)
    np.testing.assert_allclose(model.mean, step(X, weights=WEIGHTS), rtol=1e-5)


def test_weights_are_batched_and_shuffled_with_their_samples():
    """Each weight picks a sample: a pair torn apart would show in the mean over an epoch."""
    model = gaussian()
    model.optimizer.learning_rate.assign(0.0)
    history = model.fit(X, None, 3, 2, 0, shuffle=True, sample_weight=WEIGHTS).history
    np.testing.assert_allclose(history["loss"], [loss(X, weights=WEIGHTS)] * 2, rtol=1e-5)


@pytest.mark.parametrize("split", [True, False], ids=["validation_split", "validation_data"])
def test_weights_of_validation(split):
    model = gaussian()
    model.optimizer.learning_rate.assign(0.0)
    last = X[6:], None, WEIGHTS[6:]
    options = {"validation_split": 0.4} if split else {"validation_data": last}
    x, weights = (X, WEIGHTS) if split else (X[:6], WEIGHTS[:6])
    history = model.fit(x, sample_weight=weights, verbose=0, **options).history
    np.testing.assert_allclose(history["loss"], [loss(X[:6], weights=WEIGHTS[:6])], rtol=1e-5)
    np.testing.assert_allclose(history["val_loss"], [loss(X[6:], weights=WEIGHTS[6:])], rtol=1e-5)


def test_weights_of_single_batches():
    model = gaussian()
    expected = loss(X, weights=WEIGHTS)
    np.testing.assert_allclose(model.test_on_batch(X, sample_weight=WEIGHTS)[0], expected, rtol=1e-5)
    np.testing.assert_allclose(model.train_on_batch(X, sample_weight=WEIGHTS)[0], expected, rtol=1e-5)
    np.testing.assert_allclose(model.mean, step(X, weights=WEIGHTS), rtol=1e-5)


def test_without_weights_every_sample_counts_alike():
    model = gaussian()
    for mean in (1.0, step(X)):
        np.testing.assert_allclose(model.evaluate(X, batch_size=4, verbose=0)[0], loss(X, mean), rtol=1e-5)
        model.fit(X, batch_size=10, verbose=0)


def test_an_empty_batch_costs_nothing_but_the_regularizers():
    model = Gaussian()
    with tf.GradientTape() as tape:
        value = model.compute_loss(X[:0])
    assert float(value) == 0.5
    assert float(tape.gradient(value, model.mean.value)) == 1.0


def test_what_cannot_be_used_is_refused():
    for name, value in {"loss": "mse", "metrics": ["mae"], "weighted_metrics": ["mae"], "loss_weights": [1.0]}.items():
        with pytest.raises(ValueError, match=f"Gaussian has its own loss and metrics: leave `{name}` out of `compile`"):
            Gaussian().compile("sgd", **{name: value})
    with pytest.raises(ValueError, match=r"leave `loss` out of `compile`. Received: loss='mse'"):
        Gaussian().compile("sgd", "mse")
    for call in (gaussian().fit, gaussian().train_on_batch):
        with pytest.raises(ValueError, match=r"`class_weight` needs targets.*Received: class_weight={0: 1.0}"):
            call(X, class_weight={0: 1.0})
    with pytest.raises(ValueError, match=r"`sample_weight` must have the shape.*sample_weight.shape=\(None, 2\)"):
        gaussian().fit(X, sample_weight=np.ones((10, 2)), verbose=0)
    with pytest.raises(ValueError, match="sample_weights` should not be passed"):  # Keras' own words
        gaussian().fit(tf.data.Dataset.from_tensors(X), sample_weight=WEIGHTS, shuffle=False, verbose=0)


def test_a_metric_of_a_layer_keeps_its_place_in_the_logs():
    class Watched(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.watched = keras.metrics.Mean(name="distance")

        def call(self, x):
            self.watched.update_state(ops.ones(()))
            return x

    model = gaussian()
    model.inside = Watched()
    assert [metric.name for metric in model.metrics] == ["loss", "distance", "distance"]


def test_the_configuration_of_compile_is_saved():
    config = gaussian().get_compile_config()
    model = Gaussian()
    model.compile_from_config(config)
    assert float(model.optimizer.learning_rate) == pytest.approx(RATE)


SOLVER = RungeKutta("midpoint", num_steps=1)


def test_weights_of_a_flow():
    x = np.random.default_rng(2).normal(size=(5, 2)).astype("float32")
    weights = np.array([1, 0, 2, 0.5, 3], "float32")
    model = ContinuousFlow(2, keras.layers.Dense(2, "tanh"), solver=SOLVER, seed=0)
    model.compile(keras.optimizers.SGD(0.0))
    expected = np.mean(-model.log_prob(x) * weights)
    np.testing.assert_allclose(model.fit(x, sample_weight=weights, verbose=0).history["loss"], [expected], rtol=1e-5)
    np.testing.assert_allclose(model.evaluate(x, sample_weight=weights, verbose=0), expected, rtol=1e-5)
    # One condition for several points: a weight for all of them, or one for each.
    several = np.stack([x, 2 * x], axis=1)
    log_prob = model.log_prob(several).numpy()
    for each in (weights, np.stack([weights, 1 - weights], axis=1)):
        expected = np.mean(-log_prob * (each if each.ndim == 2 else each[:, None]))
        found = model.compute_loss(several, sample_weight=each, training=False)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["flow", "flow, tf.data", "series"])
def test_a_step_of_training_is_traced_once(kind):
    # A model that has no weights yet, whose optimizer has no variables yet.
    class Field(keras.layers.Dense):
        def call(self, y):
            traced.append(y)
            return super().call(y)

    traced, field = [], Field(2)
    x = np.random.default_rng(2).normal(size=(4, 3, 2)).astype("float32")
    if kind == "series":
        model = LatentODE(2, units=3, vector_field=field, solver=SOLVER, jit_compile=False)
        data = {"x": (np.tile([0.0, 0.5, 1.0], (4, 1)), x, x > 0)}
    else:
        model = ContinuousFlow(2, field, solver=SOLVER, trace="hutchinson", jit_compile=False)
        data = {"x": x} if kind == "flow" else {"x": tf.data.Dataset.from_tensors(x)}
    model.compile("adam")
    model.fit(**data, epochs=2, verbose=0)
    in_fit = len(traced)
    traced.clear()
    step = tf.function(lambda x: model.train_step((x,)))
    step.get_concrete_function(x=keras.tree.map_structure(tf.constant, data["x"] if kind == "series" else x))
    assert in_fit == len(traced) > 0


def test_weights_of_series_and_their_targets():
    rng = np.random.default_rng(3)
    times = np.sort(rng.uniform(size=(4, 3)), axis=1).astype("float32")
    x, y = ((times, rng.normal(size=(4, 3, 1)).astype("float32"), np.ones((4, 3, 1), bool)) for _ in range(2))
    model = LatentODE(2, units=3, solver=SOLVER, gradient="direct")
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    model(x)
    for parameters, end in zip(model.posterior_parameters.variables, (0.0, -20.0), strict=True):
        value = parameters.numpy()  # so narrow a posterior that it does not matter what is drawn
        value[..., 2:] = end
        parameters.assign(value)
    each = [float(model.compute_loss(*[tuple(a[i : i + 1] for a in s) for s in (x, y)])) for i in range(4)]
    expected = np.mean(np.array(each) * WEIGHTS[:4])
    np.testing.assert_allclose(
        model.evaluate(x, y, sample_weight=WEIGHTS[:4], verbose=0, return_dict=True)["loss"], expected, rtol=1e-4
    )
    logs = model.fit(x, y, sample_weight=WEIGHTS[:4], verbose=0, validation_data=(x, y, 2 * WEIGHTS[:4])).history
    np.testing.assert_allclose([logs["loss"][0], logs["val_loss"][0]], [expected, 2 * expected], rtol=1e-4)


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float32(3)])
def test_integers_may_come_as_floats(value):
    for check in (positive_integer, non_negative_integer):
        assert check("n", value) == 3 and type(check("n", value)) is int
    for model, name in ((ContinuousFlow(value), "event_dim"), (LatentODE(value, units=value), "units")):
        assert type(model.get_config()[name]) is int
    x = np.ones((2, 3), "float32")
    assert ContinuousFlow(value, solver=SOLVER).log_prob(x).shape == (2,)
    z = LatentODE(value, units=value, decoder=keras.layers.Dense(1), solver=SOLVER).sample(2, [0.0, 1.0])
    assert z.shape == (2, 2, 1)


@pytest.mark.parametrize("value", [-1, 1.5, True, "2", None, float("nan"), float("inf"), np.ones(2)])
def test_what_is_no_integer_is_refused(value):
    for check in (positive_integer, non_negative_integer):
        with pytest.raises(ValueError, match=r"`n` must be (a positive integer|an integer, 0 or more)\. Received: n="):
            check("n", value)
    for make, name in (
        (lambda: ContinuousFlow(value), "event_dim"),
        (lambda: LatentODE(value), "latent_dim"),
        (lambda: LatentODE(2, units=value), "units"),
        (lambda: LatentODE(2, kl_annealing_steps=value), "kl_annealing_steps"),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` must be (a positive integer|an integer, 0 or more)"):
            make()
    with pytest.raises(ValueError, match="`n` must be a positive integer"):
        positive_integer("n", 0)
    assert non_negative_integer("n", 0) == 0


@pytest.mark.traced_twice
def test_weights_that_are_made_in_the_first_trace_are_trained():
    class Lazy(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.state_size, self.dense = 3, keras.layers.Dense(3)

        def build(self, shape):
            """The dense layer is built by its first call."""

        def call(self, x, states):
            h = keras.ops.tanh(self.dense(keras.ops.concatenate([x, states[0]], axis=-1)))
            return h, [h]

    x = np.random.default_rng(2).normal(size=(4, 3, 2)).astype("float32")
    model = LatentODE(2, units=3, encoder_cell=Lazy(), vector_field=lambda y: -y, solver=SOLVER)
    model.compile("adam", jit_compile=False)
    model.fit((np.tile([0.0, 0.5, 1.0], (4, 1)), x, np.ones_like(x, bool)), epochs=2, verbose=0)
    kernel = model.encoder.cell.dense.kernel
    assert any(v is kernel for v in model.trainable_variables)
    assert len(model.optimizer.variables) == 2 + 2 * len(model.trainable_variables)
