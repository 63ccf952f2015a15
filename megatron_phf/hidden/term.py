"""What a loss on hidden states is, and where the known ones are.  Standard library only.

A new one is one file: a subclass of :class:`HiddenTerm`, named on the command line as
``--phf-terms package.module:Class`` (or by a row of :data:`TERMS`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_phf.runtime.own_modules import search_working_directory

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StateKind:
    """What a term compares, made of a layer's hidden states at the window.

    ``make``: ``module:function`` of (hidden [b, m, h], valid bool [b, m]) -> [b, n, width(h)], 0
    where not valid; ``span``: window positions that one row takes, n = m - span + 1;
    ``centred``: rows are less their mean, which weights of rows then change.
    """

    make: str
    span: int = 1
    centred: bool = False
    width: Callable[[int], int] = int

    def rows(self, positions: int) -> int:
        """Rows n of m window positions."""
        return positions - self.span + 1

    def counts(self, valid: Tensor) -> Tensor:
        """valid bool [b, m] -> rows of each sequence, int64 [b]."""
        return (valid.sum(-1) - (self.span - 1)).clamp(min=0)

    def states(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """hidden [b, m, h], valid bool [b, m] -> [b, n, width(h)]."""
        return _formula(self.make)(hidden, valid)


@functools.cache
def _formula(path: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The function ``module:name``, looked up once: layers ask in every pass."""
    module, _, name = path.partition(":")
    function: Callable[[Tensor, Tensor], Tensor] = getattr(importlib.import_module(module), name)
    return function


_FORMULAS = "megatron_phf.hidden.states"
STATES = {
    "transitions": StateKind(f"{_FORMULAS}:directions", span=2),
    "rows": StateKind(f"{_FORMULAS}:rows"),
    "unit_rows": StateKind(f"{_FORMULAS}:unit_states"),
    "centred_rows": StateKind(f"{_FORMULAS}:centred_rows", centred=True),
}


def states_of(kinds: Mapping[str, StateKind], hidden: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """hidden [b, m, h], valid bool [b, m] -> [b, n, width(h)] of each kind."""
    return {name: kind.states(hidden, valid) for name, kind in kinds.items()}


TERMS = {
    "direction": "megatron_phf.hidden.terms.direction:Direction",
    "geometry": "megatron_phf.hidden.terms.geometry:Geometry",
    "adjacent": "megatron_phf.hidden.terms.adjacent:Adjacent",
    "pointwise": "megatron_phf.hidden.terms.pointwise:Pointwise",
    "cka": "megatron_phf.hidden.terms.cka:LinearCKA",
    "cka_adjacent": "megatron_phf.hidden.terms.cka_adjacent:AdjacentCKA",
    "mse": "megatron_phf.hidden.terms.mse:MeanSquare",
    "nmse": "megatron_phf.hidden.terms.nmse:NormalisedMSE",
    "last_layer": "megatron_phf.hidden.terms.last_layer:LastLayer",
}


class HiddenTerm:
    """One loss between a student's and a teacher's hidden states, by layer or pair of layers.

    Attributes:
        name: its metrics are ``flow_<name>`` and ``flow_<name>_per_layer`` (or ``_per_pair``).
        source: where its formula stands.
        label: what a value of it is, for axes.
        over: ``layer``: student layer l and its teacher layer; ``pair``: layers l and l+1 of both.
        states: what is compared, one of :data:`STATES`; n rows a sequence, m - 1 for
            transitions, else m; 0 where the window is shorter.
        compares: ``states`` [b, n, h], which needs equal hidden sizes, or ``products``
            [b, n, n]: S S^T of a layer, S_l S_{l+1}^T of a pair.
        against: which teacher layer a student layer meets: its own (``mapped``), or ``last``, the
            teacher's last one, whichever the student's.
    """

    name = ""
    source = ""
    label = ""
    over = "layer"
    states = "transitions"
    compares = "products"
    against = "mapped"

    @property
    def needs_equal_widths(self) -> bool:
        """Whether a teacher of another hidden size leaves it out."""
        return self.compares == "states"

    @property
    def kind(self) -> StateKind:
        """The row of :data:`STATES` that it compares."""
        return STATES[self.states]

    def value(self, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        """States or products of both, and the rows that each sequence has, [b] -> its loss, [b].

        In fp32 (float64 stays float64); the teacher has no gradient.
        """
        raise NotImplementedError


def load_term(name: str) -> HiddenTerm:
    """The term ``name``: a row of :data:`TERMS`, or ``package.module:Class`` of the user's own.

    Raises:
        ValueError: there is none, or it is not a whole one.
    """
    path = TERMS.get(name, name)
    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute):
        raise ValueError(
            f"term {name!r}: name one of {', '.join(TERMS)}, or package.module:Class of your own"
        )
    if name not in TERMS:
        search_working_directory()
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        raise ValueError(
            f"term {name!r}: cannot be made ({type(error).__name__}: {error}); is its package in "
            "the working directory or on PYTHONPATH?"
        ) from error
    _check(made, name)
    return made


def _check(term: HiddenTerm, name: str) -> None:
    if not isinstance(term, HiddenTerm):
        raise ValueError(f"term {name!r}: not a megatron_phf.hidden.term.HiddenTerm")
    if not term.name.isidentifier():
        raise ValueError(f"term {name!r}: its name {term.name!r} is no key of a metric")
    for field, known in (
        ("over", ("layer", "pair")),
        ("states", STATES),
        ("compares", ("states", "products")),
        ("against", ("mapped", "last")),
    ):
        if getattr(term, field) not in known:
            raise ValueError(
                f"term {name!r}: {field} is {getattr(term, field)!r}, not one of {', '.join(known)}"
            )
    if term.over == "pair" and term.compares == "states":
        raise ValueError(f"term {name!r}: a pair of layers has products to compare, no states")
    if term.over == "pair" and term.against == "last":
        raise ValueError(f"term {name!r}: one layer of the teacher is no pair to compare with")
