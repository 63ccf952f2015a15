"""Presets: every published value, what wins, what a run says of where it departs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_phf.cli import preflight
from megatron_phf.config.flags import build_parser, departures, parse_args
from megatron_phf.config.presets import preset_names
from megatron_phf.config.settings import Config, config_groups, flag_of
from megatron_phf.train.run_files import plain_config
from megatron_phf.train.summary import _recipe_line
from tests.launch import REPO

REAL = ["--hf-model", "m", "--data", "d"]
ALL_LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
# Field -> (value, where it stands).  PHF: arXiv:2606.29340, its table 3 and text.  Scripts:
# github.com/siyan-zhao/OPSD, run_opsd_1b.sh and run_opsd_4b.sh of 2026-05.  Trainer: a default of
# TRL or transformers that they leave alone.
PHF = {
    "train_iters": (100, "PHF: 100 optimizer steps"),
    "global_batch_size": (32, "PHF: effective batch 32, 8 GPUs x 4"),
    "lr": (5e-6, "PHF: AdamW, 5e-6"),
    "min_lr": (0.0, "trainer"),
    "lr_decay_style": ("cosine", "PHF: cosine"),
    "lr_decay_iters": (27594, "PHF: over 30 epochs of 29,434 problems"),
    "lr_warmup_iters": (0, "trainer"),
    "lr_warmup_fraction": (None, "trainer"),
    "weight_decay": (0.0, "trainer"),
    "adam_beta1": (0.9, "trainer"),
    "adam_beta2": (0.999, "trainer"),
    "adam_eps": (1e-8, "trainer"),
    "clip_grad": (0.1, "PHF: gradient clip 0.1"),
    "lora_rank": (64, "PHF: r = 64"),
    "lora_alpha": (128.0, "PHF: alpha = 128"),
    "lora_dropout": (0.05, "trainer"),
    "lora_target_modules": (ALL_LINEARS, "PHF: q, k, v, o, gate, up, down"),
    "teacher": ("ema", "PHF: an EMA copy of the online model"),
    "ema_decay": (0.999, "PHF"),
    "phf_alpha": (0.05, "PHF"),
    "phf_window_size": (128, "PHF: a uniform 128-position window"),
    "phf_window_rule": ("even", "PHF: uniform; the rounding is ours"),
    "phf_terms": ("direction,geometry,adjacent", "PHF: the full loss"),
    "phf_layers": (None, "PHF: all layers"),
    "opsd_objective": ("jsd", "PHF"),
    "opsd_beta": (0.0, "scripts: --beta 0"),
    "opsd_clip_mode": ("entry", "scripts: pointwise"),
    "opsd_clip": (0.05, "scripts: --jsd_token_clip 0.05 for 1.7B and 4B"),
    "opsd_top_k": (0, "PHF: full vocabulary"),
    "opsd_temperature": (1.1, "scripts: --temperature 1.1"),
    "rollout_temperature": (1.1, "PHF: temperature 1.1"),
    "rollout_top_p": (0.95, "PHF: top-p 0.95"),
    "rollout_top_k": (20, "PHF: top-k 20"),
    "max_new_tokens": (1024, "PHF: at most 1024 new tokens"),
    "student_thinking": (False, "scripts: --student_thinking False"),
    "teacher_thinking": (True, "scripts: --teacher_thinking True"),
    "eval_samples": (12, "PHF: Average@12"),
    "eval_temperature": (1.0, "PHF"),
    "eval_top_p": (0.95, "PHF"),
    "eval_top_k": (0, "PHF: top-k off"),
    "eval_max_new_tokens": (38912, "PHF"),
    "eval_thinking": (True, "PHF: thinking mode"),
}
# Preset -> what differs from phf.
OTHERS = {
    "phf": {},
    "phf_8b": {"opsd_clip": (0.06, "scripts: run_opsd_8b.sh")},
    "phf_as_written": {
        "opsd_beta": (0.5, "PHF: per-token Jensen-Shannon divergence; OPSD's paper: 0.5"),
        "opsd_clip_mode": ("token", "PHF: token-level clipping"),
    },
    "opsd": {
        "phf_alpha": (0.0, "OPSD has no flow loss"),
        "teacher": ("frozen", "scripts: --fixed_teacher"),
        "lr_decay_style": ("linear", "trainer"),
    },
    "opsd_first": {
        "phf_alpha": (0.0, "OPSD has no flow loss"),
        "teacher": ("frozen", "first scripts: --fixed_teacher"),
        "lr_decay_style": ("linear", "trainer"),
        "train_iters": (200, "first README and run_eval.sh: checkpoint-200"),
        "lr": (2e-4, "first scripts: --learning_rate 2e-4"),
        "clip_grad": (1.0, "trainer"),
        "opsd_beta": (0.5, "first scripts: --beta 0.5"),
        "opsd_clip_mode": ("none", "first trainer: no clip"),
        "student_thinking": (True, "first collator: the chat template's default"),
        "max_new_tokens": (2048, "first scripts, 1.7B: --max_completion_length 2048"),
        "eval_samples": (16, "first run_eval.sh: --val_n 16"),
        "eval_top_p": (1.0, "first README: top-p none"),
    },
}
OTHERS["opsd_8b"] = {**OTHERS["opsd"], "opsd_clip": (0.06, "scripts: run_opsd_8b.sh")}


def values(config: Config) -> dict:
    return {name: value for group in plain_config(config).values() for name, value in group.items()}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_every_published_value(name: str) -> None:
    found = values(parse_args(["--preset", name, *REAL]))
    published = {**PHF, **OTHERS[name]}
    assert {field: found[field] for field in published} == {
        field: value for field, (value, _) in published.items()
    }
    # And nothing else: the rest is as without a preset.
    plain = values(parse_args(REAL))
    for field in found.keys() - published.keys() - {"preset"}:
        assert found[field] == plain[field], field


def test_every_preset_is_in_the_table_and_in_the_help() -> None:
    assert preset_names() == sorted(OTHERS)
    (action,) = (a for a in build_parser()._actions if a.dest == "preset")
    assert all(re.search(rf"\b{name}\b", str(action.help)) for name in preset_names())


def test_the_documented_table_is_what_the_presets_say() -> None:
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in (REPO / "docs" / "recipes.md").read_text().splitlines()
        if line.startswith("| `--")
    ]
    columns = ("phf", "phf_as_written", "opsd", "opsd_first")
    configs = [values(parse_args(["--preset", name, *REAL])) for name in columns]
    documented = {row[0]: row[1:5] for row in rows}
    assert documented.keys() == {
        flag_of(field) for field, (value, _) in PHF.items() if value is not None
    }
    fields = {flag_of(f): f for f in PHF}
    for flag, cells in documented.items():
        for cell, config in zip(cells, configs, strict=True):
            value = config[fields[flag]]
            said = {"on": True, "off": False}.get(cell, cell.replace(" ", ""))
            assert said == value or (type(value) in (int, float) and float(said) == value), flag


@pytest.mark.parametrize("name", sorted(OTHERS))
@pytest.mark.parametrize("before", [True, False])
def test_a_flag_wins_wherever_it_stands(name: str, before: bool) -> None:
    own = ["--lr", "1e-3", "--teacher", "live", "--student-thinking", "--lora-rank", "0"]
    words = [*own, "--preset", name] if before else ["--preset", name, *own]
    config = parse_args([*REAL, *words])
    assert (config.train.lr, config.method.teacher) == (1e-3, "live")
    assert (config.data.student_thinking, config.lora.lora_rank) == (True, 0)
    assert config.recipe.preset == name
    assert config.train.lr_decay_iters == 27594


def test_the_last_preset_counts() -> None:
    config = parse_args([*REAL, "--preset", "phf", "--preset", "opsd_first"])
    assert (config.recipe.preset, config.train.lr) == ("opsd_first", 2e-4)


@pytest.mark.parametrize("name", ["phg", "", "../phf", "PHF"])
def test_an_unknown_preset_lists_those_there_are(name: str, capsys) -> None:
    assert preflight.main(["--preset", name]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: --preset {name}: no such preset; choose one of opsd, opsd_8b, opsd_first, phf, "
        "phf_8b, phf_as_written\n"
    )


def test_a_preset_needs_a_model(capsys) -> None:
    assert preflight.main(["--preset", "phf"]) == 2
    assert "--preset needs --hf-model and --data" in capsys.readouterr().err


def test_what_departs_from_a_preset() -> None:
    def line(*words: str) -> str:
        return _recipe_line(parse_args([*REAL, *words]))

    assert line() == "recipe   no preset (--preset phf is the published one)"
    assert line("--preset", "phf") == "recipe   preset phf; as it stands"
    # Where and how it is computed is no part of a recipe.
    layout = ["--tensor-model-parallel-size", "2", "--micro-batch-size", "4", "--seed", "3"]
    files = ["--save", "x", "--eval-data", "y", "--rollout-engine", "vllm", "--run-name", "z"]
    assert departures(parse_args([*REAL, "--preset", "phf_8b", *layout, *files])) == []
    changed = ["--train-iters", "50", "--lora-rank", "0", "--phf-layers", "2,4", "--lr", "5e-6"]
    assert line(*changed, "--preset", "phf") == (
        "recipe   preset phf; departs from it: --phf-layers 2,4 (None), --lora-rank 0 (64), "
        "--train-iters 50 (100)"
    )
    assert departures(parse_args([*REAL, "--preset", "phf", "--rollout-engine", "reference"])) == [
        "--rollout-engine reference (megatron)"
    ]


def test_defaults_are_not_the_published_recipe() -> None:
    """So no text may say so; what the defaults lack."""
    published = parse_args(["--preset", "phf", *REAL])
    missing = departures(Config().replaced(preset="phf"))
    assert [text.split()[0] for text in missing] == [
        "--teacher", "--lora-rank", "--lora-dropout", "--lr-decay-iters", "--eval-max-new-tokens",
    ]  # fmt: skip
    assert published.method.teacher == "ema"
    texts = [*REPO.glob("docs/*.md"), *REPO.glob("megatron_phf/**/*.py"), *REPO.glob("tools/*.py")]
    for path in texts:
        assert not re.search(r"efaults are (the|PHF's) published recipe", path.read_text()), path


def test_presets_are_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel holds what setup() names as package data."""
    import setuptools

    found: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: found.update(options))
    exec(compile((REPO / "setup.py").read_text(), str(REPO / "setup.py"), "exec"),
         {"__file__": str(REPO / "setup.py")})  # fmt: skip
    package = REPO / "megatron_phf"
    shipped = {
        p for pattern in found["package_data"]["megatron_phf"] for p in package.glob(pattern)
    }
    assert {package / "config" / "presets" / f"{name}.args" for name in preset_names()} <= shipped
    assert "megatron_phf.config.presets" in found["packages"]
    assert set(Path(package / "config" / "presets").glob("*.args")) <= shipped
    assert set(config_groups()) >= {"recipe"}
