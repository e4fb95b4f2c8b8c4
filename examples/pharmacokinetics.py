"""Learns how patients take up a drug, each with doses at times of their own.

A drug is swallowed, passes from the gut into the blood, from there into tissue and back, and is excreted: two
compartments and a gut, four rates. Every patient has up to six doses at irregular times (`jumps`) and eight noisy
samples of blood. A network learns the four rates from three properties of a patient, through the solve. Beside it
stands a model with the same four rates for all. The true rates are known, because the patients are simulated: a drug
leaves more slowly with age, and faster with weight and a good kidney.

    python examples/pharmacokinetics.py            # half a minute on two cores
    python examples/pharmacokinetics.py --quick    # in some seconds
"""

import argparse
import pathlib
import time

import keras
import matplotlib
import numpy as np
from keras import ops

import keras_node

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RATES = ("uptake", "excretion", "to tissue", "from tissue")
TYPICAL = np.log([1.2, 0.25, 0.4, 0.2])  # per hour
DOSES, SAMPLES, HOURS, NOISE = 6, 8, 48.0, 0.1


def compartments(t, y, args):
    """The amounts in gut, blood and tissue, in mg; `args` are the four rates of every patient."""
    gut, blood, tissue = ops.unstack(y, 3, axis=1)
    uptake, excretion, out, back = ops.unstack(args, 4, axis=1)
    to_tissue = out * blood - back * tissue
    return ops.stack([-uptake * gut, uptake * gut - excretion * blood - to_tissue, to_tissue], axis=1)


@keras.saving.register_keras_serializable(package="examples")
class Patients(keras.layers.Layer):
    """The amount of a drug in the blood of patients, at the times of their samples.

    Args:
        rates: a layer that returns the logarithms of the rates divided by `TYPICAL`.
    """

    def __init__(self, rates, **kwargs):
        super().__init__(**kwargs)
        self.rates = rates
        solver = keras_node.RungeKutta("tsit5", rtol=1e-4, atol=1e-3, max_steps=256)
        # A drug that has left the gut cannot be followed backward in time, so the gradient replays the steps.
        self.body = keras_node.ODELayer(compartments, solver=solver, gradient="checkpointed")

    def call(self, properties, doses, amounts, times):
        rates = ops.exp(self.rates(properties) + TYPICAL.astype("float32"))
        to_gut = ops.stack([amounts, 0 * amounts, 0 * amounts], axis=2)
        empty = ops.zeros_like(to_gut[:, 0])
        return self.body(empty, ts=times, args=rates, jumps=(doses, to_gut))[..., 1]

    def compute_output_shape(self, properties_shape, doses_shape, amounts_shape, times_shape):
        return times_shape


def true_rates(properties):
    """The rates of patients by their weight, age and state of the kidney, each about 0 on average with variance 1."""
    weight, age, kidney = properties.T
    relative = [0.3 * weight, 0.5 * kidney - 0.3 * age + 0.2 * weight * kidney, 0.3 * np.tanh(weight), -0.2 * age]
    return np.exp(TYPICAL + np.stack(relative, axis=1))


def simulate(number, rng):
    """Returns the properties, doses, amounts and times of samples of patients, the samples, and the true rates."""
    properties = rng.normal(size=(number, 3)).clip(-2, 2)
    doses = np.sort(rng.uniform(0, 40, (number, DOSES)), axis=1)
    # Patients have two to six doses. The others are given at infinity, where they have no effect.
    doses[np.arange(DOSES) >= rng.integers(2, DOSES + 1, (number, 1))] = np.inf
    amounts = rng.choice([50.0, 100.0, 200.0], (number, DOSES))
    times = np.sort(rng.uniform(1, HOURS, (number, SAMPLES)), axis=1)
    rates = true_rates(properties)
    inputs = [x.astype("float32") for x in (properties, doses, amounts, times)]
    blood = solve(rates.astype("float32"), *inputs[1:])
    return inputs, blood * (1 + NOISE * rng.normal(size=blood.shape)), rates


def solve(rates, doses, amounts, times):
    """The amounts in the blood for known rates, `(patients, times)`."""
    to_gut = np.stack([amounts, 0 * amounts, 0 * amounts], axis=2)
    layer = keras_node.ODELayer(compartments, solver=keras_node.RungeKutta("tsit5", rtol=1e-5, atol=1e-3))
    inputs = [keras.Input(x.shape[1:]) for x in (rates, doses, to_gut, times)]
    state = ops.zeros_like(inputs[2][:, 0])
    outputs = layer(state, ts=inputs[3], args=inputs[0], jumps=(inputs[1], inputs[2]))
    return keras.Model(inputs, outputs[..., 1]).predict([rates, doses, to_gut, times], batch_size=256, verbose=0)


