"""The solver that a user selects: a Runge-Kutta method, the control of its step size and of Newton's method."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras

from keras_node.arguments import number, one_of, positive_integer, positive_number, tolerance
from keras_node.solvers.butcher_tableau import ButcherTableau
from keras_node.solvers.tableaus import TABLEAUS
from keras_node.step_size import ConstantSteps, PIDController


@keras.saving.register_keras_serializable(package="keras_node")
@dataclasses.dataclass(frozen=True, repr=False)
class RungeKutta:
    """A Runge-Kutta method, explicit, implicit or symplectic, with adaptive or constant steps.

    A step is adaptive by default. The solver accepts a step from `y0` to `y1` if the estimate `e` of its local error
    is below the tolerances:

    `rms(e / (atol + rtol * max(|y0|, |y1|))) <= 1`

    The root mean square is taken over the whole state, except samples for which no time passes, or over each sample
    with `per_sample`. Adaptive steps need a method with an embedded error estimate: `heun`, `bosh3`, `dopri5`, `tsit5`,
    `dopri8`, or an implicit one.

    The implicit methods `trbdf2`, `kvaerno3`, `esdirk43` and `esdirk54` are for stiff problems, in which some
    components settle much faster than the solution of interest changes. An explicit method must then take tiny steps.
    An implicit one solves an equation at every stage by Newton's method, so a step costs more, but its length depends
    on the accuracy alone.

    For an implicit method the first axis of the state is the batch. Only if a tensor of the state has less than two
    axes, and samples do not have their own steps or times, is the whole state one sample. Each sample of `n` numbers
    has its own Jacobian, so samples must not influence each other. A step takes `n` vector-Jacobian products and the
    inverse of an `(n, n)` matrix. Up to a few dozen numbers this is cheap; above some hundred it is slow. The
    derivatives of the result with respect to components that have died out are nearly zero, as for every L-stable
    method.

    The symplectic methods `leapfrog` and `yoshida4` are for positions and velocities, such as those of
    `keras_node.SecondOrderField` and `keras_node.HamiltonianField`, with constant steps. Their energy does not drift:
    its error stays bounded over any number of steps, where that of other methods grows. The rate of the positions must
    depend on the velocities (or momenta) only, and that of the velocities on the positions and the time only; otherwise
    the solve fails with status 8. A step ends at each of `ts`. Under XLA, and in a graph for a state that is a tuple
    `(q, v)`, a step of `leapfrog` takes one evaluation of the acceleration and one of `yoshida4` three, because what
    nothing uses is left out. Elsewhere they take three and seven evaluations of the whole field.

    You cannot change a solver, but `dataclasses.replace(solver, rtol=1e-6)` makes a changed copy. Two solvers are equal
    if their options are equal.

    Args:
        method: one of `euler`, `midpoint`, `heun`, `ralston`, `rk4`, `rk38`, `bosh3`, `dopri5`, `tsit5`, `dopri8`, of
            the implicit `trbdf2`, `kvaerno3`, `esdirk43`, `esdirk54`, or of the symplectic `leapfrog`, `yoshida4`.
            Defaults to `"tsit5"`.
        rtol: relative tolerance of adaptive steps and of Newton's method, a positive number, or a list of them, one for
            each entry on the last axis of the state. Defaults to `1e-3`.
        atol: absolute tolerance of the same, in units of the state; a positive number or a list. If the entries of the
            state have very different sizes, give each its own. Defaults to `1e-6`.
        step_size: length of constant steps, in units of time. The last step to the end time may be shorter. Defaults
            to `None`.
        num_steps: number of constant steps between two consecutive times of `ts`. Defaults to `None`. Without
            `step_size` and `num_steps`, steps are adaptive.
        max_steps: number of attempted steps after which a solve fails with status 1. Defaults to `4096`. Under XLA,
            `DirectGradient` reserves memory for this number of steps. Not with `num_steps`.
        per_sample: whether every sample of the batch has its own time, step size and error, so that its solution does
            not depend on the other samples. Then the first axis of the state must be the batch. Otherwise the error is
            a mean over the batch, and it can hide a single hard sample: at the default tolerances, one sample that
            moves among 999 samples at rest may be wrong by 400 %. Then results also depend on the batch, within the
            tolerance, for example on the smaller last batch of `predict`. Defaults to `False`.
        step_at: times at which a step ends and the field is evaluated again, because the field has a jump or a kink
            there: a switch, a dose, a change of control. The steps before such a time see the field before the jump,
            and the steps after it see the field after the jump. Not with `num_steps`. Defaults to `()`.
        first_step: length of the first attempted step of an adaptive solve, in units of time. With `math.inf`, the
            first step tries to reach the end. Defaults to `None`: the solver chooses it, which takes one evaluation.
        pcoeff: proportional coefficient of the PID controller of the step size. Defaults to `0.0`.
        icoeff: integral coefficient. Defaults to `1.0`, for an I-controller.
        dcoeff: derivative coefficient. Defaults to `0.0`.
        safety: factor that makes the next step shorter than the controller would choose, at most 1. Defaults to `0.9`.
        min_factor: smallest factor between two consecutive steps, below 1. Defaults to `0.2`.
        max_factor: largest factor between two consecutive steps, above 1. Defaults to `10.0`.
        newton_tolerance: the part of the allowed error of a step that a stage of an implicit method may have when its
            iterations end. Defaults to `0.03`.
        max_newton_iterations: number of iterations after which Newton's method fails at a stage. An adaptive step is
            then tried again, shorter. With constant steps the solve fails with status 5. Defaults to `10`.

    Raises:
        ValueError: for an unknown method, for adaptive steps with a method without an error estimate, for `step_size`
            together with `num_steps`, for values out of range, and for options that have no effect.

    Example:
        >>> solver = keras_node.RungeKutta("dopri5", rtol=1e-5, atol=1e-8)
        >>> solution = keras_node.odeint(lambda y: -y, 1.0, [0.0, 1.0], solver=solver)
        >>> round(float(solution.ys[-1]), 4)
        0.3679

    Reference:

        - Hairer, Norsett & Wanner (1993), "Solving Ordinary Differential Equations I", II.4, for error norm, first step
          and step control.
        - Söderlind (2002), "Automatic control and adaptive time-stepping", Numer. Algorithms 31, and (2003), "Digital
          filters in adaptive time-stepping", ACM Trans. Math. Softw. 29(1), for the PID controller.
        - Tsitouras (2011), "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption",
          Comput. Math. Appl. 62(2), for `tsit5`.
        - Bogacki & Shampine (1989), "A 3(2) pair of Runge-Kutta formulas", Appl. Math. Lett. 2(4), for `bosh3`.
        - Dormand & Prince (1980), "A family of embedded Runge-Kutta formulae", J. Comp. Appl. Math. 6(1), for `dopri5`.
        - Prince & Dormand (1981), "High order embedded Runge-Kutta formulae", J. Comp. Appl. Math. 7(1), for `dopri8`.
        - Hosea & Shampine (1996), "Analysis and implementation of TR-BDF2", Appl. Numer. Math. 20, for `trbdf2`.
        - Kvaerno (2004), "Singly diagonally implicit Runge-Kutta methods with an explicit first stage", BIT 44(3), for
          `kvaerno3`.
        - Kennedy & Carpenter (2019), "Diagonally implicit Runge-Kutta methods for stiff ODEs", Appl. Numer. Math. 146,
          for `esdirk43` (ESDIRK4(3)7L[2]SA) and `esdirk54` (ESDIRK5(4)7L[2]SA2).
        - Hairer, Lubich & Wanner (2006), "Geometric Numerical Integration", I.3 and II.4, for `leapfrog` and
          `yoshida4`.
    """

    method: str = "tsit5"
    _: dataclasses.KW_ONLY
    rtol: float | tuple[float, ...] = 1e-3
    atol: float | tuple[float, ...] = 1e-6
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
    newton_tolerance: float = 0.03
    max_newton_iterations: int = 10

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None or getattr(type(self), name) is not None:  # `None` is allowed only as a default
                object.__setattr__(self, name, check(name, value))
        self._check_together()

    @property
    def tableau(self) -> ButcherTableau:
        """The coefficients of the method."""
        return TABLEAUS[self.method]

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its steps by their error."""
        return self.step_size is None and self.num_steps is None

    @property
    def controller(self) -> ConstantSteps | PIDController:
        """The object that accepts steps and chooses their sizes."""
        if not self.adaptive:
            return ConstantSteps()
        assert self.tableau.error_order is not None  # `_check_together` makes sure
        return PIDController(self.tableau.error_order, **{name: getattr(self, name) for name in _CONTROLLER})

    def get_config(self) -> dict[str, Any]:
        options = self._options()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RungeKutta":
        return cls(**config)

    def __repr__(self) -> str:
        changed = [f"{name}={value!r}" for name, value in self._changed().items() if name != "method"]
        return f"RungeKutta({', '.join([repr(self.method), *changed])})"

    def _options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _changed(self) -> dict[str, Any]:
        """The options that differ from the default."""
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
                "The step size controller needs `safety <= 1`, `min_factor < 1` and `max_factor > 1`. Received: "
                f"safety={self.safety}, min_factor={self.min_factor}, max_factor={self.max_factor}"
            )
        if self.adaptive and not self.tableau.embedded:
            able = ", ".join(name for name, tableau in TABLEAUS.items() if tableau.embedded)
            raise ValueError(
                f"Method {self.method!r} has no error estimate, so its steps cannot be adaptive. Pass `num_steps` or "
                f"`step_size`, or use one of {able}. Received: method={self.method!r}, step_size=None, num_steps=None"
            )
        if not self.adaptive:
            # The iterations of an implicit method need tolerances too.
            needed = ("rtol", "atol") if self.tableau.implicit else ()
            unused = tuple(name for name in (*_CONTROLLER, "first_step") if name not in needed)
            self._refuse_unused(unused, "constant steps")
        if not self.tableau.implicit:
            self._refuse_unused(("newton_tolerance", "max_newton_iterations"), f"the explicit method {self.method!r}")
        if self.num_steps is not None:
            self._refuse_unused(("max_steps", "step_at"), "`num_steps`")

    def _refuse_unused(self, options: tuple[str, ...], mode: str) -> None:
        unused = [f"{name}={value}" for name, value in self._changed().items() if name in options]
        if unused:
            raise ValueError(f"These options have no effect with {mode}: leave them out. Received: {', '.join(unused)}")


_CONTROLLER = tuple(field.name for field in dataclasses.fields(PIDController) if field.name != "error_order")


def _times(name: str, value: Any) -> tuple[float, ...]:
    """Returns `value` as a tuple of finite times."""
    try:
        times = tuple(float(t) for t in value)
    except (TypeError, ValueError):
        times = (math.nan,)
    if not all(math.isfinite(t) for t in times):
        raise ValueError(f"`{name}` must be a list of finite times, such as [0.5]. Received: {name}={value!r}")
    return times


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "method": lambda name, value: one_of(name, value, TABLEAUS),
    "rtol": tolerance,
    "atol": tolerance,
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
    "newton_tolerance": positive_number,
    "max_newton_iterations": positive_integer,
}
