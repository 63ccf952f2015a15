"""What a fresh machine lacks is found and asked for, program by program."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch import REPO

_BASH = shutil.which("bash")
_SLURM = ("slurmctld", "slurmd", "sbatch", "munged")
_UTILITIES = ("ip", "nsenter", "hostname")
# Records how it is called; "install" brings what it is told to bring.
_APT_GET = """echo "$@" >> "${{0%/*}}/asked"
[ "$2" = install ] || exit 0
for name in {brings}; do echo "#!{bash}" > "${{0%/*}}/$name"; {chmod} +x "${{0%/*}}/$name"; done"""


def _stub(directory: Path, name: str, body: str = "") -> None:
    path = directory / name
    path.write_text(f"#!{_BASH}\n{body}\n")
    path.chmod(0o755)


def _with_slurm(directory: Path, present: tuple[str, ...], brings: tuple[str, ...]) -> str:
    """with_slurm.sh on a machine of these programs; its output, of the command ``ran`` at the end.

    The script itself adds /usr/sbin, where a machine with SLURM has the daemons but not sbatch.
    """
    for name in present:
        _stub(directory, name)
    _stub(directory, "id", "echo 0")
    _stub(directory, "unshare")
    apt = _APT_GET.format(bash=_BASH, chmod=shutil.which("chmod"), brings=" ".join(brings))
    _stub(directory, "apt-get", apt)
    script = [_BASH, REPO / "tests/slurm/with_slurm.sh", _BASH, "-c", "echo ran"]
    done = subprocess.run(
        script, env={"PATH": str(directory)}, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("present", [("ip", "nsenter"), (*_SLURM[:2], "munged", *_UTILITIES)])
def test_slurm_is_installed_where_any_of_its_programs_is_missing(tmp_path, present):
    assert _with_slurm(tmp_path, present, (*_SLURM, *_UTILITIES)) == "ran\n"
    update, install = (tmp_path / "asked").read_text().splitlines()
    assert update == "-q update"
    assert {"slurmctld", "slurmd", "slurm-client", "munge", "iproute2"} <= set(install.split())


def test_nothing_is_installed_where_all_of_slurm_is_there(tmp_path):
    assert _with_slurm(tmp_path, (*_SLURM, *_UTILITIES), ()) == "ran\n"
    assert not (tmp_path / "asked").exists()


def test_packages_that_do_not_bring_a_program_are_named(tmp_path):
    said = _with_slurm(tmp_path, _UTILITIES, ("slurmctld", "slurmd", "munged"))
    assert said.startswith("SLURM tests not run: ") and said.endswith("did not bring sbatch\n")
