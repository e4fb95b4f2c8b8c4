"""Random initial value problems with solutions in closed form, and what is checked of each.

A *program* is what TensorFlow traces: the equation, the kind of field, the solver, the gradient, the mode. `OPTIONS`
holds what it is drawn from, the simplest first. Numbers are drawn from a seed afterwards, many for one program, since
tracing is what takes time. `test_trials.py` draws a few programs and `benchmarks/stress.py` draws until told to stop.

Every state is compared with the closed form, in NumPy and float64, to what the solver's options promise; every gradient
with central differences of the closed form. Where times coincide, the closed form goes on beyond the order in which a
solve takes them, and so do the gradients.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_node
from keras_node.solvers.tableaus import TABLEAUS

OPTIONS = {
    "mode": ("eager", "graph", "xla"),
    "equation": ("linear", "logistic", "driven", "switched", "dropout"),
    "field": ("args", "layer", "variable", "around a layer", "closure", "functional"),
    "entry": ("odeint", "ODELayer"),
    "state": ("rank 2", "rank 1", "rank 3", "dict", "tuple"),
    "dtype": ("float64", "float32"),
    "weights": ("float64", "float32"),
    "times": ("two", "many", "reversed", "repeated"),
    "own_times": (False, True),
    "learnable_times": (False, True),
    "origin": (0.0, 1e5),
    "kinks": ("none", "inside", "outside"),
    "method": ("tsit5", "dopri5", "bosh3", "heun", "dopri8", "rk4", "rk38", "ralston", "midpoint", "euler"),
    "steps": ("adaptive", "num_steps", "step_size"),
    "tolerance": (1e-4, 1e-7),
    "per_sample": (False, True),
    "gradient": ("direct", "backsolve", "checkpointed"),
    "training": (None, False, True, "context"),
    "batch": (3, 1, 0),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """One choice out of each of `OPTIONS`."""

    mode: str
    equation: str
    field: str
    entry: str
    state: str
    dtype: str
    weights: str
    times: str
    own_times: bool
    learnable_times: bool
    origin: float
    kinks: str
    method: str
    steps: str
    tolerance: float
    per_sample: bool
    gradient: str
    training: bool | str | None
    batch: int

    @property
    def active(self) -> bool:
        """Whether the field is in training mode."""
        return self.training in (True, "context")

    @property
    def low_precision(self) -> bool:
        return "float32" in (self.dtype, self.weights)

    @property
    def step_at(self) -> tuple:
        inside, outside = (self.origin + 0.37,), (self.origin - 3, self.origin + 5, self.origin + 7)
        return {"none": (), "inside": inside, "outside": inside + outside}[self.kinks]


def possible(p: Program) -> bool:
    """Whether the options go together."""
    adaptive, embedded = p.steps == "adaptive", TABLEAUS[p.method].embedded
    contradictions = (
        adaptive and not embedded,
        not adaptive and p.tolerance != OPTIONS["tolerance"][0],
        # Tolerances that take hundreds of steps, or are below rounding.
        p.tolerance < 1e-4 and (p.method in ("heun", "bosh3") or p.low_precision),
        p.steps == "num_steps" and p.kinks != "none",
        (p.equation == "switched") != (p.kinks != "none"),
        p.equation == "dropout" and p.field not in ("layer", "around a layer"),
        p.field == "functional" and p.state != "rank 2",
        p.state == "rank 1" and p.entry == "ODELayer",
        # Whether an entry was dropped is told from how it moved.
        p.equation == "dropout" and p.learnable_times,
        # In float32 there is no room for a step so far from zero.
        p.origin != 0 and (p.low_precision or p.mode == "eager"),
        p.field == "closure" and p.mode == "eager",
        p.entry == "ODELayer" and (p.times in ("two", "reversed") or p.learnable_times or p.field == "closure"),
        p.gradient == "direct" and p.mode == "xla" and (p.times != "two" or p.kinks != "none"),
        p.field in ("args", "closure") and p.weights != p.dtype,
    )
    return not any(contradictions)


class Numbers(NamedTuple):
    """What a program is run on, in NumPy and float64, rounded to the program's precisions."""

    y0: list
    params: list
    ts: np.ndarray
    cotangents: list


def inner_shapes(p: Program) -> list[tuple]:
    """The shapes of the leaves of the state without the batch."""
    return {"rank 1": [()], "rank 2": [(2,)], "rank 3": [(3, 2)], "dict": [(2,), (3,)], "tuple": [(1,), (2,)]}[p.state]


