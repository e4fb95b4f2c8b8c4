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


def adjoint_of(method):
    """The gradient of this name."""
    return diffrax.BacksolveAdjoint() if method == "backsolve" else diffrax.RecursiveCheckpointAdjoint()


def make(case, arrays, method):
    """A training step by diffrax."""
    if method == "backsolve" and (case.unstable_backwards or not case.gradient):
        raise NotImplementedError("the solve backwards is unstable, or there is none")
    if case.kind == "ode_rnn":
        return recurrent(case, arrays, method)
    field = field_of(case)
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
            adjoint=adjoint_of(method),
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
        return gradients, np.asarray(y1), 6 * np.asarray(steps).mean() + 2

    return run


def recurrent(case, arrays, method):
    """A training step of an ODE-RNN, whose samples share steps in scaled time, from one observation to the next."""
    controller = diffrax.PIDController(rtol=case.rtol, atol=case.rtol)
    units = case.sizes[2]

    def field(s, h, args):
        elapsed, w = args
        return elapsed * (jnp.tanh(h @ w[0] + w[1]) @ w[2] + w[3])

    def cell(x, h, w):
        """Keras' GRU cell, its reset gate after the product."""
        of_x, of_h = x @ w[4] + w[6][0], h @ w[5] + w[6][1]
        (z_x, r_x, n_x), (z_h, r_h, n_h) = jnp.split(of_x, 3, axis=-1), jnp.split(of_h, 3, axis=-1)
        z = jax.nn.sigmoid(z_x + z_h)
        return z * h + (1 - z) * jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h)

    def loss(inputs, times):
        xs, w = inputs

        def observe(h, observation):
            x, elapsed = observation
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                diffrax.Tsit5(),
                np.asarray(0, h.dtype),
                np.asarray(1, h.dtype),
                None,
                h,
                args=(elapsed[:, None], w),
                stepsize_controller=controller,
                adjoint=adjoint_of(method),
            )
            h = cell(x, solution.ys[-1], w)
            return h, h

        elapsed = jnp.diff(times, axis=1, prepend=times[:, :1])
        h = jnp.zeros((len(xs), units), xs.dtype)
        h, hs = jax.lax.scan(observe, h, (jnp.swapaxes(xs, 0, 1), elapsed.T))
        return jnp.mean(hs**2), h

    function = jax.jit(jax.value_and_grad(loss, has_aux=True))
    inputs = (jnp.asarray(arrays["y0"]), [jnp.asarray(arrays[n]) for n in sorted(arrays) if n.startswith("w")])
    times = jnp.asarray(arrays["ts"])

    def run():
        (_, y1), (dx, dweights) = function(inputs, times)
        return [np.asarray(g) for g in (dx, *dweights)], np.asarray(y1), None

    return run
