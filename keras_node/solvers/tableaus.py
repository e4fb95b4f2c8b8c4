"""All methods by their names.

To add a method, add one constant to `explicit_tableaus.py`, `implicit_tableaus.py` or `symplectic_tableaus.py`. It is
found here, and a wrong coefficient raises an error at import.
"""

from keras_node.solvers import explicit_tableaus, implicit_tableaus, symplectic_tableaus
from keras_node.solvers.butcher_tableau import ButcherTableau

TABLEAUS: dict[str, ButcherTableau] = {
    constant.name: constant
    for module in (explicit_tableaus, implicit_tableaus, symplectic_tableaus)
    for constant in vars(module).values()
    if isinstance(constant, ButcherTableau)
}
