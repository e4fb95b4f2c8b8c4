"""TensorFlow Probability's Dormand-Prince method with its adjoint, under XLA."""

import tensorflow as tf
import tensorflow_probability as tfp

from libraries.ours import field_of, loss_of

METHODS = ["adjoint"]


def versions() -> dict:
    """The versions in use."""
    return {"tensorflow_probability": tfp.__version__}


def make(case, arrays, method):
    """A training step by TensorFlow Probability."""
    del method
    if case.kind == "ode_rnn" or (case.gradient and case.unstable_backwards):
        raise NotImplementedError("it has no layers; its adjoint solves backwards")
    y0, ts = tf.constant(arrays["y0"]), arrays["ts"]
    weights = [tf.constant(arrays[name]) for name in sorted(arrays) if name.startswith("w")]
    field = field_of(case)
    solver = tfp.math.ode.DormandPrince(rtol=case.rtol, atol=case.rtol)

    def solve(y0, weights):
        return solver.solve(
            lambda t, y, **w: field(t, y, [w[f"w{i}"] for i in range(len(weights))]),
            ts[0],
            y0,
            ts[1:],
            constants={f"w{i}": w for i, w in enumerate(weights)},
        )

    @tf.function(jit_compile=True)
    def function(y0, weights):
        if not case.gradient:
            result = solve(y0, weights)
            return [], result.states[-1], result.diagnostics.num_ode_fn_evaluations
        with tf.GradientTape() as tape:
            tape.watch([y0, weights])
            result = solve(y0, weights)
            loss = loss_of(case, tf.concat([y0[None], result.states], 0))
        return tape.gradient(loss, [y0, *weights]), result.states[-1], result.diagnostics.num_ode_fn_evaluations

    def run():
        gradients, y1, evaluations = function(y0, weights)
        return [g.numpy() for g in gradients], y1.numpy(), evaluations.numpy()

    return run