def draw_numbers(p: Program, seed: int, batch: int | None = None) -> Numbers:
    """Draws states, parameters, times and the weights of the states in the loss."""
    rng = np.random.default_rng(zlib.crc32(repr((p, seed)).encode()))
    batch = p.batch if batch is None else batch
    shapes = inner_shapes(p)
    y0 = [rng.uniform(0.2, 0.9, size=(batch, *shape)) for shape in shapes]
    params = []
    for shape in shapes:
        if p.equation == "linear":
            shape = (shape[-1], shape[-1]) if shape else ()
            params.append([rng.uniform(-0.7, 0.7, size=shape)])
        elif p.equation == "dropout":
            params.append([rng.uniform(-0.8, 0.4, size=shape)])
        else:
            params.append([rng.uniform(0.2, 1.0, size=shape), rng.uniform(-0.8, 0.8, size=shape)])
    ts = _draw_times(p, rng, batch)
    cotangents = [rng.normal(size=(ts.shape[0], batch, *shape)) for shape in shapes]
    y0, ts, cotangents = tf.nest.map_structure(lambda a: a.astype(p.dtype).astype("float64"), (y0, ts, cotangents))
    params = tf.nest.map_structure(lambda a: a.astype(p.weights).astype("float64"), params)
    return Numbers(y0, params, ts, cotangents)


def _draw_times(p, rng, batch):
    number = 2 if p.times == "two" else 4
    size = (number - 1, batch) if p.own_times else (number - 1,)
    gaps = rng.uniform(0.1, 1.3, size=size) / (number - 1)
    if p.times == "repeated":
        gaps[[0, 2]] = 0
    if p.own_times:
        gaps *= rng.random(size=batch) > 0.1  # for some samples no time passes
    start = np.zeros_like(gaps[:1])
    if p.own_times and p.entry == "odeint":
        start = rng.uniform(-0.3, 0.3, size=(1, batch))
    ts = np.concatenate([start, start + np.cumsum(gaps, axis=0)])
    # No time is nearer to a kink than a step: at the kink itself a gradient would have one side only.
    for kink in p.step_at[:1]:
        ts = np.where(np.abs(ts + p.origin - kink) < 1e-3, ts + 2e-3, ts)
    ts = np.sort(ts, axis=0)
    return p.origin + (ts[::-1] if p.times == "reversed" else ts)


# The equations: rates in TensorFlow, solutions in NumPy.


def rates(p: Program, t, y, params, dropout: Callable | None):
    """`dy/dt` of one leaf of the state."""
    params = [tf.cast(a, y.dtype) for a in params]
    if p.equation == "linear":
        return tf.einsum("...i,ij->...j", y, params[0]) if params[0].shape.rank else y * params[0]
    if p.equation == "dropout":
        return dropout(y * params[0])
    a, b = params
    if p.equation == "logistic":
        return a * y * (1 - y) + 0 * b
    t = tf.cast(t, y.dtype)
    if p.equation == "driven":
        return b * tf.cos(3 * t) - a * y
    return tf.where(t < tf.constant(p.step_at[0], y.dtype), a, b) * y


def solution(p: Program, y0, params, ts, mask=1.0):
    """One leaf of the state at `ts`, `(T, batch, ...)`."""
    t = np.reshape(ts, (*ts.shape, *[1] * (y0.ndim + 1 - ts.ndim)))
    elapsed, a = t - t[:1], params[0]
    if p.equation == "linear" and a.ndim:
        values, vectors = np.linalg.eig(a)
        coordinates = y0.astype(complex) @ vectors
        return ((coordinates * np.exp(values * elapsed)) @ np.linalg.inv(vectors)).real
    if p.equation == "linear":
        return y0 * np.exp(a * elapsed)
    if p.equation == "dropout":
        return y0 * np.exp(mask * a * elapsed)
    if p.equation == "logistic":
        return 1 / (1 + (1 / y0 - 1) * np.exp(-a * elapsed))
    b = params[1]
    if p.equation == "driven":
        driven = b * (a * np.cos(3 * t) + 3 * np.sin(3 * t)) / (a**2 + 9)
        return driven + (y0 - driven[:1]) * np.exp(-a * elapsed)
    before, after = np.minimum(t, p.step_at[0]), np.maximum(t, p.step_at[0])
    return y0 * np.exp(a * (before - before[:1]) + b * (after - after[:1]))


# Programs in TensorFlow.


