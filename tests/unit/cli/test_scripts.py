"""Scripts are whole to bash, the launcher to Python too; names that users choose are names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_phf.config.flags import check_fields
from megatron_phf.config.settings import Config
from tests.launch import REPO, environment

SCRIPTS = sorted(str(p.relative_to(REPO)) for p in REPO.rglob("*.sh") if ".venv" not in str(p))
LAUNCHER = REPO / "examples" / "pretrain_phf.sh"


def test_every_script_is_whole_to_bash() -> None:
    assert str(LAUNCHER.relative_to(REPO)) in SCRIPTS
    for script in SCRIPTS:
        done = subprocess.run(["bash", "-n", REPO / script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), script
    compile(LAUNCHER.read_text(), str(LAUNCHER), "exec")


@pytest.mark.parametrize("module", ["random", "types"])
def test_modules_in_the_working_directory_are_not_pythons(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise SystemExit('taken from the working directory')")
    for copy in (LAUNCHER, shutil.copy(LAUNCHER, tmp_path / "mine.sh")):
        flags = ["--run-name", "../elsewhere"]
        variables = {**environment(), "PYTHONPATH": str(REPO)}
        done = subprocess.run(
            ["bash", copy, *flags], cwd=tmp_path, capture_output=True, text=True, env=variables
        )
        assert "--run-name '../elsewhere': need a name of at most 100" in done.stderr
        assert done.returncode != 0 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["/abs", "../..", "a/b", "", ".hidden", "x" * 101, "a\nb", "a\0"])
def test_a_run_name_is_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="--run-name"):
        check_fields(Config().replaced(run_name=name))
    check_fields(Config().replaced(run_name="phf alpha=0.05_é.2"))
