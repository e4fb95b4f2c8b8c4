"""diffrax under jit, with each of its gradients."""

import importlib.metadata

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)

METHODS = ["recursive checkpoints", "backsolve"]


def versions() -> dict:
    """The versions in use."""
    return {name: importlib.metadata.version(name) for name in ("diffrax", "jax")}


def field_of(case):
    """The right-hand side `f(t, y, weights)`."""
    if case.kind == "mlp":
        return lambda t, y, w: jnp.tanh(y @ w[0] + w[1]) @ w[2] + w[3]
    if case.kind == "linear":
        return lambda t, y, w: y @ w[0]
    if case.kind == "conv":

        def conv(y, w):
            return jax.lax.conv_general_dilated(y, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        return lambda t, y, w: conv(jnp.tanh(conv(y, w[0])), w[1])
    return lambda t, y, w: jnp.stack([y[..., 1], w[0] * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], axis=-1)


def make(case, arrays, method):
    """A training step by diffrax."""
    if not case.gradient and method == "backsolve":
        raise NotImplementedError("without a gradient it is the other's solve")
    field = field_of(case)
    adjoint = diffrax.BacksolveAdjoint() if method == "backsolve" else diffrax.RecursiveCheckpointAdjoint()
    dtype = arrays["y0"].dtype
    saveat = diffrax.SaveAt(ts=jnp.asarray(arrays["ts"])) if case.num_times > 2 else diffrax.SaveAt(t1=True)

    def solve(y0, weights):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            np.asarray(arrays["ts"][0], dtype),
            np.asarray(arrays["ts"][-1], dtype),
            None,
            y0,
            args=weights,
            stepsize_controller=diffrax.PIDController(rtol=case.rtol, atol=case.rtol),
            saveat=saveat,
            adjoint=adjoint,
        )

    def loss(inputs):
        y0, weights = inputs
        if case.per_sample:
            solution = jax.vmap(solve)(y0, weights)
            ys, y1 = solution.ys, solution.ys[:, -1]
        else:
            solution = solve(y0, weights)
            ys, y1 = solution.ys, solution.ys[-1]
        return jnp.mean(ys**2), (y1, solution.stats["num_steps"])

    function = jax.jit(jax.value_and_grad(loss, has_aux=True) if case.gradient else lambda x: (loss(x), ((), ())))
    inputs = (jnp.asarray(arrays["y0"]), [jnp.asarray(arrays[n]) for n in sorted(arrays) if n.startswith("w")])

    def run():
        (_, (y1, steps)), (dy0, dweights) = function(inputs)
        # Six evaluations a step, and two at the start.
        gradients = [np.asarray(g) for g in (dy0, *dweights)] if case.gradient else []
        return gradients, np.asarray(y1), 6 * float(jnp.mean(steps)) + 2

    return run
