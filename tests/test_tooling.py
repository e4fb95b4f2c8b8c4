"""Tools on models with layers of ours: pictures, summaries, search, LoRA, quantization, safe loading, AutoGraph."""

import base64
import inspect
import io
import json
import marshal
import re
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_node

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = np.sin(X[:, :2])
TIGHT = keras_node.RungeKutta("tsit5", rtol=1e-6, atol=1e-7)


def mlp():
    return keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(4)], name="field")


def classifier(vector_field=None, **options):
    keras.utils.set_random_seed(0)
    layer = keras_node.ODELayer(vector_field or mlp(), name="ode", **options)
    return keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(2)])


def recurrent(vector_field=None):
    x, times = keras.Input((3, 2)), keras.Input((3,))
    cell = keras.layers.GRUCell(4)
    return keras.Model([x, times], keras_node.ODERNN(cell, vector_field or mlp(), name="ode")(x, times))


@pytest.mark.parametrize("make", [classifier, recurrent])
def test_summary_counts_the_weights_of_the_field(make):
    lines, model = [], make()
    model.summary(expand_nested=True, print_fn=lines.append)
    text = "\n".join(lines)
    cell = 3 * (4 * 2 + 4 * 4 + 2 * 4) if make is recurrent else 0
    assert re.search(rf"\b{4 * 8 + 8 + 8 * 4 + 4 + cell} │", text)
    assert f"ode ({'ODERNN' if make is recurrent else 'ODELayer'})" in text


@pytest.mark.parametrize("make", [classifier, recurrent])
def test_a_model_is_drawn(make):
    pytest.importorskip("pydot")
    dot = keras.utils.model_to_dot(make(), show_shapes=True, expand_nested=True).to_string()
    assert "ODERNN" in dot if make is recurrent else "ODELayer" in dot


def test_a_clone_of_a_recurrent_model_has_weights_of_its_own():
    model = recurrent()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    inputs = [X[:, :3, None] * np.ones(2, "float32"), np.cumsum(X[:, :3] ** 2, axis=1)]
    np.testing.assert_array_equal(clone(inputs), model(inputs))
    assert not {id(v) for v in clone.variables} & {id(v) for v in model.variables}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:keras_tuner")
def test_keras_tuner_searches_over_solver_and_tolerance(tmp_path):
    keras_tuner = pytest.importorskip("keras_tuner")
    pytest.importorskip("tensorboard")  # Keras Tuner imports it for every trial
    solvers = []

    def build(hp):
        method = hp.Choice("method", ["bosh3", "tsit5"])
        solver = keras_node.RungeKutta(method, rtol=hp.Float("rtol", 1e-3, 1e-1, sampling="log"))
        solvers.append((solver.method, solver.rtol))
        model = classifier(solver=solver)
        model.compile("adam", "mse", run_eagerly=True)
        return model

    tuner = keras_tuner.RandomSearch(build, "loss", max_trials=3, seed=0, directory=tmp_path, overwrite=True)
    tuner.search(X, Y, epochs=1, verbose=0)
    assert len(set(solvers)) >= 3
    best = tuner.get_best_hyperparameters()[0]
    assert (best["method"], best["rtol"]) in solvers
    losses = [trial.score for trial in tuner.oracle.trials.values()]
    assert len(losses) == 3 and tuner.oracle.get_best_trials()[0].score == min(losses)


