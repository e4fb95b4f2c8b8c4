"""Random recurrent layers beside a plain Python loop of solves and cells; drawn as in `trials.py`."""

import dataclasses
import functools
import zlib
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
import trials

import keras_node

UNITS, FEATURES, STEPS = 2, 2, 4

OPTIONS = {
    "mode": ("eager", "graph", "xla"),
    "field": ("linear", "network", "around a network"),
    "cell": ("SimpleRNNCell", "GRUCell", "LSTMCell", "stack"),
    "dtype": ("float64", "float32"),
    "mask": ("none", "some", "first and last"),
    "intervals": ("apart", "some zero", "all zero"),
    "go_backwards": (False, True),
    "return_sequences": (False, True),
    "return_state": (False, True),
    "zero_output_for_mask": (False, True),
    "initial_state": (False, True),
    "time_feature": (False, True),
    "per_sample": (False, True),
    "method": ("tsit5", "dopri5", "bosh3", "rk4"),
    "gradient": ("direct", "backsolve", "checkpointed"),
    "jit_compile": ("auto", False),
    "training": (None, False, True),
    "batch": (3, 1, 0),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """One choice out of each of `OPTIONS`."""

    mode: str
    field: str
    cell: str
    dtype: str
    mask: str
    intervals: str
    go_backwards: bool
    return_sequences: bool
    return_state: bool
    zero_output_for_mask: bool
    initial_state: bool
    time_feature: bool
    per_sample: bool
    method: str
    gradient: str
    jit_compile: bool | str
    training: bool | None
    batch: int


# What is known not to hold, and left out until it does. Each says so in a sentence.
KNOWN = {
    "Keras' own cells raise in a graph for a batch that is known to be empty.": lambda p: p.batch == 0,
}


def possible(p: Program) -> bool:
    """Whether the options go together, and are not known to fail."""
    contradictions = (
        p.gradient == "direct" and p.mode == "xla",
        p.zero_output_for_mask and p.mask == "none",
    )
    return not any(contradictions) and not any(known(p) for known in KNOWN.values())


class Numbers(NamedTuple):
    """What a layer is run on."""

    x: np.ndarray
    times: np.ndarray
    mask: np.ndarray
    h: np.ndarray
    cotangent: np.ndarray


def draw_numbers(p: Program, seed: int, batch: int | None = None) -> Numbers:
    """Draws a batch of series."""
    rng = np.random.default_rng(zlib.crc32(repr((p, seed)).encode()))
    batch = p.batch if batch is None else batch
    x, gaps = rng.normal(size=(batch, STEPS, FEATURES)), rng.uniform(0.05, 0.7, size=(batch, STEPS))
    if p.intervals != "apart":
        gaps *= (rng.random(gaps.shape) > 0.4) * (p.intervals != "all zero")
    mask = np.ones((batch, STEPS), bool)
    if p.mask == "some":
        mask = rng.random(mask.shape) > 0.4
    elif p.mask == "first and last":
        mask[:, [0, -1]] = False
    times = 3 + np.cumsum(gaps, axis=1)
    arrays = x, times, rng.normal(size=(batch, UNITS)), rng.normal(size=(batch, STEPS, UNITS))
    x, times, h, cotangent = (a.astype(p.dtype).astype("float64") for a in arrays)
    return Numbers(x, times, mask, h, cotangent)


def _cells(p, dtype):
    make = lambda name: getattr(keras.layers, name)(UNITS, dtype=dtype, bias_initializer="random_normal")  # noqa: E731
    if p.cell != "stack":
        return make(p.cell)
    return keras.layers.StackedRNNCells([make("GRUCell"), make("SimpleRNNCell")], dtype=dtype)


def _network(p, dtype):
    """A field whose Lipschitz constant is at most one, since errors of a solve grow with it, whoever solves."""
    dense = functools.partial(keras.layers.Dense, kernel_initializer="orthogonal", dtype=dtype)
    if p.field == "linear":
        return dense(UNITS, use_bias=False)
    return keras.Sequential([dense(3, activation="tanh"), dense(UNITS)])


class Around(keras.layers.Layer):
    """A field of `t` and the state around a network."""

    def __init__(self, network, **kwargs):
        super().__init__(**kwargs)
        self.network = network

    def build(self, t_shape, h_shape):
        self.network.build(h_shape)

    def call(self, t, h):
        return (1 - t / 4) * self.network(h)


def make(p: Program):
    """A run of the layer on numbers, and the same by the loop: outputs and gradients of `x`, `times`, `h`, weights."""
    solver = {"rtol": 1e-5, "atol": 1e-5} if p.method != "rk4" else {"num_steps": 6}
    solver = keras_node.RungeKutta(p.method, per_sample=p.per_sample, **solver)
    names = ("go_backwards", "return_sequences", "return_state", "zero_output_for_mask", "time_feature", "jit_compile")
    options = {name: getattr(p, name) for name in names}
    network = _network(p, p.dtype)
    field = Around(network, dtype=p.dtype) if p.field == "around a network" else network
    layer = keras_node.ODERNN(_cells(p, p.dtype), field, solver=solver, gradient=p.gradient, **options)
    layer.build((None, STEPS, FEATURES + p.time_feature))
    exact_network, exact_cells = _network(p, "float64"), _cells(p, "float64")
    exact_network.build((None, UNITS))
    exact_cells.build((None, FEATURES))

    def outputs(x, times, mask, h):
        inputs = tf.concat([x, times[..., None]], -1) if p.time_feature else x
        initial = None
        if p.initial_state:
            zeros = keras.tree.flatten(layer.get_initial_state(tf.shape(x)[0]))
            initial = keras.tree.pack_sequence_as(layer.get_initial_state(tf.shape(x)[0]), [h, *zeros[1:]])
            initial = initial if isinstance(initial, list) else [initial]
        mask = None if p.mask == "none" else mask
        given = {} if p.time_feature else {"times": times}
        return layer(inputs, mask=mask, initial_state=initial, training=p.training, **given)

    def run(x, times, mask, h, cotangent):
        with tf.GradientTape() as tape:
            tape.watch([x, times, h])
            y = outputs(x, times, mask, h)
            y, states = (y[0], y[1:]) if p.return_state else (y, [])
            loss = tf.reduce_sum(y * (cotangent if p.return_sequences else cotangent[:, -1]))
            loss += sum(tf.reduce_sum(tf.sin(s)) for s in tf.nest.flatten(states))
        sources = [x, times, h, *(v.value for v in layer.trainable_variables)]
        return y, tf.nest.flatten(states), tape.gradient(loss, sources, unconnected_gradients="zero")

    def moved(h, elapsed):
        """The state after `elapsed`: in closed form where the field is linear."""
        if p.field == "linear":
            return tf.einsum("bi,bij->bj", h, tf.linalg.expm(elapsed[:, None, None] * exact_network.kernel))
        field = (lambda t, h: (1 - t / 4) * exact_network(h)) if p.field == "around a network" else exact_network
        ts = tf.stack([tf.zeros_like(elapsed), elapsed])
        exact = keras_node.RungeKutta("dopri8", num_steps=3)
        return keras_node.odeint(field, h, ts, solver=exact, gradient="direct").ys[-1]

    def reference(x, times, mask, h, cotangent):
        with tf.GradientTape() as tape:
            tape.watch([x, times, h])
            states = exact_cells.get_initial_state(batch_size=x.shape[0])
            leaves = keras.tree.flatten(states)
            leaves = [h if p.initial_state and i == 0 else s for i, s in enumerate(leaves)]
            seen, last, rows = tf.zeros(x.shape[0], bool), times[:, 0], []
            y = tf.zeros_like(h)
            for i in reversed(range(STEPS)) if p.go_backwards else range(STEPS):
                valid = mask[:, i]
                elapsed = tf.where(valid & seen, times[:, i] - last, 0)
                before = [moved(leaves[0], elapsed), *leaves[1:]]
                new_y, new = exact_cells(x[:, i], keras.tree.pack_sequence_as(states, before))
                leaves = [tf.where(valid[:, None], a, b) for a, b in zip(keras.tree.flatten(new), leaves, strict=True)]
                y = tf.where(valid[:, None], new_y, y)
                rows.append(tf.where(valid[:, None], y, 0) if p.zero_output_for_mask else y)
                last, seen = tf.where(valid, times[:, i], last), seen | valid
            y = tf.stack(rows, 1) if p.return_sequences else rows[-1]
            states = leaves if p.return_state else []
            loss = tf.reduce_sum(y * (cotangent if p.return_sequences else cotangent[:, -1]))
            loss += sum(tf.reduce_sum(tf.sin(s)) for s in states)
        variables = [*exact_cells.trainable_variables, *exact_network.trainable_variables]
        sources = [x, times, h, *(v.value for v in variables)]
        return y, states, tape.gradient(loss, sources, unconnected_gradients="zero")

    traced = run if p.mode == "eager" else tf.function(run, autograph=False, jit_compile=p.mode == "xla")

    def on_numbers(numbers):
        for exact, ours in ((exact_cells, layer.cell.cell), (exact_network, network)):
            exact.set_weights(ours.get_weights())
        ours = traced(*(tf.constant(a, None if a.dtype == bool else p.dtype) for a in numbers))
        return ours, reference(*(tf.constant(a) for a in numbers))

    return on_numbers


def check(p: Program, numbers: Numbers, outcome) -> list[str]:
    """Everything that is not as it should be, in sentences."""
    ours, expected = tf.nest.map_structure(np.asarray, outcome)
    names = ["output", *(f"state {i}" for i in range(len(ours[1]))), "the gradient of x", "of times", "of h"]
    names += [f"the gradient of weight {i}" for i in range(len(ours[2]) - 3)]
    wrong, bound = [], {"rk4": 2e-4}.get(p.method, 1e-3) + (1e-4 if p.dtype == "float32" else 0)
    for name, value, right in zip(names, tf.nest.flatten(ours), tf.nest.flatten(expected), strict=True):
        total = len(numbers.x) if "weight" in name else 1
        wrong += trials.compare(name, value, right, bound * (total + np.max(np.abs(right), initial=0)))
    return wrong


def try_out(p: Program, seeds=(0,), batch: int | None = None) -> tuple[int, list[str]]:
    """Runs a layer on the series of some seeds; the number of problems solved, and everything that was wrong."""
    run, problems, wrong = make(p), 0, []
    for seed in seeds:
        numbers = draw_numbers(p, seed, batch)
        wrong += [f"seed {seed}: {sentence}" for sentence in check(p, numbers, run(numbers))]
        problems += max(1, len(numbers.x)) if p.per_sample else 1
    return problems, wrong