class Field(keras.layers.Layer):
    """The rates of a program as a layer, with its parameters as weights."""

    def __init__(self, program, params, **kwargs):
        super().__init__(**kwargs)
        self.program = program
        self.params = tf.nest.map_structure(lambda a: self.add_weight(shape=a.shape), params)
        self.dropout = None
        if program.equation == "dropout":
            self.dropout = [keras.layers.Dropout(0.5, seed=i, dtype=self.dtype_policy) for i in range(len(params))]

    def call(self, t, y):
        return over_leaves(self.program, t, y, self.params, self.dropout)


def over_leaves(p: Program, t, y, params, dropout=None):
    """The rates of the whole state."""
    leaves = tf.nest.flatten(y)
    dropout = dropout or [None] * len(leaves)
    dy = [rates(p, t, *leaf) for leaf in zip(leaves, params, dropout, strict=True)]
    return tf.nest.pack_sequence_as(y, dy)


class Caller(keras.layers.Layer):
    """A layer from whose `call` a program is run, so that Keras' call context tells whether it is training."""

    def __init__(self, run):
        super().__init__(autocast=False)
        self.run = run

    def call(self, y0, training=None):
        del training  # the solve learns it from the context
        return self.run(y0)


class Outcome(NamedTuple):
    """What a run gives: states, their gradients (of `y0`, parameters, times), steps and status."""

    ys: list
    gradients: list
    steps: np.ndarray
    status: np.ndarray


def make(p: Program) -> Callable[[Numbers], Outcome]:
    """Builds a program; the function that it returns is traced at its first run and no more."""
    shapes = draw_numbers(p, 0).params
    field, variables, args = _make_field(p, shapes)
    solver = _make_solver(p)
    structure = {"dict": {"a": 0, "b": 0}, "tuple": (0, 0)}.get(p.state, 0)
    training = p.training if p.training != "context" else None
    layer = None
    if p.entry == "ODELayer":
        layer = keras_node.ODELayer(field, t0=p.origin, solver=solver, gradient=p.gradient, dtype=p.dtype)

    def solve(y0, ts, args):
        if layer is not None:
            # To Keras an argument of `None` is not the same as no argument, for which the context speaks.
            options = {"args": args or None, "training": training}
            y = layer(y0, ts=tf.transpose(ts[1:]), **{k: v for k, v in options.items() if v is not None})
            ys = tf.nest.map_structure(
                lambda a, b: keras.ops.concatenate([a[None], keras.ops.moveaxis(b, 1, 0)]), y0, y
            )
            return ys, tf.constant(50), tf.constant(0)  # of its steps a layer tells nothing
        options = {"solver": solver, "gradient": p.gradient, "training": training, "throw": False}
        used = (lambda t, y: over_leaves(p, t, y, args)) if p.field == "closure" else field
        s = keras_node.odeint(used, y0, ts, args=args if p.field == "args" else None, **options)
        return s.ys, s.stats.num_steps, s.status

    def run(y0, ts, args, cotangents):
        y0 = tf.nest.pack_sequence_as(structure, y0)
        with tf.GradientTape() as tape:
            tape.watch([y0, ts, args])
            if p.training == "context":
                ys, steps, status = Caller(lambda y0: solve(y0, ts, args))(y0, training=True)
            else:
                ys, steps, status = solve(y0, ts, args)
            ys = tf.nest.flatten(ys)
            loss = tf.add_n([tf.reduce_sum(y * c) for y, c in zip(ys, cotangents, strict=True)])
        sources = [tf.nest.flatten(y0), args or [[v.value for v in leaf] for leaf in variables]]
        sources += [ts] if p.learnable_times else []
        return ys, tape.gradient(loss, sources), steps, status

    # Batches of any number go through one trace in a graph.
    traced = (
        run
        if p.mode == "eager"
        else tf.function(run, autograph=False, jit_compile=p.mode == "xla", reduce_retracing=True)
    )

    def on_numbers(numbers: Numbers) -> Outcome:
        def tensors(arrays, dtype):
            return tf.nest.map_structure(lambda a: tf.constant(a, dtype), arrays)

        for variable, value in zip(tf.nest.flatten(variables), tf.nest.flatten(numbers.params), strict=False):
            variable.assign(value)
        y0, cotangents = tensors(numbers.y0, p.dtype), tensors(numbers.cotangents, p.dtype)
        # Times that no gradient is asked for may be numbers.
        ts = tensors(numbers.ts, p.dtype) if p.learnable_times or p.mode != "eager" else numbers.ts.astype(p.dtype)
        used = tensors(numbers.params, p.weights) if args else []
        outcome = traced(y0, ts if tf.is_tensor(ts) else tf.constant(ts), used, cotangents)
        return Outcome(*tf.nest.map_structure(lambda a: a if a is None else np.asarray(a), outcome))

    return on_numbers


