"""docs/methods.md: every flag of its table is one of the program's, every loss of ours is in it."""

from __future__ import annotations

import re
import shlex

import pytest

from megatron_phf.cli import preflight
from megatron_phf.config.flags import parse_args
from megatron_phf.config.presets import preset_names
from megatron_phf.hidden.spec import flow_spec
from megatron_phf.hidden.term import TERMS
from megatron_phf.losses import TOKEN_WEIGHTINGS
from tests.launch import REPO

TEXT = (REPO / "docs" / "methods.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in re.sub(r"\| \|", "|  |", TEXT).splitlines()
    if line.startswith("| ") and not line.startswith(("| method", "|---"))
]
COMMANDS = [(row[0], flags) for row in ROWS for flags in re.findall(r"`(--[^`]*)`", row[2])]


def test_the_table_is_whole() -> None:
    names = [row[0] for row in ROWS]
    assert all(len(row) == 5 for row in ROWS), [row for row in ROWS if len(row) != 5]
    assert len(names) == len({*names}) and len(COMMANDS) >= 18
    for wanted in ("PHF", "OPSD", "OPRD", "OISD", "TIP", "EOPD", "AR-OPD", "SDFT", "SDPO", "GKD",
                   "MiniLLM", "DistiLLM"):  # fmt: skip
        assert wanted in names
    for row in ROWS:
        assert row[2] or row[4], f"{row[0]}: neither flags nor why there are none"
        assert not row[3] or re.search(r"arXiv:\d{4}\.\d{5}", row[3]), row[0]


@pytest.mark.parametrize(("method", "flags"), COMMANDS)
def test_every_row_is_a_command_line(method: str, flags: str) -> None:
    config = parse_args(["--hf-model", "m", "--data", "d", *shlex.split(flags)])
    flow_spec(config)
    preflight._check_method(config)


def test_all_that_there_is_stands_in_it() -> None:
    used = " ".join(flags for _, flags in COMMANDS)
    for name in TOKEN_WEIGHTINGS:
        assert f"--token-weighting {name}" in used
    terms = {t for text in re.findall(r"--phf-terms (\S+)", used) for t in text.split(",")}
    in_phf = set(parse_args(["--preset", "phf"]).method.phf_terms.split(","))
    assert terms | in_phf == {*TERMS}
    presets = set(re.findall(r"--preset (\S+)", used))
    assert presets <= {*preset_names()}
    # And in the text: no flag that the program does not have.
    for flag in {*re.findall(r"`(--[a-z-]+)", TEXT)}:
        assert flag in parse_flags(), flag


def parse_flags() -> set[str]:
    from megatron_phf.config.flags import build_parser

    return {option for action in build_parser()._actions for option in action.option_strings}
