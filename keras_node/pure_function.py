"""Turns a function that reads and updates Keras variables into a function of tensors only.

A solve evaluates its field many times, and its gradient evaluates it again after the call of the layer has ended. All
these evaluations must use the same function: the same weights, the same noise and the same call context. And a gradient
must know every tensor on which the function depends:

- Keras variables. A `keras.StatelessScope` replaces them by tensors (`params`), which the solve passes on. Inside the
  scope, updates of a state, such as seeds and moving averages, have no effect.
- Tensors that the function closes over (`captured`). Tracing the function in a graph finds them. They cannot be
  replaced, but a tape that watches them sees how the function depends on them.
- Variables that the function reads by itself: variables of TensorFlow, variables in a `tf.function`, which chooses them
  when it is traced, and variables in `tf.recompute_grad`, which differentiates with respect to variables only.
  `tf.custom_gradient` finds them and requests their gradients, and a tape can watch them (`also_reading`).
- Tensors that the function closes over in eager mode. Nothing can find them. `hidden` holds values that depend on them.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_node import trees
from keras_node.call_context import CallContext
from keras_node.trees import Nest

# How the names of operations begin that draw random numbers.
_RANDOM = ("Random", "StatelessRandom", "StatelessTruncated", "StatelessMultinomial", "Multinomial", "Truncated")


class RecordingScope(keras.StatelessScope):
    """Records every Keras variable that is read or updated, and every loss. It does not change any variable.

    Attributes:
        read: the variables that were read, by their `id`.
        recorded: those of them that were read in the graph of the function itself while a tape recorded.
        unrecorded: those of them that were read in this graph while no tape recorded. `tf.recompute_grad` reads
            variables in this way, and so do layers that are made in a `keras.RematScope`.
    """

    def __init__(self) -> None:
        super().__init__(collect_losses=True)
        self.read: dict[int, keras.Variable] = {}
        self._updated: dict[int, keras.Variable] = {}
        self._graph = _graph()
        self._is_reading = False
        self._tape = tf.GradientTape(persistent=True)
        self._mark = tf.constant(0.0)
        self._marks: dict[int, tf.Tensor] = {}
        self.recorded: list[keras.Variable] = []
        self.unrecorded: list[keras.Variable] = []

    def __enter__(self) -> "RecordingScope":
        self._tape.__enter__()
        self._tape.watch(self._mark)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._tape.__exit__(*exception)
        # This is done here because the marks may be tensors of a graph that cannot be used later.
        for i, mark in self._marks.items():
            seen = self._tape.gradient(mark, self._mark) is not None
            (self.recorded if seen else self.unrecorded).append(self.read[i])

    def get_current_value(self, variable: keras.Variable) -> tf.Tensor | None:
        if self._is_reading:
            return None
        self.read[id(variable)] = variable
        value = super().get_current_value(variable)
        # An outer scope may have given the variable another value.
        if value is None and self.original_scope is not None:
            value = self.original_scope.get_current_value(variable)
            # In eager mode, the result must connect a tape only to tensors that the function closes over.
            if value is not None and self._graph is None:
                value = tf.stop_gradient(value)
        # A `tf.function` must read the variable itself, because it keeps the value that it reads during its tracing.
        if value is None and _graph() is self._graph:
            self._marks[id(variable)] = tf.identity(self._mark)
            if self._graph is None:
                self._is_reading = True
                with self._tape.stop_recording():
                    value = tf.stop_gradient(variable.value)
                self._is_reading = False
        return value

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        variable, _ = update
        self._updated[id(variable)] = variable
        super().add_update(update)

    @property
    def updates(self) -> list[tuple[keras.Variable, tf.Tensor]]:
        """The variables that were updated, and their new values."""
        return [(v, self.state_mapping[i]) for i, v in self._updated.items()]

    @property
    def watched(self) -> tuple[tf.Variable, ...]:
        """The trainable TensorFlow variables that were read, in eager mode without those of Keras variables."""
        return self._tape.watched_variables()


class PureFunction:
    """A function that takes the values of its variables as arguments and returns their updates as results.

    The constructor evaluates it once, to record what it reads besides its arguments.

    Args:
        function: a function of nests of tensors.
        *arguments: the arguments of this first evaluation.
        variables: Keras variables that the function may read in other evaluations.
        recorded_as: a cheaper function for the first evaluation, which reads and updates the same variables and returns
            the same structure. By default it is `function`.

    Attributes:
        params: the float tensors on which the function depends and which may need a gradient: the values of the
            trainable variables that it reads, and `captured`.
        captured: in a graph, the float tensors that the function closes over. In eager mode they cannot be found.
        hidden: in eager mode, float tensors that depend on everything that the function closes over. Empty in a graph.
        closes_over: whether it depends on variables that it reads by itself, or on tensors of the graph around it.
        carried: the values of the variables that it updates, such as seeds and statistics.
        updates: these variables, and their values after the evaluation.
        losses: the losses that it adds.
        trace: in a graph, the concrete function of the evaluation. Its first output is the result of the function.
        context: the call context of Keras in which it is evaluated.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Nest,
        variables: Sequence[keras.Variable] = (),
        recorded_as: Callable[..., Any] | None = None,
    ) -> None:
        self.function = function
        self.trace, scope, results, values = _evaluate_once(recorded_as or function, arguments)
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
        # A tape would watch a frozen weight too, as if it were a tensor that the function closes over.
        self._constants = [tf.stop_gradient(full_precision(v.value)) for v in self._constant]
        self.carried = [tf.stop_gradient(tf.convert_to_tensor(v.value)) for v in updated]

        if self.trace is None:
            # If the function reads variables by itself, the results depend on these too, and their gradient is known.
            # Then nothing is hidden.
            self.captured = []
            self.hidden = [x for x in tf.nest.flatten(results) if trees.is_float(x) and not others]
        else:
            known = {id(x) for x in tf.nest.flatten((arguments, [v.value for v in scope.read.values()]))}
            self.captured = [x for x in self.trace.captured_inputs if trees.is_float(x) and id(x) not in known]
            self.hidden = []
        self.params = [*weights, *map(tf.identity, self.captured)]
        if self.trace is not None and others and others <= _components(scope.read.values()):
            # An inner graph reads them: that of a `tf.cond`, where they are replaced as well, or of a `tf.function`.
            again = tf.function(lambda: self(self.params, self.carried, *arguments)[0], autograph=False)
            others = again.get_concrete_function().trainable_variables
        self.closes_over = bool(others) or any(tf.is_symbolic_tensor(x) for x in self.captured)
        self._read_by_itself = self.captured
        self.context = CallContext.current(read)

    def __call__(
        self,
        params: list[tf.Tensor],
        carried: list[tf.Tensor],
        *arguments: Nest,
        function: Callable[..., Any] | None = None,
    ) -> tuple[Any, list[tf.Tensor]]:
        """Returns the result of the function, and the new values of `carried`.

        With `function`, evaluates that function instead, for the same values of the variables.
        """
        variables = self._trainable + self._constant + self._updated
        weights = params[: len(self._trainable)]
        mapping = list(zip(variables, [*weights, *self._constants, *carried], strict=True))
        with keras.StatelessScope(mapping, initialize_variables=False) as scope:
            results = (function or self.function)(*arguments)
        return results, [tf.convert_to_tensor(scope.get_current_value(v)) for v in self._updated]

    def sources(self, params: list[tf.Tensor]) -> list[tf.Tensor | tf.Variable]:
        """Returns what a tape must watch and differentiate by, for the gradients of `params`."""
        return [*params[: len(params) - len(self._read_by_itself)], *self._read_by_itself]

    def reads_none_of(self, variables: Sequence[keras.Variable]) -> bool:
        """Whether there are trainable variables here, and the evaluation read none of them."""
        return bool(variables) and not any(
            id(v) in self._evaluated or id(v.value) in self._evaluated for v in variables
        )

    def also_reading(self, variables: Sequence[tf.Variable]) -> "PureFunction":
        """Returns the same function with the values of `variables`, which it reads itself, at the end of `params`."""
        other = copy.copy(self)
        other._read_by_itself = [*self._read_by_itself, *variables]
        other.params = [*self.params, *map(tf.convert_to_tensor, variables)]
        return other

    @functools.cached_property
    def nodes(self) -> list[Any]:
        """In a graph, the operations of the trace as `NodeDef`s, those of inner functions included; else none."""
        if self.trace is None:
            return []
        graph = self.trace.graph.as_graph_def()
        return [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]

    @property
    def draws_noise(self) -> bool:
        """Whether the function updates a seed, or in a graph draws random numbers from a fixed one."""
        updates_seed = any(is_seed(variable) for variable, _ in self.updates)
        return updates_seed or any(node.op.startswith(_RANDOM) for node in self.nodes)

    def assign(self, carried: list[tf.Tensor]) -> None:
        """Assigns the values of `carried` to the variables."""
        for variable, value in zip(self._updated, carried, strict=True):
            variable.assign(value)