def _make_field(p, shapes):
    """The field, the variables that it reads, and whether it takes its parameters as `args`."""
    if p.field in ("args", "closure"):
        return (lambda t, y, args: over_leaves(p, t, y, args)), [], True
    if p.field == "variable":
        variables = tf.nest.map_structure(lambda a: keras.Variable(a, dtype=p.weights), shapes)
        return (lambda t, y: over_leaves(p, t, y, variables)), variables, False
    layer = Field(p, shapes, dtype=p.weights)
    if p.field == "functional":
        t, y = keras.Input((1,)), keras.Input(shapes[0][0].shape[-1:])
        return keras.Model([t, y], layer(t, y)), layer.params, False
    return (layer if p.field == "layer" else lambda t, y: layer(t, y)), layer.params, False


NUM_STEPS, STEP_SIZE = 6, 0.07


def _make_solver(p):
    options = {"per_sample": p.per_sample}
    if p.kinks != "none":
        options["step_at"] = p.step_at
    if p.steps == "adaptive":
        options |= {"rtol": p.tolerance, "atol": p.tolerance}
    elif p.steps == "num_steps":
        options["num_steps"] = NUM_STEPS
    else:
        options["step_size"] = STEP_SIZE
    if p.gradient == "direct" and p.mode == "xla" and p.steps != "num_steps":
        options["max_steps"] = 60  # for which `DirectGradient` reserves memory
    return keras_node.RungeKutta(p.method, **options)


# What must hold.


def check(p: Program, numbers: Numbers, outcome: Outcome) -> list[str]:
    """Everything that is not as it should be, in sentences; empty if all is well."""
    if np.any(outcome.status):
        return [f"The solve ended with status {outcome.status}."]
    wrong = []
    bound = promise(p, numbers, outcome)
    masks = [np.ones_like(y) for y in numbers.y0]
    if p.equation == "dropout" and p.active:
        masks = [_mask(*leaf, numbers.ts) for leaf in zip(numbers.y0, numbers.params, outcome.ys, strict=True)]
    for i, ys in enumerate(outcome.ys):
        expected = solution(p, numbers.y0[i], numbers.params[i], numbers.ts, masks[i])
        wrong += compare(f"state {i}", ys, expected, bound * np.max(np.abs(expected), initial=1))
    names, expected, scales = _differences(p, numbers, masks)
    gradients = tf.nest.flatten(outcome.gradients)
    for name, gradient, value, scale in zip(names, gradients, expected, scales, strict=True):
        if gradient is None:
            wrong.append(f"The gradient of {name} is None.")
        else:
            factor = 100 if name == "times" else 10
            wrong += compare(f"the gradient of {name}", gradient, value, factor * bound * scale + 1e-6 * scale)
    return wrong


def compare(name, value, expected, tolerance):
    if value.shape != expected.shape:
        return [f"The shape of {name} is {value.shape} and should be {expected.shape}."]
    error = np.abs(value - expected)
    if np.all(error <= tolerance):  # not so where one is NaN
        return []
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error - tolerance)), error.shape)
    tolerance = np.broadcast_to(tolerance, error.shape)[worst]
    return [f"{name} is {value[worst]} and should be {expected[worst]}, to {tolerance:.1e} (at {worst})."]


def _mask(y0, params, ys, ts):
    """What dropout multiplied each entry by, 0 or 2, as the states at the last time tell."""
    elapsed = np.reshape(ts[-1] - ts[0], (-1, *[1] * (y0.ndim - 1)))
    return 2.0 * (np.abs(ys[-1] - y0) > np.abs(y0 * np.expm1(2 * params[0] * elapsed)) / 2)


def promise(p: Program, numbers: Numbers, outcome: Outcome) -> float:
    """The relative error that a program's options allow.

    Adaptive steps keep the root mean square of the local error below the tolerance, so one entry may be off by the root
    of their number, a step, and errors grow with the solution. Constant steps `h` of order `p` are off by `O(h^p)`.
    """
    rate = 3.0 if p.equation == "driven" else 2.0
    gaps = np.abs(np.diff(numbers.ts, axis=0))
    longest = np.max(np.sum(gaps, axis=0), initial=0)
    growth = np.exp(1.5 * longest)
    moving = np.count_nonzero(np.any(gaps != 0, axis=0)) if p.own_times else len(numbers.y0[0])
    entries = sum(np.prod(y.shape[1:]) * (1 if p.per_sample else moving) for y in numbers.y0)
    steps = np.max(outcome.steps, initial=1)
    if p.steps == "adaptive":
        error = 5 * np.sqrt(max(entries, 1)) * steps * p.tolerance
    else:
        h = rate * (STEP_SIZE if p.steps == "step_size" else np.max(gaps, initial=0) / NUM_STEPS)
        order = TABLEAUS[p.method].order
        # Between the ends of steps the solution is interpolated.
        error = longest * rate * (2 * h**order + (h**4 if p.steps == "step_size" and len(numbers.ts) > 2 else 0))
    epsilon = np.finfo("float32" if p.low_precision else "float64").eps
    rounding = epsilon * (20 * (steps + 10) + 10 * rate * np.max(np.abs(numbers.ts), initial=0))
    return growth * (error + rounding)


