"""A layer of continuous depth."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import keras
import tensorflow as tf
from keras import ops

from keras_node.arguments import non_negative_integer, positive_integer
from keras_node.autograph import without_autograph
from keras_node.events import Event, as_events
from keras_node.layers.call_times import (
    args_to_call,
    check_own_times,
    fixed_time,
    jumps_to_call,
    jumps_to_solve,
    shape_of,
    times_to_call,
    times_to_solve,
)
from keras_node.layers.masks import Masked, known, with_mask
from keras_node.layers.output_shapes import OutputShapes, map_shapes, specs
from keras_node.layers.path_penalties import PathPenalties
from keras_node.signatures import FieldCall, build, call_arguments
from keras_node.solve_options import Gradient, Solver, SolvingLayer
from keras_node.times import prepare_times
from keras_node.trees import Nest


@keras.saving.register_keras_serializable(package="keras_node")
class ODELayer(SolvingLayer):
    """Solves an ODE that starts at the input of the layer.

    `dy/dt = f(t, y)`

    `y(t1) = inputs + integral of f(t, y(t)) dt from t0 to t1`

    The output is the state at `t1` or, if you pass `ts`, the states at these times. The layer is a residual network of
    continuous depth. Every sample of a batch follows the same field.

    Args:
        vector_field: the field `f`, a Keras layer or model, or a callable registered with
            `keras.saving.register_keras_serializable`. It takes `(y)`, `(t, y)` or `(t, y, args)` and returns the
            shape of `y`. A functional model has the inputs `[t, y]` or `[t, y, args]`, and receives `t` in the shape of
            its input. For an implicit method it may have a method `jacobian`, see `keras_node.odeint`. Noise inside the
            field (dropout) is drawn once for each solve. A field that updates a state at
            every evaluation (BatchNormalization in training) raises an error. If several layers share a field, Keras
            saves its weights only once and cannot load the model from a `.keras` file, as with its own wrappers:
            build the model in code and call `load_weights`.
        t0: time of the input, a number in any unit. Defaults to `0.0`.
        t1: time of the output, a number in the same unit, before or after `t0`. Defaults to `1.0`.
        solver: a `keras_node.RungeKutta`, or the name of a method. Defaults to `"tsit5"`.
        gradient: how to differentiate the solve: `"backsolve"`, `"checkpointed"`, `"direct"`, `"reversible"`, or an
            object such as `keras_node.BacksolveAdjoint()`. Defaults to `None`, for `"backsolve"`; with an implicit
            method `"checkpointed"`, because a stiff field cannot be solved backward; and with a symplectic method
            `"reversible"`.
        event: a `keras_node.Event` or a list of them. A sample stops where a terminal event happens to it, and its
            later states are that at the event. Defaults to `None`.
        max_events: the largest number of events of a sample if not all of them are terminal, an integer of 1 or more.
            Defaults to `32`.
        return_events: whether to return the events as well. Defaults to `False`.
        augment_dims: number of zeros to append to the last axis of the input, an integer of 0 or more. In the extra
            dimensions, trajectories can pass each other (augmented neural ODE). Defaults to `0`.
        kinetic_energy: weight of a penalty on the speed of the state, 0 or more: the integral of `||f||^2` over time,
            the mean over samples (RNODE). It makes paths short and straight, so the solver can take longer steps. In
            training the layer adds an estimate of it to its losses, as a regularizer does. See "Penalties" below.
            Defaults to `0.0`.
        local_error: weight of a penalty on the error that the solver estimates, 0 or more: the length of a step,
            relative to the length that its estimated error allows. It is in proportion to the number of steps. Defaults
            to `0.0`.
        jit_compile: whether to compile the solve with XLA, even if the rest of the model is not compiled: `True`,
            `False` or `"auto"` (default). `"auto"` compiles in training. On a CPU it begins with that after 200 solves,
            so that a short training does not wait for XLA, and only for batches of the largest size. It does not
            compile with `"direct"` nor, on a CPU, if the field contains convolutions; `odeint` lists some more
            exceptions. The choice is separate from that of `model.compile`: `jit_compile=False` there does not stop the
            layer.
        track_stats: whether the model gets metrics of the work of the solves, forward and backward: evaluations,
            steps, rejected steps, steps that are bound by stability, and failures. They appear in the logs of `fit`
            and `evaluate` (see `keras_node.SolverMonitor`). Their names begin with the name of the layer, so give
            layers that count different names, in nested models too. A call without a known `training` counts nothing,
            and gradients of solves with resets or jumps are not counted.
            Defaults to `False`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: the state at `t0`, a float tensor `(batch, ...)`, or a nest (tuple, list, dict) of them.
        ts: times of the output, `(T,)`, or `(batch, T)` if each sample has its own times, in the unit of `t0`. They
            must be monotonic, beginning at `t0`. The field sees `t` as it runs from `t0` to the last time; if it does
            not use `t`, only differences of times matter. Numbers and arrays are constants, and tensors and variables
            have gradients. For their precision see `odeint`. Defaults to `None`, for the state at `t1`.
        args: nest of tensors for a field `f(t, y, args)`. Floats and arrays of them take the precision of the
            state. Defaults to `None`.
        jumps: a pair `(times, amounts)`. At each of the times, `(D,)` or `(batch, D)`, the solve adds an amount to the
            state: `(D, ..., features)`, or `(batch, D, ..., features)` if each sample has its own. See
            `keras_node.odeint`. Defaults to `None`.
        training: Python boolean, passed to the field.
        mask: boolean, with the shape of the state up to the axis that it masks. By default the mask that a layer such
            as `Masking` or `Embedding` gave to `inputs`.
        inputs_mask: Keras passes the mask of `inputs` here; pass `mask` instead.

    Input shape:
        `(batch, ..., features)`, or a nest of such shapes.

    Output shape:
        The input shape, with a last axis that is longer by `augment_dims`. With `ts`, `(batch, T, ..., features)`.

        With `return_events`, the layer returns four more outputs after this one, in the order of
        `keras_node.EventHistory`: the times of the events, `(batch, M)`; the number of each event in the list `event`,
        `(batch, M)`; the states before the events, `(batch, M, ..., features)`; and how many events there were,
        `(batch,)`. `M` is `max_events`, or 1 if all events are terminal. Where there was no event, times and states are
        NaN and the number is -1.

    Masking:
        The mask is passed to a field that takes `mask`. The layer solves masked steps like the others. The output
        carries the mask; with `ts` the mask is repeated for each time, `(batch, T, ...)`.

    Penalties:
        `kinetic_energy` and `local_error` are estimated at one time `t` of the solve, which is drawn for each batch
        from the uniform distribution between the first time and the last. For `kinetic_energy` this is
        `|t1 - t0| ||f(t, y(t))||^2`, whose mean over `t` is the integral. For `local_error` the layer takes one step
        from `y(t)`, as long as the accepted steps of the solve on average and not beyond the last time. If `E` is the
        norm of its estimated error in units of the tolerances (see `keras_node.RungeKutta`) and `q` is the order of the
        estimate, the penalty is `E ** (1 / q)`. The solver accepts a step if it is 1 or less. Below 0.1 it has no
        gradient.

        So the penalties cost one evaluation, and as many as a step has, and they have gradients with every `gradient`.
        Masked steps count like the others. With events or jumps, or with both `num_steps` and `ts`, there can be no
        penalties. `local_error` needs a smooth field (`tanh` and not `relu`), an explicit method with an error
        estimate, and no `step_at`; with constant steps the units are the default tolerances. Inference is not changed.

    Raises:
        ValueError: for an option out of range, for `return_events` without an `event`, for a penalty that the solver or
            the call does not allow, and for `ts` of another shape or not monotonic.
        TypeError: for inputs that are not floating-point.
        tf.errors.InvalidArgumentError: if a solve fails (too many steps, a NaN, or a step size that becomes too
            small). In a model that is compiled with XLA nothing can raise; the output is NaN instead.

    Example:
        >>> field = keras.Sequential([keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(8)])
        >>> layer = keras_node.ODELayer(field)
        >>> x = keras.random.normal((4, 8))
        >>> layer(x).shape
        TensorShape([4, 8])
        >>> layer(x, ts=[0.0, 0.5, 1.0]).shape
        TensorShape([4, 3, 8])

    Reference:

        - Chen, Rubanova, Bettencourt & Duvenaud (2018), "Neural Ordinary Differential Equations", arXiv:1806.07366.
        - Dupont, Doucet & Teh (2019), "Augmented Neural ODEs", arXiv:1904.01681.
        - Finlay, Jacobsen, Nurbekyan & Oberman (2020), "How to Train Your Neural ODE: the World of Jacobian and Kinetic
          Regularization", arXiv:2002.02798: `kinetic_energy`.
        - Pal, Ma, Shah & Rackauckas (2021), "Opening the Blackbox: Accelerating Neural Differential Equations by
          Regularizing Internal Solver Heuristics", ICML: `local_error`.
        - Pal, Edelman & Rackauckas (2023), "Locally Regularized Neural Differential Equations: Some Black Boxes Were
          Meant to Remain Closed!", arXiv:2303.02262: penalties at random times.
    """

    nested: ClassVar = {"vector_field": "vector_field", "event": "event"}

    def __init__(
        self,
        vector_field: keras.Layer | Callable,
        t0: float = 0.0,
        t1: float = 1.0,
        *,
        solver: Solver = "tsit5",
        gradient: Gradient | None = None,
        event: Event | Sequence[Event] | None = None,
        max_events: int = 32,
        return_events: bool = False,
        augment_dims: int = 0,
        kinetic_energy: float = 0.0,
        local_error: float = 0.0,
        jit_compile: bool | str = "auto",
        track_stats: bool = False,
        **kwargs: Any,
    ) -> None:
        # Without autocast, the state keeps its precision under a mixed policy. The field casts its own input.
        super().__init__(autocast=False, **kwargs)
        call_arguments(vector_field)  # raises for a field that cannot be called
        self.vector_field = vector_field
        self.t0 = fixed_time("t0", t0)
        self.t1 = fixed_time("t1", t1)
        self.event = event
        self.event_layers = [layer for each in as_events(event) for layer in each.layers]  # Keras tracks these
        self.max_events = positive_integer("max_events", max_events)
        self.return_events = bool(return_events)
        if return_events and not as_events(event):
            raise ValueError("`return_events` needs an `event`. Received: return_events=True, event=None")
        self.augment_dims = non_negative_integer("augment_dims", augment_dims)
        terminal = all(each.terminal for each in as_events(event))
        self._shapes = OutputShapes(self.augment_dims, 1 if terminal else self.max_events)
        self.set_options(solver, gradient, jit_compile, track_stats, counts_backward=terminal)
        self.penalties = PathPenalties(kinetic_energy, local_error)
        if self.penalties:
            self.penalties.check(self.solver, bool(as_events(event)), asked_for_times=False)
            self.seed_generator = keras.random.SeedGenerator()
        self.supports_masking = True
        self.masked = Masked(autocast=False, dtype=self.dtype_policy)

    @property
    def kinetic_energy(self) -> float:
        return self.penalties.kinetic_energy

    @property
    def local_error(self) -> float:
        return self.penalties.local_error

    @without_autograph
    def __call__(self, inputs: Nest, ts: Any = None, args: Any = None, jumps: Any = None, **kwargs: Any) -> Nest:
        arguments = {
            "ts": times_to_call(ts, self.variable_dtype),
            "args": args_to_call(args, self.variable_dtype),
            "jumps": jumps_to_call(jumps, self.variable_dtype),
        }
        # The `call` of a subclass need not take `args` and `jumps`. Keras takes lists of numbers only by keyword.
        given = {name: x for name, x in arguments.items() if x is not None}
        return super().__call__(inputs, **given, **kwargs)

    def build(self, inputs_shape: Nest, ts_shape: tuple | None = None) -> None:
        # Keras does not pass the shapes of an argument called `args`. A field that takes it is built by the first call.
        self._build_nested(inputs_shape, ts_shape is not None and len(ts_shape) == 2, None)

    def call(
        self,
        inputs: Nest,
        ts: Any = None,
        args: Any = None,
        jumps: Any = None,
        training: bool | None = None,
        mask: Nest = None,
        inputs_mask: Nest = None,
    ) -> Nest:
        mask = known(inputs_mask if mask is None else mask)
        y0 = tf.nest.map_structure(self._initial_state, inputs)
        if ts is not None:
            check_own_times(ts, y0, self)
        times = self._times(ts)
        jumps = jumps_to_solve(jumps, y0, self.augment_dims, self.variable_dtype)
        solve = self.options.solve
        if self.penalties and training is not False:
            self.penalties.check(self.solver, bool(as_events(self.event)) or jumps is not None, ts is not None)
            solve = functools.partial(self.penalties.solve, self) if training else solve
        solution = solve(
            self.vector_field,
            y0,
            times,
            args=args,
            event=self.event,
            max_events=self.max_events,
            jumps=jumps,
            training=training,
            mask=mask,
        )

        def output(y: tf.Tensor) -> tf.Tensor:
            y = y[-1] if ts is None else ops.moveaxis(y[1:], 0, 1)
            return ops.cast(y, self.compute_dtype)

        outputs = with_mask(self.masked, tf.nest.map_structure(output, solution.ys), mask, ts)
        if not self.return_events:
            return outputs
        assert solution.events is not None
        times, index, states, count = solution.events
        states = tf.nest.map_structure(lambda y: ops.cast(ops.moveaxis(y, 0, 1), self.compute_dtype), states)
        return outputs, ops.transpose(times), ops.transpose(index), states, count

    def compute_output_spec(
        self,
        inputs: Nest,
        ts: Any = None,
        args: Any = None,
        jumps: Any = None,
        training: bool | None = None,
        mask: Nest = None,
        inputs_mask: Nest = None,
    ) -> Nest:
        del training, jumps
        ts_shape = None if ts is None else shape_of(ts)
        # Only a call tells whether there are `args`, and Keras calls this for every symbolic one.
        own_times = ts_shape is not None and len(ts_shape) == 2
        self._build_nested(tf.nest.map_structure(lambda x: tuple(x.shape), inputs), own_times, args, is_called=True)

        def output(x: keras.KerasTensor) -> keras.KerasTensor:
            return keras.KerasTensor(self._shapes.output(tuple(x.shape), ts_shape), dtype=self.compute_dtype)

        outputs = tf.nest.map_structure(output, inputs)
        outputs = with_mask(self.masked, outputs, known(inputs_mask if mask is None else mask), ts)
        if not self.return_events:
            return outputs
        dtype = prepare_times(self._times(ts), self.variable_dtype, axis=0).dtype
        dtypes = (keras.backend.standardize_dtype(dtype), "int32", self.compute_dtype, "int32")
        shapes = self._shapes.events(tf.nest.map_structure(lambda x: tuple(x.shape), inputs))
        return outputs, *(specs(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))

    def compute_output_shape(self, inputs_shape: Nest, ts_shape: tuple | None = None) -> Nest:
        shapes = map_shapes(lambda shape: self._shapes.output(shape, ts_shape), inputs_shape)
        return (shapes, *self._shapes.events(inputs_shape)) if self.return_events else shapes

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            t0=self.t0,
            t1=self.t1,
            max_events=self.max_events,
            return_events=self.return_events,
            augment_dims=self.augment_dims,
            kinetic_energy=self.kinetic_energy,
            local_error=self.local_error,
        )
        return config

    def _times(self, ts: Any) -> Any:
        """The times of a solve, `(T + 1,)` or `(T + 1, batch)`."""
        return [self.t0, self.t1] if ts is None else times_to_solve(ts, self.t0, self.variable_dtype)

    def _build_nested(self, inputs_shape: Nest, own_times: bool, args: Any, is_called: bool = False) -> None:
        def spec(shape: tuple) -> keras.KerasTensor:
            return keras.KerasTensor(shape, dtype=self.variable_dtype)

        y = map_shapes(lambda shape: spec(self._shapes.state(shape)), inputs_shape)
        rank = len(tf.nest.flatten(y)[0].shape)
        events = as_events(self.event)
        own_time = spec((None,) + (1,) * (rank - 1))
        t = own_time if own_times or self.solver.per_sample or events else spec(())
        field, knows_args = self.vector_field, args is not None or is_called
        FieldCall(field, y).check_args(args)
        if isinstance(field, keras.Layer) and (knows_args or call_arguments(field)[0] < 3):
            build(field, t, y, args)
        for event in events:
            event.build(own_time, y, args)

    def _initial_state(self, x: tf.Tensor) -> tf.Tensor:
        if not tf.as_dtype(x.dtype).is_floating:
            raise TypeError(
                f"The input of layer {self.name!r} must be floating-point; cast or embed it first. "
                f"Received: inputs of dtype {tf.as_dtype(x.dtype).name} and shape {tuple(x.shape)}"
            )
        x = ops.cast(x, self.variable_dtype)
        if self.augment_dims:
            self._shapes.state(x.shape)  # raises if there is no axis to extend
            x = ops.pad(x, [(0, 0)] * (len(x.shape) - 1) + [(0, self.augment_dims)])
        return x