def _evaluate_once(
    function: Callable[..., Any], arguments: tuple[Nest, ...]
) -> tuple[tf.types.experimental.ConcreteFunction | None, RecordingScope, Any, list[tf.Tensor]]:
    """The trace in a graph, else `None`; the scope of the evaluation; the results; the values of updated variables."""
    scopes: list[RecordingScope] = []

    def evaluate() -> tuple[Any, list[tf.Tensor]]:
        scopes.append(RecordingScope())
        with scopes[0]:
            results = function(*arguments)
        return results, [value for _, value in scopes[0].updates]

    if tf.executing_eagerly():
        results, values = evaluate()
        return None, scopes[0], results, values
    trace = tf.function(evaluate, autograph=False).get_concrete_function()
    if len(scopes) > 1:
        # The function has made variables, such as those of a layer, so that TensorFlow has traced it twice.
        return _evaluate_once(function, arguments)
    (scope,) = scopes
    # Only the updates are needed here. TensorFlow removes the rest of this call from the graph.
    results, values = trace() if scope.updates else trace.structured_outputs
    return trace, scope, results, values


def full_precision(value: Any) -> tf.Tensor:
    """The value of a variable, in float32 if it is read in half precision, because gradients are not summed in that."""
    value = tf.convert_to_tensor(value)
    return tf.cast(value, tf.float32) if value.dtype in (tf.float16, tf.bfloat16) else value


def is_seed(variable: keras.Variable) -> bool:
    """Whether a variable is the state of a random generator of Keras: two integers, unlike a counter."""
    return not tf.as_dtype(variable.dtype).is_floating and tuple(variable.shape) == (2,)


def has_seed(function: Callable[..., Any]) -> bool:
    """Whether a function is a layer with a seed, which means that it may draw noise in training."""
    return isinstance(function, keras.Layer) and any(is_seed(v) for v in function.non_trainable_variables)


def _components(variables: Iterable[keras.Variable]) -> set[int]:
    """The `id`s of the objects that hold the values of variables on this device."""
    strategy = tf.distribute.get_strategy()
    return {id(component) for v in variables for component in strategy.experimental_local_results(v.value)}


def _graph() -> tf.Graph | None:
    """The graph that is being built, or `None` in eager mode."""
    return None if tf.executing_eagerly() else tf.constant(0).graph
