"""Random programs beside closed forms, and random recurrent layers beside a Python loop; see `trials.py`.

`make stress` draws many more. A failure is printed as the smallest program that hypothesis finds.
"""

import hypothesis
import pytest
import recurrent_trials
import trials
from hypothesis import strategies

# The same draws every time: a chance failure of CI would help nobody. `make stress` is there to find new ones.
FEW = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
}


# The thirteen stages of "dopri8" take half a minute to compile.
METHODS = ["dopri8", *(method for method in trials.OPTIONS["method"] if method != "dopri8")]


def programs(module, **fixed):
    options = {**module.OPTIONS, **fixed}
    drawn = strategies.fixed_dictionaries({name: strategies.sampled_from(values) for name, values in options.items()})
    return drawn.map(lambda choice: module.Program(**choice)).filter(module.possible)


def check(module, number, seeds, **fixed):
    @hypothesis.settings(max_examples=number, **FEW)
    @hypothesis.given(programs(module, **fixed))
    def holds(program):
        _, wrong = module.try_out(program, seeds)
        assert not wrong, "\n".join(wrong)

    holds()


@pytest.mark.parametrize(("mode", "number", "seeds"), [("eager", 12, [0]), ("graph", 4, [0, 1]), ("xla", 3, [0, 1])])
def test_random_programs_give_the_closed_form_and_its_gradients(mode, number, seeds):
    check(trials, number, seeds, mode=[mode], method=METHODS if mode == "eager" else METHODS[1:])


@pytest.mark.parametrize(("mode", "number", "seeds"), [("graph", 2, [0, 1]), ("xla", 1, [0, 1])])
def test_random_recurrent_layers_are_loops_of_solves_and_cells(mode, number, seeds):
    check(recurrent_trials, number, seeds, mode=[mode])


def test_a_wrong_number_is_found_and_made_small(monkeypatch):
    """The trials themselves can fail: with a clock that runs 0.1 % fast, they do."""
    right = trials.keras_node.odeint
    monkeypatch.setattr(trials.keras_node, "odeint", lambda f, y0, ts, **options: right(f, y0, 1.001 * ts, **options))
    fixed = {"mode": "eager", "steps": "adaptive", "method": "tsit5", "entry": "odeint", "origin": 0.0}
    program = trials.Program(**{name: fixed.get(name, options[-1]) for name, options in trials.OPTIONS.items()})
    changes = {"batch": 3, "kinks": "none", "equation": "driven", "field": "args", "times": "many", "dtype": "float64"}
    program = trials.dataclasses.replace(program, **changes, weights="float64", tolerance=1e-7)
    assert trials.possible(program)
    fails = lambda p: bool(trials.try_out(p)[1])  # noqa: E731
    assert fails(program)
    least = trials.smallest(program, fails, trials)
    assert (least.equation, least.state, least.times, least.gradient) == ("linear", "rank 2", "two", "direct")
