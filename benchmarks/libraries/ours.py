"""keras_node, and the floor: the same evaluations and vector-Jacobian products with no solver around them."""

import keras
import tensorflow as tf

import keras_node

# `backsolve` and `checkpointed` are whole steps under XLA. The next three are backsolve (checkpointed, where that is
# unstable) in a graph without XLA, in one as `fit` makes it by default, whose solves are compiled by themselves, and
# eagerly.
METHODS = ["backsolve", "checkpointed", "graph", "default", "eager", "floor"]


def versions() -> dict:
    """The versions in use."""
    return {
        "keras_node": keras_node.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
    }


def field_of(case):
    """The right-hand side `f(t, y, weights)`."""
    if case.kind == "mlp":
        return lambda t, y, w: tf.tanh(y @ w[0] + w[1]) @ w[2] + w[3]
    if case.kind == "linear":
        return lambda t, y, w: y @ w[0]
    if case.kind == "conv":
        return lambda t, y, w: tf.nn.conv2d(tf.tanh(tf.nn.conv2d(y, w[0], 1, "SAME")), w[1], 1, "SAME")
    return lambda t, y, w: tf.stack([y[:, 1], w[0] * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], axis=-1)


def loss_of(case, ys):
    """The mean square of the last state, or of all where several times are asked for."""
    return tf.reduce_mean(tf.square(ys if case.num_times > 2 else ys[-1]))


def make(case, arrays, method):
    """A training step by keras_node."""
    if method == "backsolve" and case.gradient and case.unstable_backwards:
        raise NotImplementedError("the solve backwards is unstable")
    if case.kind == "ode_rnn":
        return recurrent(case, arrays, method)
    y0, ts = tf.constant(arrays["y0"]), arrays["ts"]
    weights = [tf.constant(arrays[name]) for name in sorted(arrays) if name.startswith("w")]
    field = field_of(case)
    max_steps = 100_000 if method == "reference" else 4096
    solver = keras_node.RungeKutta(
        "tsit5", rtol=case.rtol, atol=case.rtol, per_sample=case.per_sample, max_steps=max_steps
    )
    exact = method in ("checkpointed", "reference") or case.unstable_backwards
    if method == "floor":
        return floor(case, y0, ts, weights, field, solver)
    if not case.gradient and method in ("checkpointed", "default"):
        raise NotImplementedError("without a gradient it is backsolve's solve")
    if method == "eager" and (case.kind != "mlp" or case.dtype != "float32"):
        raise NotImplementedError("eager mode is measured on the MLPs")

    def solve(y0, weights):
        return keras_node.odeint(
            field,
            y0,
            ts,
            args=weights,
            solver=solver,
            gradient="checkpointed" if exact else "backsolve",
            training=True,
            jit_compile="auto" if method == "default" else False,
        )

    def step(y0, weights):
        if not case.gradient:
            solution = solve(y0, weights)
            return [], solution.ys[-1], solution.stats.num_evaluations
        with tf.GradientTape() as tape:
            tape.watch([y0, weights])
            solution = solve(y0, weights)
            loss = loss_of(case, solution.ys)
        return tape.gradient(loss, [y0, *weights]), solution.ys[-1], solution.stats.num_evaluations

    # In float64 XLA has no fast convolutions at all on a CPU.
    xla = method not in ("graph", "default") and not (method == "reference" and case.kind == "conv")
    function = step if method == "eager" else tf.function(step, jit_compile=xla)

    def run():
        gradients, y1, evaluations = function(y0, weights)
        return [g.numpy() for g in gradients], y1.numpy(), evaluations.numpy().mean()

    return run


def recurrent(case, arrays, method):
    """A training step of an ODE-RNN."""
    if method in ("eager", "floor"):
        raise NotImplementedError("measured on solves by themselves")
    _, _, units, hidden = case.sizes
    dense = [keras.layers.Dense(n, activation=a, dtype=case.dtype) for n, a in ((hidden, "tanh"), (units, None))]
    cell = keras.layers.GRUCell(units, dtype=case.dtype)
    solver = keras_node.RungeKutta("tsit5", rtol=case.rtol, atol=case.rtol)
    gradient = "checkpointed" if method == "checkpointed" else "backsolve"
    if method == "reference":  # ten steps for the way of one or two
        solver, gradient = keras_node.RungeKutta("tsit5", num_steps=10), "direct"
    layer = keras_node.ODERNN(
        cell,
        keras.Sequential([keras.Input((units,), dtype=case.dtype), *dense]),
        solver=solver,
        gradient=gradient,
        jit_compile=method == "default",  # what the default does after so many steps that compiling pays
        return_sequences=True,
    )
    x, times = tf.constant(arrays["y0"]), tf.constant(arrays["ts"])
    layer.build(x.shape)
    variables = [v for d in dense for v in (d.kernel, d.bias)] + [cell.kernel, cell.recurrent_kernel, cell.bias]
    for i, variable in enumerate(variables):
        variable.assign(arrays[f"w{i}"])

    @tf.function(jit_compile=method not in ("graph", "default", "reference"))
    def function(x, times):
        with tf.GradientTape() as tape:
            tape.watch(x)
            states = layer(x, times, training=True)
            loss = tf.reduce_mean(tf.square(states))
        return tape.gradient(loss, [x, *(v.value for v in variables)]), states[:, -1]

    def run():
        gradients, y1 = function(x, times)
        return [g.numpy() for g in gradients], y1.numpy(), None

    return run


def floor(case, y0, ts, weights, field, solver):
    """As many evaluations, and vector-Jacobian products backwards, as backsolve makes."""
    if case.kind == "conv" or case.per_sample:
        raise NotImplementedError(
            "XLA has no fast convolutions in a loop; samples differ in their numbers of evaluations"
        )
    calls = []

    def counted(t, y, w):
        calls.append(1)
        return field(t, y, w)

    with tf.GradientTape() as tape:
        tape.watch(y0)
        solution = keras_node.odeint(counted, y0, ts, args=weights, solver=solver)
        loss = loss_of(case, solution.ys)
    there = int(tf.reduce_max(solution.stats.num_evaluations))
    calls.clear()
    if case.gradient:
        tape.gradient(loss, y0)
    back = len(calls)

    @tf.function(jit_compile=True)
    def function(y0, weights):
        t = tf.zeros((), y0.dtype)

        def forwards(i, y):
            return i + 1, y + 1e-3 * field(t, y, weights)

        def backwards(i, y, adjoint, gradients):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([y, weights])
                dy = field(t, y, weights)
            da, *dw = tape.gradient(dy, [y, *weights], output_gradients=adjoint)
            gradients = [g + 1e-3 * d for g, d in zip(gradients, dw, strict=True)]
            return i + 1, y - 1e-3 * dy, adjoint + 1e-3 * da, gradients

        _, y1 = tf.while_loop(lambda i, _: i < there, forwards, (0, y0))
        if not case.gradient:
            return [], y1
        state = (0, y1, y1, [tf.zeros_like(w) for w in weights])
        _, y, adjoint, gradients = tf.while_loop(lambda i, *_: i < back, backwards, state)
        return [adjoint, *gradients], y

    def run():
        gradients, y1 = function(y0, weights)
        return [g.numpy() for g in gradients], y1.numpy(), there + back

    return run
