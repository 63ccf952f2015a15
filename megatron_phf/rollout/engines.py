"""The table of rollout engines, and engines of the user's own.  No import of torch.

A factory ``package.module:function`` is called with a ``RolloutContext`` on every rank, and gives a
``RolloutEngine``; those of the table's last rows give a ``RolloutSource``, whole rollouts.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from typing import Any

from megatron_phf.config.settings import Config
from megatron_phf.runtime.own_modules import search_working_directory

FLAG = "--rollout-engine"


@dataclass(frozen=True)
class EngineRow:
    """``factory``: where it is made; ``samples``: it answers prompts (is a ``RolloutEngine``).

    ``reads_data``: it needs the problems of --data; else its prompts are its own.  ``beside``: it
    can sample while the student trains (is an ``EngineBeside``); one's own has ``sampler`` then.
    ``in_process``: the student itself decodes.
    """

    factory: str
    samples: bool = True
    reads_data: bool = True
    beside: bool = True
    in_process: bool = False


ENGINES = {
    "megatron": EngineRow(
        "megatron_phf.rollout.megatron.engine:make_engine", beside=False, in_process=True
    ),
    "vllm": EngineRow("megatron_phf.rollout.vllm.engine:make_engine"),
    "reference": EngineRow(
        "megatron_phf.rollout.sources:reference_source", samples=False, beside=False
    ),
    "replay": EngineRow("megatron_phf.rollout.sources:replay_source", False, False, False),
}


def engine_row(spec: str) -> EngineRow:
    """The row of an engine by its name, or of one's own by ``package.module:factory``."""
    return ENGINES.get(spec) or EngineRow(spec)


def reads_data(config: Config) -> bool:
    """Whether the run's rollouts start from the problems of ``--data``."""
    return engine_row(config.rollout.rollout_engine).reads_data


def check_engine(config: Config) -> None:
    """Refuse what names no engine, or a module that is not there; runs no code of an engine.

    Raises:
        ValueError: names ``--rollout-engine``, and what it takes.
    """
    spec = config.rollout.rollout_engine
    if spec in ENGINES:
        return
    module, colon, function = spec.partition(":")
    if not colon or not all(name.isidentifier() for name in [*module.split("."), function]):
        raise ValueError(
            f"{FLAG} {spec}: need {', '.join(ENGINES)} or package.module:factory of your own"
        )
    if config.model.hf_model is None or config.data.data is None:
        raise ValueError(f"{FLAG} {spec} needs --hf-model and --data")
    search_working_directory()
    if not _exists(module):
        raise ValueError(_not_importable(spec, module, "there is no such module"))


def _exists(module: str) -> bool:
    """Whether there is such a module; imports none, not even the packages around it.

    A rank must not import megatron-core before it knows its device.
    """
    top, *rest = module.split(".")
    found = importlib.util.find_spec(top)
    for name in rest:
        if found is None:
            return False
        # By its last name: a folder without __init__.py would look for its parent in sys.modules.
        found = PathFinder.find_spec(name, [*(found.submodule_search_locations or ())])
    return found is not None


def _not_importable(spec: str, module: str, why: object) -> str:
    if isinstance(why, Exception):
        why = f"{type(why).__name__}: {why}"
    return (
        f"{FLAG} {spec}: {module} cannot be imported ({why}); put its directory on PYTHONPATH, or "
        "start in it"
    )


def load_factory(spec: str) -> Callable[..., Any]:
    """The factory of an engine.

    Raises:
        ValueError: there is none that takes one argument; says why.
    """
    module, _, name = engine_row(spec).factory.partition(":")
    search_working_directory()
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(_not_importable(spec, module, error)) from error
    try:
        if not callable(function):
            raise TypeError(f"{module} has no function {name}")
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise ValueError(
            f"{FLAG} {spec}: {error}; need a function of one argument, the RolloutContext "
            "(docs/engines.md)"
        ) from error
    return function


def make_by_factory(spec: str, context: Any, beside: bool = False) -> Any:
    """What the engine's factory gives for this run; every rank calls it.

    ``beside``: it must be able to sample while the student trains.

    Raises:
        ValueError: a user's factory gave something that is no engine.
    """
    made, row = load_factory(spec)(context), engine_row(spec)
    wanted = ("prepare", "generate") if row.samples else ("rollouts",)
    missing = [name for name in wanted if not callable(getattr(made, name, None))]
    if missing:
        raise ValueError(
            f"{FLAG} {spec}: gave a {type(made).__name__} without {' and '.join(missing)}; an "
            "engine has prepare(step) and generate(prompts, sampling, sample_ids, limits) "
            "(docs/engines.md)"
        )
    if beside and not callable(getattr(made, "sampler", None)):
        raise ValueError(
            f"--max-off-policy-steps: {FLAG} {spec} gave a {type(made).__name__} without sampler, "
            "which would let it sample while the student trains (docs/engines.md); leave the flag "
            "out"
        )
    return made
