"""From a function that reads and updates Keras variables to one of tensors alone."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_node.trees import Nest


class RecordingScope(keras.StatelessScope):
    """Notes every Keras variable that is read or updated, and every loss; nothing is updated in earnest."""

    def __init__(self):
        super().__init__(collect_losses=True)
        self.read = {}
        self._updated = {}

    def get_current_value(self, variable):
        self.read[id(variable)] = variable
        value = super().get_current_value(variable)
        # A scope around this one may have given the variable another value.
        if value is None and self.original_scope is not None:
            value = self.original_scope.get_current_value(variable)
        return value

    def add_update(self, update):
        variable, _ = update
        self._updated[id(variable)] = variable
        super().add_update(update)

    @property
    def updates(self) -> list[tuple[keras.Variable, tf.Tensor]]:
        return [(v, self.state_mapping[i]) for i, v in self._updated.items()]


class PureFunction:
    """A function in a graph whose variables are arguments, and whose updates of them are results.

    Args:
        function: a function of tensors.
        *arguments: nests of tensors of the graph, for which it is traced once to see what else it reads.

    Attributes:
        params: the values of the trainable variables that it reads.
        constants: the values of other ones that it reads.
        carried: the values of those that it updates, such as seeds and statistics.
        closed_over: float tensors that it reads beside these and its arguments.
        trace: the concrete function; `structured_outputs` has the shapes and dtypes of what is returned.
    """

    def __init__(self, function: Callable, *arguments: Nest):
        self.function = function
        scope = RecordingScope()

        def traced():
            with scope:
                return function(*arguments)

        trace = tf.function(traced, autograph=False).get_concrete_function()
        if scope.losses:
            raise ValueError(
                "A step of a recurrent layer cannot add losses: activity regularizers and `add_loss` have no effect in "
                "the loop over a series. Regularize the layer's output, or its weights. "
                f"Received: {len(scope.losses)} loss(es) a step"
            )
        self.trace = trace
        updated = [variable for variable, _ in scope.updates]
        read = [v for v in scope.read.values() if not any(v is u for u in updated)]
        self._trainable = [v for v in read if v.trainable]
        self._constant = [v for v in read if not v.trainable]
        self._updated = updated
        self.params = [full_precision(v.value) for v in self._trainable]
        # A tape watches a frozen weight all the same, and would take it for a tensor that the function closes over.
        self.constants = [tf.stop_gradient(full_precision(v.value)) for v in self._constant]
        self.carried = [tf.stop_gradient(tf.convert_to_tensor(v.value)) for v in updated]
        known = {id(x) for x in tf.nest.flatten((arguments, self._values(scope)))}
        captured = [x for x in trace.captured_inputs if x.dtype.is_floating and id(x) not in known]
        variables = [v for v in trace.trainable_variables if id(v.handle) not in known]
        self.closed_over = captured + [tf.convert_to_tensor(v) for v in variables]

    def __call__(
        self, params: list[tf.Tensor], constants: list[tf.Tensor], carried: list[tf.Tensor], *arguments: Nest
    ) -> tuple[Any, list[tf.Tensor]]:
        """What the function returns, and the values of `carried` after it."""
        variables = self._trainable + self._constant + self._updated
        mapping = list(zip(variables, [*params, *constants, *carried], strict=True))
        with keras.StatelessScope(mapping, initialize_variables=False) as scope:
            results = self.function(*arguments)
        return results, [tf.convert_to_tensor(scope.get_current_value(v)) for v in self._updated]

    @staticmethod
    def _values(scope):
        """What stands for the variables in a trace: tensors that a scope gave them, or handles, one on each device."""
        values = [v.value for v in scope.read.values()]
        copies = [c for v in values for c in tf.distribute.get_strategy().experimental_local_results(v)]
        return [c.handle if isinstance(c, tf.Variable) else c for c in copies]

    def assign(self, carried: list[tf.Tensor]) -> None:
        """Updates the variables."""
        for variable, value in zip(self._updated, carried, strict=True):
            variable.assign(value)


def full_precision(value) -> tf.Tensor:
    """A variable's value; under a mixed policy it comes in half precision, in which a gradient is not summed up."""
    value = tf.convert_to_tensor(value)
    return tf.cast(value, tf.float32) if value.dtype in (tf.float16, tf.bfloat16) else value
