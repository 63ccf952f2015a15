"""The command line: one flag a field of the settings, grouped as the dataclasses are.

No import of torch: ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any, NoReturn

from megatron_phf.config.field import choices_of
from megatron_phf.config.presets import preset_flags
from megatron_phf.config.settings import Config, config_groups, flag_of
from megatron_phf.config.teachers import joined
from megatron_phf.console import print_anything

# The tiny model learns from scratch-sized steps; found in docs/experiments.md.
EMBEDDED_DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/demo",
    "train_iters": 150,
    "micro_batch_size": 16,
    "lr": 5e-4,
    "lr_warmup_iters": 20,
    "phf_alpha": 0.5,
    "clip_grad": 1.0,
    "opsd_beta": 0.5,
    "opsd_clip_mode": "none",
    "max_new_tokens": 40,
    "max_prompt_length": 64,
    "max_teacher_prompt_length": 96,
    "rollout_top_k": 0,
    "rollout_top_p": 1.0,
    "make_vocab_size_divisible_by": 8,
    "eval_top_p": 1.0,
    "eval_seed": 10_001,
    "grader": "exact",
}

# What decides the numbers of a run, but for the places where they are computed.
_RECIPE_GROUPS = ("data", "rollout", "method", "teacher", "lora", "train", "evaluation")
_NO_RECIPE = frozenset(
    {
        *("data", "problem_field", "solution_field", "answer_field", "overlong_prompts"),
        *("max_prompt_length", "max_teacher_prompt_length"),
        *(
            "rollout_batch_size",
            "record_rollouts",
            "engine_drift_warning",
            "logits_chunk_tokens",
            "micro_batch_size",
        ),
        "decode_cuda_graphs",
        *("teacher_offload", "teacher_num_layers_in_first_pipeline_stage"),
        *("teacher_num_layers_in_last_pipeline_stage", "save_adapter", "seed"),
        *("eval_data", "eval_interval", "eval_seed", "grader"),
    }
)


class _Named(argparse.Action):
    """See ``field.flag``."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, joined(before, values))


def _add_argument(group: Any, f: dataclasses.Field[Any], hint: Any) -> None:
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f.name}
    allowed, needs = f.metadata["range"], f.metadata["needs"]
    notes = [f"default: {f.default}"]
    notes += [allowed.text] if allowed else []
    notes += [f"needs {flag_of(needs)}"] if needs else []
    options["help"] = f"{f.metadata['help']} ({'; '.join(notes)})"
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = next(t for t in (*typing.get_args(hint), hint) if t is not type(None))
        options["choices"] = choices_of(f.metadata)
        options["action"] = _Named if f.metadata["named"] else "store"
        options["metavar"] = None if options["choices"] else f.name.rsplit("_", 1)[-1].upper()
    names = [f.name, f.metadata["alias"]]
    group.add_argument(*(flag_of(name) for name in names if name), **options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise, for one rank to say it in one line: usage of so many flags would hide it."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[:1]
        if message.startswith("unrecognized") and unknown:
            for close in difflib.get_close_matches(unknown[0], self._option_string_actions, n=1):
                message += f"; did you mean {close}?"
        raise ValueError(f"{message} (--help lists the flags)")


def build_parser() -> argparse.ArgumentParser:
    """The command line: one flag a field, grouped as the dataclasses are."""
    parser = _Parser(
        prog="pretrain_phf.sh",
        description="On-policy self-distillation (OPSD + PHF) on Megatron-Core.  Without "
        "--hf-model and --data, an embedded arithmetic task and a tiny model.",
        allow_abbrev=False,
    )
    for name, cls in config_groups().items():
        group = parser.add_argument_group(name)
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            _add_argument(group, f, hints[f.name])
    return parser


def _given(argv: list[str] | None) -> dict[str, Any]:
    """Field -> value of what a command line says; its preset's flags stand behind its own."""
    given = vars(build_parser().parse_args(argv))
    preset = given.get("preset")
    return given if preset is None else {**_given(preset_flags(preset)), **given}


def parse_args(argv: list[str] | None = None) -> Config:
    """The configuration of a command line; its flags win over --preset's wherever they stand.

    Raises:
        ValueError: names an unknown or malformed flag, or preset.
    """
    given = _given(argv)
    config = Config().replaced(**given)
    if config.is_embedded:
        defaults = dict(EMBEDDED_DEFAULTS)
        if "lr_warmup_fraction" in given:
            del defaults["lr_warmup_iters"]
        config = Config().replaced(**{**defaults, **given})
    return config


def _problem(value: Any, known: Mapping[str, Any]) -> str | None:
    """What is wrong with a field's value by itself."""
    if type(value) is float and not math.isfinite(value):
        return f"{value}: need a finite number"
    if type(value) is int and abs(value) >= 2**40:  # no counter could hold it
        return f"{value:.3e}: too large a number"
    if value is not None and known["range"] and not known["range"].holds(value):
        return f"{ascii(value)[:80]}: need {known['range'].text}"
    choices = choices_of(known)
    if value is not None and choices and value not in choices:
        return f"{value!r}: need {', '.join(choices[:-1])} or {choices[-1]}"
    return None


def _values(config: Config) -> dict[str, Any]:
    return {name: v for group in vars(config).values() for name, v in vars(group).items()}


def _fields() -> list[dataclasses.Field[Any]]:
    return [f for cls in config_groups().values() for f in dataclasses.fields(cls)]


def check_fields(config: Config) -> None:
    """Raise ValueError for a value out of its field's range, or without the flag that it needs."""
    values, fields = _values(config), _fields()
    for f in fields:
        problem = _problem(values[f.name], f.metadata)
        if problem is not None:
            raise ValueError(f"{flag_of(f.name)} {problem}")
    for f in fields:
        needs = f.metadata["needs"]
        if values[f.name] and needs and not values[needs]:
            raise ValueError(f"{flag_of(f.name)} needs {flag_of(needs)}")


def without_effect(config: Config) -> list[str]:
    """The flags of a run that change nothing in it, and what they would need."""
    values, idle = _values(config), []
    for f in _fields():
        if f.metadata["acts_with"] is None or values[f.name] == f.default:
            continue
        name, _, wanted = f.metadata["acts_with"].partition("=")
        if not (str(values[name]) in wanted.split("|") if wanted else values[name]):
            needed = f"{flag_of(name)} {wanted.replace('|', ' or ')}".rstrip()
            idle.append(f"{flag_of(f.name)} {values[f.name]} has no effect without {needed}")
    return idle


def departures(config: Config) -> list[str]:
    """Where a run differs from its --preset, as ``--flag value (the preset's)``.

    Groups that say where a run computes and writes, and which files it reads, are no part of a
    recipe.
    """
    if config.recipe.preset is None:
        return []
    recipe = Config().replaced(**_given(preset_flags(config.recipe.preset)))
    found = []
    for group in _RECIPE_GROUPS:
        published = vars(getattr(recipe, group))
        for name, value in vars(getattr(config, group)).items():
            same = value == published[name] or (name, value) == ("rollout_engine", "vllm")
            if name not in _NO_RECIPE and not same:
                found.append(f"{flag_of(name)} {value} ({published[name]})")
    return found


if __name__ == "__main__":
    print_anything()
    build_parser().print_help()
