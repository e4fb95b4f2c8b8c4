"""From a function that reads and updates Keras variables to one of tensors alone.

A solve evaluates its field many times, and its gradient evaluates it again when the call of the layer has ended. All of
these evaluations must be of one function: with the same weights, the same noise and the same call context. And a
gradient must know every tensor that the function depends on:

- Keras variables. They are replaced by tensors (`params`) that the solve passes on. A `keras.StatelessScope` does so,
  in which updates of state, such as seeds and moving averages, have no effect either.
- Tensors that the function closes over (`captured`), which tracing it in a graph finds. Nothing can be put in their
  place, but a tape that watches them sees how the function depends on them.
- Variables that the function reads by itself: TensorFlow's own, those in a `tf.function`, which reads them once and for
  all, and those in `tf.recompute_grad`, which differentiates by variables only. `tf.custom_gradient` finds them and
  asks for their gradients; a tape can watch them (`also_reading`).
- Tensors that it closes over in eager mode. Nothing can find them; `hidden` are values that depend on them.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_node.call_context import CallContext
from keras_node.trees import Nest


class RecordingScope(keras.StatelessScope):
    """Notes every Keras variable that is read or updated, and every loss; no variable is changed.

    Attributes:
        read: the variables that were read, by their `id`.
        recorded: those among them that were read in the graph of the function itself, under the eyes of a tape.
        unrecorded: those that were read there while no tape recorded, as `tf.recompute_grad` reads them and with it
            layers made in a `keras.RematScope`.
    """

    def __init__(self):
        super().__init__(collect_losses=True)
        self.read = {}
        self._updated = {}
        self._graph = _graph()
        self._is_reading = False
        self._tape = tf.GradientTape(persistent=True)
        self._mark = tf.constant(0.0)
        self._marks = {}
        self.recorded, self.unrecorded = [], []

    def __enter__(self):
        self._tape.__enter__()
        self._tape.watch(self._mark)
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._tape.__exit__(*exception)
        # Here, since the marks may be tensors of a graph that nobody else can use.
        for i, mark in self._marks.items():
            seen = self._tape.gradient(mark, self._mark) is not None
            (self.recorded if seen else self.unrecorded).append(self.read[i])

    def get_current_value(self, variable):
        if self._is_reading:
            return None
        self.read[id(variable)] = variable
        value = super().get_current_value(variable)
        # A scope around this one may have given the variable another value.
        if value is None and self.original_scope is not None:
            value = self.original_scope.get_current_value(variable)
        # A `tf.function` must read the variable itself: what it reads as it is traced, it keeps.
        if value is None and _graph() is self._graph:
            self._marks[id(variable)] = tf.identity(self._mark)
            if self._graph is None:
                # Eagerly, what a tape sees in the result shall be what the function closes over, and nothing else.
                self._is_reading = True
                with self._tape.stop_recording():
                    value = tf.stop_gradient(variable.value)
                self._is_reading = False
        return value

    def add_update(self, update):
        variable, _ = update
        self._updated[id(variable)] = variable
        super().add_update(update)

    @property
    def updates(self) -> list[tuple[keras.Variable, tf.Tensor]]:
        return [(v, self.state_mapping[i]) for i, v in self._updated.items()]

    @property
    def watched(self) -> tuple[tf.Variable, ...]:
        """Trainable variables of TensorFlow that were read; eagerly, not those that stand for a Keras variable."""
        return self._tape.watched_variables()


class PureFunction:
    """A function whose variables are arguments, and whose updates of them are results.

    It is evaluated once, here, to see what it reads beside its arguments.

    Args:
        function: a function of nests of tensors.
        *arguments: what to evaluate it with.
        variables: Keras variables that it may read on other occasions.

    Attributes:
        params: float tensors that it depends on and a gradient may be asked for: the values of the trainable variables
            that it reads, and `captured`.
        captured: float tensors that it closes over, in a graph; eagerly none are found.
        hidden: eagerly, float tensors that depend on whatever it closes over; in a graph there are none.
        closes_over: whether it depends on variables that it reads by itself, or on tensors of the graph around it.
        carried: the values of the variables that it updates, such as seeds and statistics.
        updates: these variables, and their values after the evaluation.
        losses: the losses that it adds.
        trace: in a graph, the concrete function of the evaluation, which returns the function's results first.
        context: the call context of Keras that it is evaluated in.
    """

    def __init__(self, function: Callable, *arguments: Nest, variables: Sequence[keras.Variable] = ()):
        self.function = function
        self.trace, scope, results, values = _evaluate_once(function, arguments)
        self.losses = scope.losses
        self._evaluated = {*scope.read, *map(id, scope.watched)}
        replaced = _components(scope.recorded)
        others = {id(v) for v in scope.watched} - replaced
        updated = [variable for variable, _ in scope.updates]
        self.updates = list(zip(updated, values, strict=True))

        read = list({id(v): v for v in (*variables, *scope.read.values())}.values())
        by_itself = [id(v) for v in scope.unrecorded if v.trainable]
        read = [v for v in read if id(v) not in by_itself]
        self._updated = updated
        self._trainable = [v for v in read if v.trainable]
        self._constant = [v for v in read if not v.trainable and not any(v is u for u in updated)]
        weights = [full_precision(v.value) for v in self._trainable]
        # A tape watches a frozen weight all the same, and would take it for a tensor that the function closes over.
        self._constants = [tf.stop_gradient(full_precision(v.value)) for v in self._constant]
        self.carried = [tf.stop_gradient(tf.convert_to_tensor(v.value)) for v in updated]

        if self.trace is None:
            # With variables that it reads by itself, the value depends on these too, and their gradient is known.
            self.captured = []
            self.hidden = [x for x in tf.nest.flatten(results) if _is_float(x) and not others]
        else:
            known = {id(x) for x in tf.nest.flatten((arguments, [v.value for v in scope.read.values()]))}
            self.captured = [x for x in self.trace.captured_inputs if _is_float(x) and id(x) not in known]
            self.hidden = []
        self.params = [*weights, *map(tf.identity, self.captured)]
        if self.trace is not None and others and others <= _components(scope.read.values()):
            # Read in a graph inside: of a `tf.cond`, which has them replaced as well, or of a `tf.function`.
            again = tf.function(lambda: self(self.params, self.carried, *arguments)[0], autograph=False)
            others = again.get_concrete_function().trainable_variables
        self.closes_over = bool(others) or any(tf.is_symbolic_tensor(x) for x in self.captured)
        self._read_by_itself = self.captured
        self.context = CallContext.current(read)

    def __call__(self, params: list, carried: list[tf.Tensor], *arguments: Nest) -> tuple[Any, list[tf.Tensor]]:
        """What the function returns, and the values of `carried` after it."""
        variables = self._trainable + self._constant + self._updated
        weights = params[: len(self._trainable)]
        mapping = list(zip(variables, [*weights, *self._constants, *carried], strict=True))
        with keras.StatelessScope(mapping, initialize_variables=False) as scope:
            results = self.function(*arguments)
        return results, [tf.convert_to_tensor(scope.get_current_value(v)) for v in self._updated]

    def sources(self, params: list) -> list:
        """What a tape must watch, and be asked for, to differentiate with respect to `params`."""
        return [*params[: len(params) - len(self._read_by_itself)], *self._read_by_itself]

    def reads_none_of(self, variables: Sequence[keras.Variable]) -> bool:
        """Whether the function was evaluated without one of these trainable variables, of which there are some."""
        return bool(variables) and not any(
            id(v) in self._evaluated or id(v.value) in self._evaluated for v in variables
        )

    def also_reading(self, variables: Sequence[tf.Variable]) -> "PureFunction":
        """The same function where the values of `variables`, which it reads by itself, are the last of `params`."""
        other = copy.copy(self)
        other._read_by_itself = [*self._read_by_itself, *variables]
        other.params = [*self.params, *map(tf.convert_to_tensor, variables)]
        return other

    @property
    def draws_noise(self) -> bool:
        """Whether an evaluation moves a seed on."""
        return any(is_seed(variable) for variable, _ in self.updates)

    def assign(self, carried: list[tf.Tensor]) -> None:
        """Updates the variables."""
        for variable, value in zip(self._updated, carried, strict=True):
            variable.assign(value)


def _evaluate_once(function, arguments):
    """The trace in a graph, the scope of the evaluation, and what it gave: results and values of updated variables."""
    scopes = []

    def evaluate():
        scopes.append(RecordingScope())
        with scopes[0]:
            results = function(*arguments)
        return results, [value for _, value in scopes[0].updates]

    if tf.executing_eagerly():
        results, values = evaluate()
        return None, scopes[0], results, values
    trace = tf.function(evaluate, autograph=False).get_concrete_function()
    (scope,) = scopes
    # Only what is updated is needed here; the rest of the call is removed again.
    results, values = trace() if scope.updates else trace.structured_outputs
    return trace, scope, results, values


def full_precision(value) -> tf.Tensor:
    """A variable's value; under a mixed policy it comes in half precision, in which a gradient is not summed up."""
    value = tf.convert_to_tensor(value)
    return tf.cast(value, tf.float32) if value.dtype in (tf.float16, tf.bfloat16) else value


def is_seed(variable: keras.Variable) -> bool:
    """Whether a variable is the state of a random generator: an integer, which says nothing of the data."""
    return not tf.as_dtype(variable.dtype).is_floating


def _components(variables):
    """The `id`s of what stands for the values of variables on this device."""
    strategy = tf.distribute.get_strategy()
    return {id(component) for v in variables for component in strategy.experimental_local_results(v.value)}


def _graph():
    """The graph that is being built, or `None` in eager mode."""
    return None if tf.executing_eagerly() else tf.constant(0).graph


def _is_float(x) -> bool:
    return tf.is_tensor(x) and x.dtype.is_floating