def _differences(p, numbers, masks):
    """Gradients of the loss by central differences of the closed form, and what sizes their errors are measured by."""
    y0, params, ts, cotangents = numbers
    names, gradients, scales = [], [], []

    def products(i, y0, params, ts):
        return cotangents[i] * solution(p, y0, params, ts, masks[i])

    def difference(i, change, h=1e-5):
        """The derivative of every product along `change(y0, params, ts, by)`."""
        start = (y0[i], params[i], ts)
        return (products(i, *change(*start, h)) - products(i, *change(*start, -h))) / (2 * h)

    for i, y in enumerate(y0):
        size = y.shape[-1] if y.ndim > 1 else 1
        columns, sizes = [], []
        for j in range(size):
            unit = np.eye(size)[j] if y.ndim > 1 else 1.0
            d = difference(i, lambda y, a, t, by, unit=unit: (y + by * unit, a, t))
            axes = (0, -1) if y.ndim > 1 else 0
            columns.append(np.sum(d, axis=axes))
            sizes.append(np.sum(np.abs(d) + 0.1 * np.abs(cotangents[i]), axis=axes))
        names.append(f"state {i}")
        gradients.append(np.reshape(np.stack(columns, axis=-1), y.shape))
        scales.append(np.reshape(np.stack(sizes, axis=-1), y.shape))
    for i, leaf in enumerate(params):
        for k, a in enumerate(leaf):
            gradient, scale = np.zeros(a.shape), np.zeros(a.shape)
            for index in np.ndindex(a.shape):
                unit = np.zeros(a.shape)
                unit[index] = 1

                def change(y, b, t, by, k=k, unit=unit):
                    return y, [c + by * unit if n == k else c for n, c in enumerate(b)], t

                d = difference(i, change)
                gradient[index] = np.sum(d)
                scale[index] = np.sum(np.abs(d) + 0.1 * np.abs(cotangents[i]))
            names.append(f"parameter {k} of state {i}")
            gradients.append(gradient)
            scales.append(scale)
    if p.learnable_times:
        gradient, scale = np.zeros(ts.shape), np.zeros(ts.shape)
        for n in range(len(ts)):
            unit = np.eye(len(ts))[n].reshape(-1, *[1] * (ts.ndim - 1))
            for i, y in enumerate(y0):
                h = 1e-4 if p.origin else 1e-5
                d = difference(i, lambda y, a, t, by, unit=unit: (y, a, t + by * unit), h)
                axes = tuple(a for a in range(d.ndim) if not (a == 1 and p.own_times))
                gradient[n] += np.sum(d, axis=axes)
                scale[n] += np.sum(np.abs(d) + 0.1 * np.abs(cotangents[i]), axis=axes)
        names.append("times")
        gradients.append(gradient)
        scales.append(scale)
    return names, gradients, scales


def draw(rng, module, **fixed):
    """A program of a module such as this that is possible, each option drawn by `rng` unless it is fixed."""
    while True:
        p = module.Program(**{name: fixed.get(name, rng.choice(values)) for name, values in module.OPTIONS.items()})
        if module.possible(p):
            return p


def smallest(p, fails: Callable, module):
    """The simplest program that can be reached from one that fails, an option at a time, and fails as well."""
    for name, values in module.OPTIONS.items():
        for value in values[: values.index(getattr(p, name))]:
            simpler = dataclasses.replace(p, **{name: value})
            if module.possible(simpler) and fails(simpler):
                p = simpler
                break
    return p


def try_out(p: Program, seeds=(0,), batch: int | None = None) -> tuple[int, list[str]]:
    """Runs a program on the numbers of some seeds; the number of problems solved, and everything that was wrong."""
    run, problems, wrong = make(p), 0, []
    for seed in seeds:
        numbers = draw_numbers(p, seed, batch)
        wrong += [f"seed {seed}: {sentence}" for sentence in check(p, numbers, run(numbers))]
        problems += max(1, len(numbers.y0[0])) if p.per_sample else 1
    return problems, wrong