def network(properties):
    """A network that returns the four rates, relative to the typical ones, from the properties of a patient."""
    if not properties:
        return keras.Sequential([keras.layers.Rescaling(0.0), keras.layers.Dense(4, kernel_initializer="zeros")])
    start = keras.initializers.RandomNormal(stddev=0.01)
    return keras.Sequential(
        [keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(4, kernel_initializer=start)]
    )


def model_of(rates):
    """A model of the four inputs of patients."""
    inputs = [keras.Input((size,)) for size in (3, DOSES, DOSES, SAMPLES)]
    return keras.Model(inputs, Patients(rates)(*inputs))


def relative_error(y_true, y_pred):
    """The mean squared error of a sample, relative to its size plus 5 mg."""
    return ops.mean(((y_pred - y_true) / (y_true + 5.0)) ** 2, axis=-1)


def draw(path, test, rates, learnt):
    """Draws three patients with their doses, and the learnt rates against the true ones."""
    (_, doses, amounts, times), blood, _ = test
    figure, axes = plt.subplots(1, 5, figsize=(18, 3.6), layout="constrained")
    grid = np.repeat(np.linspace(0.1, HOURS, 300, dtype="float32")[None], 3, axis=0)
    for label, color, values in (("true", "0.6", rates), ("learnt", "tab:blue", learnt)):
        curves = solve(values[:3].astype("float32"), doses[:3], amounts[:3], grid)
        for i in range(3):
            axes[i].plot(grid[i], curves[i], color=color, lw=3 if label == "true" else 1.2, label=label)
    for i in range(3):
        axes[i].plot(times[i], blood[i], "k.", label="samples")
        given = np.isfinite(doses[i])
        axes[i].vlines(doses[i][given], 0, amounts[i][given] / 4, color="tab:red", lw=1.5, label="doses")
        axes[i].set(title=f"Patient {i + 1}, not seen in training", xlabel="hours", ylabel="mg in the blood")
    axes[0].legend(fontsize=8)
    for axis, k in zip(axes[3:], (1, 0), strict=True):
        axis.loglog(rates[:, k], learnt[:, k], ".", ms=3)
        axis.plot([rates[:, k].min(), rates[:, k].max()], [rates[:, k].min(), rates[:, k].max()], "k:", lw=1)
        axis.set(title=f"{RATES[k].capitalize()} per hour", xlabel="true", ylabel="learnt")
    figure.savefig(path, dpi=120)


def main():
    """Simulates patients, trains both models, prints their errors and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train the second model only, for a few seconds")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("pharmacokinetics.png"))
    options = parser.parse_args()

    keras.utils.set_random_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    train, test = (simulate(number, rng) for number in ((64, 32) if options.quick else (512, 256)))
    epochs = 2 if options.quick else options.epochs
    began = time.perf_counter()
    print(f"{'rates':16}{'error of samples':>18}{''.join(f'{name:>14}' for name in RATES)}")
    for name, properties in (("same for all", False), ("of each patient", True))[1 if options.quick else 0 :]:
        rates = network(properties)
        model = model_of(rates)
        steps = epochs * len(train[1]) // 64
        rate = keras.optimizers.schedules.CosineDecay(2e-2, steps)
        model.compile(keras.optimizers.Adam(rate), relative_error, jit_compile=not options.quick)
        model.fit(train[0], train[1], batch_size=64, epochs=epochs, verbose=0)
        error = np.sqrt(model.evaluate(test[0], test[1], batch_size=64, verbose=0))
        learnt = np.exp(ops.convert_to_numpy(rates(test[0][0])) + TYPICAL)
        wrong = np.median(np.abs(learnt / test[2] - 1), axis=0)
        print(f"{name:16}{error:18.3f}{''.join(f'{100 * w:12.1f} %' for w in wrong)}")
    print(
        f"noise of the samples: {NOISE:.0%}; errors of the rates: medians over patients that were not seen in training"
    )
    print(f"{time.perf_counter() - began:.0f} seconds")
    draw(options.out, test, test[2], learnt)
    print(f"picture: {options.out.resolve()}")


if __name__ == "__main__":
    main()