def test_lora_inside_a_field_trains_its_own_weights_only(tmp_path):
    model, exact = (classifier(solver=TIGHT, gradient=gradient) for gradient in ("backsolve", "direct"))
    frozen = [v.numpy() for v in model.layers[0].vector_field.trainable_variables[::2]]
    for m in (model, exact):
        for dense in m.layers[0].vector_field.layers:
            dense.enable_lora(2)
    rng = np.random.default_rng(0)
    exact.set_weights([w if np.any(w) else 0.1 * rng.normal(size=w.shape) for w in exact.get_weights()])
    model.set_weights(exact.get_weights())
    gradients = []
    for m in (model, exact):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((m(X) - Y) ** 2)
        names = [v.path.split("/")[-1] for v in m.trainable_variables]
        gradients.append(tape.gradient(loss, [v.value for v in m.trainable_variables]))
    assert names == ["bias", "lora_kernel_a", "lora_kernel_b"] * 2 + ["kernel", "bias"]
    for ours, theirs in zip(*gradients, strict=True):
        assert np.any(theirs)
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.max(np.abs(theirs)))

    model.compile("adam", "mse", jit_compile=False)
    before = model.get_weights()
    losses = model.fit(X, Y, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    kept = [w for w, new in zip(before, model.get_weights(), strict=True) if np.array_equal(w, new)]
    assert len(kept) == len(frozen)
    for kernel, w in zip(frozen, kept, strict=True):
        np.testing.assert_array_equal(kernel, w)
    model.save(tmp_path / "model.keras")  # merges the two, as Keras does
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(X, verbose=0), model.predict(X, verbose=0), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize`")
def test_a_model_quantized_to_int8_integrates_its_quantized_field(tmp_path):
    model = classifier(solver="rk4")
    exact = model.predict(X, verbose=0)
    field, head = model.layers[0].vector_field, model.layers[1]
    model.quantize("int8")
    assert {layer.dtype_policy.name for layer in (*field.layers, head)} == {"int8_from_float32"}
    # Euler's steps by hand through the quantized layers.
    model.layers[0].solver = keras_node.RungeKutta("euler", num_steps=4)
    y = X
    for _ in range(4):
        y = y + field(y) / 4
    np.testing.assert_allclose(model(X), head(y), atol=1e-5)
    model.layers[0].solver = keras_node.RungeKutta("rk4", num_steps=10)
    quantized = model.predict(X, verbose=0)
    assert 0 < np.max(np.abs(quantized - exact)) < 0.05 * np.max(np.abs(exact))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(X, verbose=0), quantized, atol=1e-6)


@pytest.mark.parametrize("make", [classifier, recurrent])
def test_a_field_that_is_a_lambda_is_refused_in_safe_mode(make, tmp_path):
    with pytest.warns(UserWarning, match="lambda"):
        make(lambda y: -y).save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="lambda"):
        keras.models.load_model(tmp_path / "model.keras")


def test_a_field_that_is_a_function_nobody_registered_is_refused(tmp_path):
    def nobodys_decay(y):
        return -y

    model = classifier(nobodys_decay)
    model.save(tmp_path / "model.keras")
    with pytest.raises(TypeError, match="nobodys_decay"):
        keras.models.load_model(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects={"nobodys_decay": nobodys_decay})
    np.testing.assert_array_equal(loaded(X), model(X))


@pytest.mark.parametrize("part", ["vector_field", "solver", "gradient"])
def test_python_planted_in_a_file_is_not_run(part, tmp_path):
    path, ran = tmp_path / "model.keras", tmp_path / "ran"
    classifier().save(path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    config = json.loads(members["config.json"])
    planted = (lambda: open(ran, "w")).__code__  # noqa: SIM115
    code = base64.b64encode(marshal.dumps(planted)).decode()
    for layer in config["config"]["layers"]:
        if layer["class_name"] == "ODELayer":
            layer["config"][part] = {"class_name": "__lambda__", "config": {"code": code, "defaults": None}}
    members["config.json"] = json.dumps(config).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    path.write_bytes(buffer.getvalue())
    with pytest.raises((ValueError, TypeError)):
        keras.models.load_model(path)
    assert not ran.exists()


SERIES = tf.ones((2, 3, 4))
TIMES = tf.constant([[0.0, 1.0, 2.0]] * 2)
EULER = keras_node.RungeKutta("euler", num_steps=1)


def layer(field):
    return keras_node.ODELayer(field, solver=EULER)


def recurrent_layer(field):
    return keras_node.ODERNN(keras.layers.GRUCell(4), field, solver=EULER)


def cde(field):
    return keras_node.NeuralCDE(4, keras.Sequential([field, keras.layers.Dense(4 * 5)]), solver=EULER)


def flow(field):
    return keras_node.ContinuousFlow(4, field, solver=EULER)


def latent_ode(field):
    return keras_node.LatentODE(4, vector_field=field, solver=EULER)


def dynamics_model(field):
    return keras_node.DynamicsModel(field, solver=EULER)


@pytest.mark.parametrize(
    ("make", "method", "arguments"),
    [
        (layer, "__call__", (X,)),
        (recurrent_layer, "__call__", (SERIES, TIMES)),
        (cde, "__call__", (SERIES, TIMES)),
        (flow, "log_prob", (X,)),
        (flow, "sample", (2,)),
        (flow, "forward", (X,)),
        (flow, "inverse", (X,)),
        (flow, "compute_loss", (X,)),
        (latent_ode, "reconstruct", ((TIMES, SERIES),)),
        (latent_ode, "extrapolate", ((TIMES, SERIES), TIMES)),
        (latent_ode, "decode", (SERIES[:, 0], TIMES)),
        (latent_ode, "sample", (2, TIMES[0])),
        (latent_ode, "train_step", (((TIMES, SERIES),),)),
        (dynamics_model, "forecast", (SERIES[:, 0], TIMES)),
        (dynamics_model, "test_step", (((TIMES, SERIES),),)),
    ],
)
def test_autograph_rewrites_the_users_function_alone(make, method, arguments):
    """To rewrite and compile Python takes longer than to trace it, and nothing of ours needs it."""

    class Looks(keras.layers.Dense):
        def call(self, y):
            generated = [frame.function for frame in inspect.stack() if "autograph_generated" in frame.filename]
            frames.append([name for name in generated if name.startswith("tf__")])  # and no parts of these functions
            return super().call(y)

    frames, model = [], make(Looks(4))
    if make is latent_ode:
        model((TIMES, SERIES))
    if hasattr(model, "compile"):
        model.compile("adam")

    def step():
        return getattr(model, method)(*arguments)

    frames.clear()
    tf.function(step)()
    # A subclass may override what these methods call, with a Python `if` over tensors. They are rewritten for its sake.
    templates = {"tf__" + name for name in ("train_step", "test_step", "compute_loss", "sample_losses")}
    templates |= {"tf__sample", "tf__extrapolate"} if make is latent_ode else set()
    assert frames and {name for names in frames for name in names} <= {"tf__step", *templates}


@pytest.mark.parametrize(
    ("overridden", "method"),
    [("sample_losses", "compute_loss"), ("sample_losses", "train_step"), ("compute_loss", "test_step")],
)
def test_autograph_rewrites_what_a_subclass_overrides(overridden, method):
    class Doubled(keras_node.DynamicsModel):
        def sample_losses(self, *args, **kwargs):
            losses, measures = super().sample_losses(*args, **kwargs)
            if overridden == "sample_losses":
                losses = 2 * losses if tf.reduce_sum(losses) > 0 else losses
            return losses, measures

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if overridden == "compute_loss":
                self.seen.assign(2 * loss if loss > 0 else loss)
            return loss

    results = []
    for make in (keras_node.DynamicsModel, Doubled):
        model = make(lambda y: -y, solver=EULER)
        model.seen = tf.Variable(0.0)
        model.compile("sgd")
        model((TIMES, SERIES))

        @tf.function
        def step(model=model):
            data = (TIMES, SERIES)
            return model.compute_loss(data) if method == "compute_loss" else getattr(model, method)((data,))["loss"]

        results += [float(step()), float(model.seen)]
    if overridden == "sample_losses":
        assert results[2] == pytest.approx(2 * results[0])
    else:
        assert results[3] == pytest.approx(2 * results[0])


def test_a_method_may_be_an_argument_of_a_tf_function():
    model = flow(keras.layers.Dense(4))
    expected = model.log_prob(X)
    np.testing.assert_allclose(tf.function(lambda method, x: method(x))(model.log_prob, X), expected, rtol=1e-6)
    np.testing.assert_allclose(tf.function(model.log_prob)(X), expected, rtol=1e-6)
    assert list(inspect.signature(model.log_prob).parameters) == ["x", "condition"]
