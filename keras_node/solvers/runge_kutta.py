"""The solver that a user chooses: an explicit Runge-Kutta method and the control of its step size."""

import dataclasses
import math
from typing import Any

import keras

from keras_node.arguments import number, one_of, positive_integer, positive_number
from keras_node.solvers.tableaus import TABLEAUS, ButcherTableau
from keras_node.step_size import ConstantSteps, PIDController


@keras.saving.register_keras_serializable(package="keras_node")
@dataclasses.dataclass(frozen=True, repr=False)
class RungeKutta:
    """An explicit Runge-Kutta method, with adaptive or constant steps.

    Adaptive steps keep the estimate `e` of a step's local error below the tolerances,

    `rms(e / (atol + rtol * max(|y0|, |y1|))) <= 1`,

    the root mean square taken over the whole state, or over each sample's with `per_sample`. They are the default,
    and need a method with an embedded error estimate: `heun`, `bosh3`, `dopri5`, `tsit5` or `dopri8`.

    Args:
        method: one of `euler`, `midpoint`, `heun`, `ralston`, `rk4`, `rk38`, `bosh3`, `dopri5`, `tsit5`, `dopri8`.
        rtol: relative tolerance of adaptive steps, positive. Defaults to `1e-3`.
        atol: absolute tolerance of adaptive steps, positive, in units of the state. Defaults to `1e-6`.
        step_size: constant steps of this length, in units of time. The last step to the end time is shorter.
        num_steps: constant steps, this many between two consecutive times of `ts`.
        max_steps: attempted steps after which a solve fails with status 1. Defaults to `4096`. Under XLA
            `DirectGradient` reserves memory for this many.
        per_sample: whether every sample of the batch has a time, a step size and an error of its own, so that its
            solution does not depend on the others in its batch. The state's first axis is then the batch. Without it
            the error is a mean over the batch, in which a single hard sample hides: one that moves among 999 that
            rest may be wrong by 400 % at the default tolerances. Results then also depend on the batch, below the
            tolerance: on the smaller last batch of `predict`, for one. Defaults to `False`.
        step_at: times at which a step ends and the field is evaluated afresh, for a field that has a jump or a kink
            there: a switch, a dose, a change of control. Up to such a time the field is seen as it is before, and
            from it on as it is after. Not with `num_steps`.
        first_step: length of the first attempted step of an adaptive solve, in units of time; `math.inf` attempts the
            whole way to the end. By default it is chosen at the cost of one evaluation.
        pcoeff: proportional coefficient of the PID step size controller. Defaults to `0.0`.
        icoeff: integral coefficient. Defaults to `1.0`: an I-controller.
        dcoeff: derivative coefficient. Defaults to `0.0`.
        safety: factor by which the next step is shorter than the estimate asks for. Defaults to `0.9`.
        min_factor: the least factor between two consecutive steps. Defaults to `0.2`.
        max_factor: the largest factor between two consecutive steps. Defaults to `10.0`.

    A solver cannot be changed; `dataclasses.replace(solver, rtol=1e-6)` makes another one. Solvers are equal if their
    options are.

    Raises:
        ValueError: for an unknown method, for a method without an error estimate that is asked to adapt, for
            `step_size` with `num_steps`, for values out of range, and for options of adaptive steps with constant ones.

    Example:
    >>> solver = keras_node.RungeKutta("dopri5", rtol=1e-5, atol=1e-8)
    >>> solution = keras_node.odeint(lambda y: -y, 1.0, [0.0, 1.0], solver=solver)
    >>> round(float(solution.ys[-1]), 4)
    0.3679

    Reference:

    - Hairer, Norsett & Wanner (1993), "Solving Ordinary Differential Equations I", II.4.
    - Soderlind (2003), "Digital filters in adaptive time-stepping".
    """

    method: str = "tsit5"
    _: dataclasses.KW_ONLY
    rtol: float = 1e-3
    atol: float = 1e-6
    step_size: float | None = None
    num_steps: int | None = None
    max_steps: int = 4096
    per_sample: bool = False
    step_at: tuple[float, ...] = ()
    first_step: float | None = None
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0

    def __post_init__(self):
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None or getattr(type(self), name) is not None:  # None only where it is the default
                object.__setattr__(self, name, check(name, value))
        self._check_together()

    @property
    def tableau(self) -> ButcherTableau:
        return TABLEAUS[self.method]

    @property
    def adaptive(self) -> bool:
        return self.step_size is None and self.num_steps is None

    @property
    def controller(self) -> ConstantSteps | PIDController:
        if not self.adaptive:
            return ConstantSteps()
        return PIDController(self.tableau.error_order, **{name: getattr(self, name) for name in _CONTROLLER})

    def get_config(self) -> dict:
        return {**self._options(), "step_at": list(self.step_at)}

    @classmethod
    def from_config(cls, config: dict) -> "RungeKutta":
        return cls(**config)

    def __repr__(self) -> str:
        changed = [f"{name}={value!r}" for name, value in self._changed().items() if name != "method"]
        return f"RungeKutta({', '.join([repr(self.method), *changed])})"

    def _options(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _changed(self) -> dict:
        """The options that are not the default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in self._options().items() if value != defaults[name]}

    def _check_together(self) -> None:
        if self.step_size is not None and self.num_steps is not None:
            raise ValueError(
                "Give either `step_size` or `num_steps`, not both. "
                f"Received: step_size={self.step_size}, num_steps={self.num_steps}"
            )
        if self.safety > 1 or self.min_factor >= 1 or self.max_factor <= 1:
            raise ValueError(
                "A controller needs `safety <= 1`, `min_factor < 1` and `max_factor > 1`. Received: "
                f"safety={self.safety}, min_factor={self.min_factor}, max_factor={self.max_factor}"
            )
        if self.adaptive and not self.tableau.embedded:
            able = ", ".join(name for name, tableau in TABLEAUS.items() if tableau.embedded)
            raise ValueError(
                f"Method {self.method!r} has no error estimate and cannot adapt its steps. Pass `num_steps` or "
                f"`step_size`, or choose one of {able}. Received: step_size=None, num_steps=None"
            )
        if not self.adaptive:
            self._refuse_unused((*_CONTROLLER, "first_step"), "constant steps")
        if self.num_steps is not None:
            self._refuse_unused(("max_steps", "step_at"), "`num_steps`")

    def _refuse_unused(self, options: tuple[str, ...], mode: str) -> None:
        unused = [f"{name}={value}" for name, value in self._changed().items() if name in options]
        if unused:
            raise ValueError(f"These options have no effect with {mode}; leave them out. Received: {', '.join(unused)}")


_CONTROLLER = tuple(field.name for field in dataclasses.fields(PIDController) if field.name != "error_order")


def _times(name: str, value: Any) -> tuple[float, ...]:
    try:
        times = tuple(float(t) for t in value)
    except (TypeError, ValueError):
        times = (math.nan,)
    if not all(math.isfinite(t) for t in times):
        raise ValueError(f"`{name}` must be a list of finite times, such as [0.5]. Received: {name}={value!r}")
    return times


_CHECKS = {
    "method": lambda name, value: one_of(name, value, TABLEAUS),
    "rtol": positive_number,
    "atol": positive_number,
    "step_size": positive_number,
    "num_steps": positive_integer,
    "max_steps": positive_integer,
    "per_sample": lambda name, value: bool(value),
    "step_at": _times,
    "first_step": positive_number,
    "pcoeff": number,
    "icoeff": number,
    "dcoeff": number,
    "safety": positive_number,
    "min_factor": positive_number,
    "max_factor": positive_number,
}
