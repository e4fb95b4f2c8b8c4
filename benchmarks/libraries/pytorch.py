"""torchdiffeq's adjoint, or automatic differentiation where that is unstable, and torchode with the latter."""

import dataclasses

import numpy as np
import torch
import torchdiffeq
import torchode

METHODS = ["torchdiffeq adjoint", "torchdiffeq", "torchode"]

# TensorFlow and JAX choose a GPU by themselves.
if torch.cuda.is_available():
    torch.set_default_device("cuda")


def array(x):
    """The values of a tensor on any device."""
    return x.detach().cpu().numpy()


def versions() -> dict:
    """The versions in use."""
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("torch", "torchdiffeq", "torchode")}


class Field(torch.nn.Module):
    """The right-hand side, which counts its evaluations."""

    def __init__(self, case, weights):
        super().__init__()
        self.case = case
        self.w = torch.nn.ParameterList([torch.nn.Parameter(w) for w in weights])
        self.evaluations = 0

    def forward(self, t, y):
        self.evaluations += 1
        w = self.w
        if self.case.kind == "mlp":
            return torch.tanh(y @ w[0] + w[1]) @ w[2] + w[3]
        if self.case.kind == "linear":
            return y @ w[0]
        if self.case.kind == "conv":
            conv = torch.nn.functional.conv2d
            return conv(torch.tanh(conv(y, w[0], padding=1)), w[1], padding=1)
        return torch.stack([y[:, 1], w[0] * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], dim=-1)


def make(case, arrays, method):
    """A training step by torchdiffeq or torchode."""
    if method == "torchode" and case.kind in ("conv", "ode_rnn"):
        raise NotImplementedError("its state has two axes; it is not measured inside another loop")
    if (method == "torchdiffeq") != case.unstable_backwards and method != "torchode":
        raise NotImplementedError("the adjoint, where it is stable")
    if case.kind == "ode_rnn":
        return recurrent(case, arrays)
    y0 = arrays["y0"]
    weights = [arrays[name] for name in sorted(arrays) if name.startswith("w")]
    if case.kind == "conv":  # channels first, as torch has it
        y0, weights = np.moveaxis(y0, -1, 1), [w.transpose(3, 2, 0, 1) for w in weights]
    y0 = torch.tensor(np.ascontiguousarray(y0), requires_grad=True)
    ts = torch.tensor(arrays["ts"])
    field = Field(case, [torch.tensor(np.ascontiguousarray(w)) for w in weights])
    if method == "torchode":
        term = torchode.ODETerm(field)
        stepper = torchode.Tsit5(term=term)
        controller = torchode.IntegralController(atol=case.rtol, rtol=case.rtol, term=term)
        solver = torchode.AutoDiffAdjoint(stepper, controller)
        times = ts.expand(len(y0), -1)

    def solve():
        if method == "torchode":
            solution = solver.solve(torchode.InitialValueProblem(y0=y0, t_eval=times))
            return solution.ys.transpose(0, 1), solution.stats["n_steps"].double().mean().item()
        odeint = torchdiffeq.odeint if method == "torchdiffeq" else torchdiffeq.odeint_adjoint
        return odeint(field, y0, ts, rtol=case.rtol, atol=case.rtol, method="dopri5"), None

    def run():
        y0.grad = None
        field.zero_grad(set_to_none=True)
        field.evaluations = 0
        with torch.set_grad_enabled(case.gradient):
            ys, steps = solve()
        evaluations = field.evaluations if steps is None else 6 * steps + 2
        if not case.gradient:
            return [], array(ys[-1]), evaluations
        (ys if case.num_times > 2 else ys[-1]).square().mean().backward()
        gradients = [array(y0.grad), *(array(w.grad) for w in field.w)]
        y1 = array(ys[-1])
        if case.kind == "conv":
            gradients = [np.moveaxis(gradients[0], 1, -1), *(g.transpose(2, 3, 1, 0) for g in gradients[1:])]
            y1 = np.moveaxis(y1, 1, -1)
        return gradients, y1, evaluations

    return run


class Scaled(torch.nn.Module):
    """A field in scaled time, for samples that move for times of their own."""

    def __init__(self, field, elapsed):
        super().__init__()
        self.field, self.elapsed = field, elapsed

    def forward(self, s, h):
        return self.elapsed * self.field(s, h)


def recurrent(case, arrays):
    """A training step of an ODE-RNN, its state moved by torchdiffeq's adjoint from one observation to the next."""
    features, units = case.sizes[1:3]
    weights = [torch.tensor(arrays[f"w{i}"]) for i in range(7)]
    field = Field(dataclasses.replace(case, kind="mlp"), weights[:4])
    cell = torch.nn.GRUCell(features, units, dtype=weights[0].dtype)
    order = torch.arange(3 * units).reshape(3, units)[[1, 0, 2]].flatten()  # Keras has the update gate first
    kernels = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    with torch.no_grad():
        for kernel, value in zip(kernels, (weights[4].T, weights[5].T, *weights[6]), strict=True):
            kernel.copy_(value[order])
    x = torch.tensor(arrays["y0"], requires_grad=True)
    elapsed = torch.tensor(np.diff(arrays["ts"], axis=1, prepend=arrays["ts"][:, :1]))
    # One for each interval: on the way back each is asked for its own.
    fields = [Scaled(field, elapsed[:, i : i + 1]) for i in range(case.num_times)]
    span = torch.tensor([0.0, 1.0], dtype=x.dtype)
    options = {"rtol": case.rtol, "atol": case.rtol, "method": "dopri5"}

    def run():
        x.grad = None
        field.zero_grad(set_to_none=True)
        cell.zero_grad(set_to_none=True)
        h, hs = torch.zeros(len(x), units, dtype=x.dtype), []
        for i in range(case.num_times):
            h = cell(x[:, i], torchdiffeq.odeint_adjoint(fields[i], h, span, **options)[-1])
            hs.append(h)
        torch.stack(hs).square().mean().backward()
        of_cell = [kernel.grad[order] for kernel in kernels]
        of_cell = [of_cell[0].T, of_cell[1].T, torch.stack(of_cell[2:])]
        gradients = [x.grad, *(w.grad for w in field.w), *of_cell]
        return [array(g) for g in gradients], array(h), None

    return run
