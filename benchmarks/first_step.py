"""What comes before training: processor seconds until the first epoch ends, beside a plain Keras layer.

    python benchmarks/first_step.py             # every case, in a process of its own
    python benchmarks/first_step.py --case "ODERNN, default" --profile

The data are those of a small study: 249 series of 16 observations with 26 channels, in batches of 32, of which the last
has 25. `--profile` prints which functions take the time while TensorFlow traces.
"""

import argparse
import cProfile
import os
import pathlib
import pstats
import subprocess
import sys
import time

UNITS, FEATURES, MOMENTS, SERIES, BATCH = 16, 26, 16, 249, 32
RECURRENT = {
    "keras.layers.GRU": None,
    "ODERNN, default": {},
    "ODERNN, jit_compile=False": {"jit_compile": False},
    "ODERNN, jit_compile=True": {"jit_compile": True},
    "ODERNN, tsit5": {"solver": "tsit5"},
    "ODERNN, checkpointed": {"gradient": "checkpointed"},
    "ODERNN, checkpointed, jit_compile=False": {"gradient": "checkpointed", "jit_compile": False},
}
DEEP = {
    "keras.layers.Dense": None,
    "ODELayer, default": {},
    "ODELayer, jit_compile=False": {"jit_compile": False},
    "ODELayer, jit_compile=True": {"jit_compile": True},
    "ODELayer, tsit5": {"solver": "tsit5"},
    "ODELayer, tsit5, jit_compile=False": {"solver": "tsit5", "jit_compile": False},
    "ODELayer, checkpointed": {"gradient": "checkpointed"},
    "ODELayer, checkpointed, jit_compile=False": {"gradient": "checkpointed", "jit_compile": False},
}


DRIVEN = "ODELayer, driven by a path"
MODELS = ("ContinuousFlow", "LatentODE", "DynamicsModel")


def without_targets(name):
    """A model that brings its own loss, before it has weights, and the data for it."""
    import numpy as np

    import keras_node

    rng = np.random.default_rng(0)
    values = rng.normal(size=(SERIES, MOMENTS, 4)).astype("float32")
    times = np.cumsum(rng.exponential(size=(SERIES, MOMENTS)), axis=1).astype("float32")
    if name == "ContinuousFlow":
        return keras_node.ContinuousFlow(4, solver="bosh3", trace="hutchinson"), values[:, 0]
    if name == "LatentODE":
        return keras_node.LatentODE(4, units=UNITS, solver="bosh3"), (times, values, np.ones_like(values, bool))
    return keras_node.DynamicsModel(units=UNITS, solver="bosh3"), (times, values)


def recurrent(options):
    """A network for series, and its inputs."""
    import keras
    import numpy as np

    import keras_node

    rng = np.random.default_rng(0)
    x = rng.normal(size=(SERIES, MOMENTS, FEATURES)).astype("float32")
    times = np.cumsum(rng.exponential(size=(SERIES, MOMENTS)), axis=1).astype("float32")
    inputs = keras.Input((MOMENTS, FEATURES)), keras.Input((MOMENTS,))
    if options is None:
        hidden = keras.layers.GRU(UNITS)(inputs[0])
    else:
        field = keras.Sequential([keras.layers.Dense(24, activation="tanh"), keras.layers.Dense(UNITS)])
        layer = keras_node.ODERNN(keras.layers.GRUCell(UNITS), field, **{"solver": "bosh3", **options})
        hidden = layer(*inputs)
    return keras.Model(inputs, keras.layers.Dense(1)(hidden)), (x, times), rng.normal(size=(SERIES, 1))


def deep(options):
    """A network of continuous depth, and its inputs."""
    import keras
    import numpy as np

    import keras_node

    rng = np.random.default_rng(0)
    x = rng.normal(size=(SERIES, FEATURES)).astype("float32")
    field = keras.Sequential([keras.layers.Dense(24, activation="tanh"), keras.layers.Dense(UNITS)])
    layer = field if options is None else keras_node.ODELayer(field, **{"solver": "bosh3", **options})
    return (
        keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(UNITS), layer, keras.layers.Dense(1)]),
        x,
        rng.normal(size=(SERIES, 1)),
    )


def driven():
    """A network whose field reads a path through observations, and its inputs."""
    import keras

    import keras_node

    class Driven(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(UNITS, activation="tanh")

        def call(self, t, y, args):
            x = keras_node.ControlPath(*args)(t)
            return self.dense(keras.ops.concatenate([y, x], axis=-1))

    model, (x, times), y = recurrent(None)
    inputs = model.inputs
    path = keras_node.control_path(inputs[1], inputs[0])
    layer = keras_node.ODELayer(Driven(), t1=10.0, solver=keras_node.RungeKutta("bosh3", num_steps=10))
    start = keras.layers.Dense(UNITS)(inputs[0][:, 0])
    return keras.Model(inputs, keras.layers.Dense(1)(layer(start, args=path))), (x, times), y


def measure(name, profile, build_optimizer):
    """Times one case in this process."""
    if name == DRIVEN:
        (model, x, y), loss = driven(), "mse"
    elif name in MODELS:
        model, x = without_targets(name)
        y, loss = None, None
    else:
        (model, x, y), loss = recurrent(RECURRENT[name]) if name in RECURRENT else deep(DEEP[name]), "mse"
    model.compile("adam", loss)
    if build_optimizer and name not in MODELS:  # `fit` of these does it by itself
        model.optimizer.build(model.trainable_variables)
    profiler = cProfile.Profile()
    start = time.process_time()
    if profile:
        profiler.enable()
    model.fit(x, y, BATCH, epochs=1, verbose=0)
    if profile:
        profiler.disable()
    first = time.process_time() - start
    start = time.process_time()
    model.fit(x, y, BATCH, epochs=24, verbose=0)
    more = time.process_time() - start
    start = time.process_time()
    model.fit(x, y, BATCH, epochs=10, verbose=0)
    later = (time.process_time() - start) / 10
    start = time.process_time()
    model.predict(x, batch_size=BATCH, verbose=0)
    predict = time.process_time() - start
    print(f"| {name} | {first:.1f} | {more:.1f} | {later:.2f} | {predict:.1f} |", flush=True)
    if profile:
        stats = pstats.Stats(profiler, stream=sys.stdout).strip_dirs()
        stats.sort_stats("cumulative").print_stats("keras_node|[a-z_]+.py", 60)
        stats.sort_stats("tottime").print_stats(25)


def main():
    """Runs the cases in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help="one case, in this process")
    parser.add_argument("--contains", default="", help="only cases with this in their name")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--build-optimizer", action="store_true", help="create its variables before `fit`")
    args = parser.parse_args()
    if args.case:
        measure(args.case, args.profile, args.build_optimizer)
        return
    print("| processor seconds | first epoch | next 24 epochs | each later epoch | first predict |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    flags = ["--build-optimizer"] if args.build_optimizer else []
    for name in [*RECURRENT, *DEEP, DRIVEN, *MODELS]:
        if args.contains in name:
            subprocess.run(
                [sys.executable, pathlib.Path(__file__), "--case", name, *flags],
                env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
                stderr=subprocess.DEVNULL,
                check=True,
            )


if __name__ == "__main__":
    main()
