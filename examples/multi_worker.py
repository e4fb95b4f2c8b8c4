"""Trains a continuous-depth network on several machines with `fit`, including a crash and a restart.

Keras 3 cannot `fit` under `tf.distribute.MultiWorkerMirroredStrategy` (Keras issue 20585). The two reasons have nothing
to do with ODEs, and a few lines avoid both (`AcrossWorkers` and `distributed_model`). After that, `fit` and its
callbacks work as on one machine. A checkpoint is saved after every epoch. If a worker dies, all workers are started
again, as a cluster manager does, and continue after the last complete epoch.

Here the workers are two processes on this machine, and one of them kills itself halfway. A single process trains on the
same global batches, so that you can compare the losses.

    python examples/multi_worker.py            # about a minute on two cores
    python examples/multi_worker.py --quick    # a few epochs

To use your own machines, start the script on each, with `TF_CONFIG` set and a `--directory` that all can access.
"""

import argparse
import csv
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import keras
import matplotlib
import tensorflow as tf
from sklearn.datasets import load_digits

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH = 64  # of all workers together
TIME_LIMIT = 240  # seconds for workers to finish


class AcrossWorkers(keras.Model):
    """A model with logs that Keras can average over workers: it reduces their axis 0, which scalars do not have."""

    def train_step(self, data):
        return {name: value[None] for name, value in super().train_step(data).items()}

    def test_step(self, data):
        return {name: value[None] for name, value in super().test_step(data).items()}


def network():
    """Returns a network with an ODE between two dense layers."""
    field = keras.Sequential([keras.layers.Dense(64, activation="tanh"), keras.layers.Dense(64)])
    # Adaptive steps depend on the part of the batch that a worker has. With them, the losses would differ from those of
    # one process, within the tolerances.
    solver = keras_node.RungeKutta("rk4", num_steps=4)
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64),
            keras_node.ODELayer(field, solver=solver, jit_compile=False),  # compiling takes longer than this
            keras.layers.Dense(10),
        ]
    )


def distributed_model(strategy):
    """Returns the network, with its weights on every worker.

    The variables must be created inside the scope of the strategy, and the model outside. For a model that is created
    inside, `fit` first looks at one batch, and fails to collect it from all workers.
    """
    with strategy.scope():
        layers = network()
    model = AcrossWorkers(layers.inputs, layers.outputs[0])
    with strategy.scope():
        model.compile(
            keras.optimizers.Adam(2e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=False,
        )
        model.optimizer.build(model.trainable_variables)  # so that a checkpoint finds its variables
    return model


class Crash(keras.callbacks.Callback):
    """Kills the process early in an epoch, like a machine that loses power."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch == self.epoch

    def on_train_batch_begin(self, batch, logs=None):
        if self.now and batch == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def train(strategy, directory, epochs, crash_at=None):
    """Trains from the last checkpoint in `directory`, which all workers read and the first worker writes."""
    first = strategy.cluster_resolver is None or strategy.cluster_resolver.task_id == 0
    model = distributed_model(strategy)
    epoch = tf.Variable(0)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer, epoch=epoch)
    checkpoint.restore(tf.train.latest_checkpoint(directory))
    # All workers must take part in saving, because some variables are sums over them. Only the first keeps its files.
    manager = tf.train.CheckpointManager(checkpoint, directory if first else tempfile.mkdtemp(), max_to_keep=2)

    def save(finished, logs):
        epoch.assign(finished + 1)
        manager.save()

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=save)]
    if first:
        callbacks.insert(0, keras.callbacks.CSVLogger(directory / "log.csv", append=True))
    if crash_at is not None:
        callbacks.append(Crash(crash_at))

    x, labels = load_digits(return_X_y=True)
    size = len(x) // BATCH * BATCH  # a smaller last batch would not divide evenly
    x, labels = (x[:size] / 16).astype("float32"), labels[:size]
    with strategy.scope():
        # The same batches in every epoch show that a restart changes nothing.
        model.fit(
            x, labels, BATCH, epochs, shuffle=False, verbose=0, initial_epoch=int(epoch.numpy()), callbacks=callbacks
        )


def free_ports(number):
    """Returns free ports of this machine."""
    sockets = [socket.socket() for _ in range(number)]
    for s in sockets:
        s.bind(("localhost", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run_workers(arguments, crash_at=None):
    """Starts two workers. If one dies, ends the other. Returns whether both finished."""
    workers = []
    cluster = {"worker": [f"localhost:{port}" for port in free_ports(2)]}
    for index in range(2):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        crash = ["--crash-at", str(crash_at)] if index == 1 and crash_at is not None else []
        environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
        command = [sys.executable, __file__, *arguments, *crash]
        workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
    end = time.monotonic() + TIME_LIMIT
    try:
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() not in (None, 0) for worker in workers) or time.monotonic() > end:
                return False
            time.sleep(0.1)
        return all(worker.returncode == 0 for worker in workers)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def read_losses(directory):
    """Returns pairs of an epoch and its loss, in the order of training."""
    with open(directory / "log.csv") as file:
        return [(int(row["epoch"]), float(row["loss"])) for row in csv.DictReader(file)]


def draw(path, alone, before, after):
    """Draws the losses of one process, and of two workers before the crash and after the restart."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*zip(*alone, strict=True), color="0.7", lw=4, label="one process")
    axes.plot(*zip(*before, strict=True), "o", label="two workers, until one is killed")
    axes.plot(*zip(*after, strict=True), "s", label="both started again from the checkpoint")
    axes.axvline(after[0][0] - 0.5, color="tab:red", ls=":", label="killed")
    axes.set(xlabel="epoch", ylabel="training loss", yscale="log", title="The same training on one and on two machines")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(path, dpi=130)


def main():
    """Trains if this is a worker. If not, starts workers twice, compares them with one process and draws the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few epochs")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory", type=pathlib.Path, help="directory for checkpoints and logs; by default a temporary one"
    )
    parser.add_argument("--crash-at", type=int, help="epoch in which this worker kills itself")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("multi_worker.png"))
    options = parser.parse_args()
    epochs = 4 if options.quick else options.epochs
    keras.utils.set_random_seed(options.seed)

    if "TF_CONFIG" in os.environ:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before anything else of TensorFlow
        return train(strategy, options.directory, epochs, options.crash_at)

    root = options.directory or pathlib.Path(tempfile.mkdtemp())
    alone, together = root / "one_process", root / "two_workers"
    for directory in (alone, together):
        directory.mkdir(parents=True, exist_ok=True)
    arguments = ["--epochs", str(epochs), "--seed", str(options.seed), "--directory", str(together)]
    if run_workers(arguments, crash_at=epochs // 2):
        raise SystemExit("No worker was killed.")
    before = read_losses(together)
    print(f"A worker was killed after {len(before)} epochs; both are started again.", flush=True)
    if not run_workers(arguments):
        raise SystemExit("The workers did not finish after the restart.")
    after = read_losses(together)[len(before) :]
    train(tf.distribute.get_strategy(), alone, epochs)

    losses = dict(read_losses(alone))
    print("epoch   one process   two workers   relative difference")
    for epoch, loss in before + after:
        print(f"{epoch:5} {losses[epoch]:13.6f} {loss:13.6f} {abs(loss / losses[epoch] - 1):21.1e}")
    draw(options.out, list(losses.items()), before, after)
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
