"""A fresh machine: what it lacks is asked for, and a checkout works installed or not."""

from __future__ import annotations

import fnmatch
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from megatron_phf.runtime.environment import for_children, torchrun
from tests.launch import REPO, environment

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


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts beside a package that says so when it is imported, and ends."""
    for folder in ("examples", "tools"):
        shutil.copytree(REPO / folder, tmp_path / folder)
    package = tmp_path / "megatron_phf"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('the checkout')")
    return tmp_path


def _said(command: list[str | Path], path: str | None = None) -> str:
    """What it ends with, started elsewhere in an environment that names no package."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd="/", env={**variables, "PATH": path or os.environ["PATH"]},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    return done.stderr.strip()


# Those that import the package at once; the others would do so after reading their flags.
_TOOLS = [
    path.name
    for path in sorted((REPO / "tools").glob("*.py"))
    if "\nfrom megatron_phf" in path.read_text()
]


@pytest.mark.parametrize("script", ["examples/pretrain_phf.sh", *(f"tools/{t}" for t in _TOOLS)])
def test_a_script_takes_its_checkouts_package(script: str, checkout: Path) -> None:
    """As torchrun and users start it: Python looks beside the script only."""
    assert _said([sys.executable, checkout / script, "--help"]) == "the checkout"


@pytest.mark.parametrize("flag", ["--help", "--lr=1"])
@pytest.mark.parametrize("link", [False, True])
def test_the_launch_script_takes_its_checkouts_package(
    flag: str, link: bool, checkout: Path
) -> None:
    """Under bash, where it asks for help and checks the flags before torchrun."""
    script = checkout / "examples/pretrain_phf.sh"
    if link:
        (checkout / "link").symlink_to(script)
        script = checkout / "link"
    (checkout / "bin").mkdir()
    _stub(checkout / "bin", "python3", f'exec {sys.executable} "$@"')
    path = f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}"
    assert _said([_BASH, script, flag], path) == "the checkout"


def test_a_copied_launch_script_takes_the_installed_package(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    script = shutil.copy(REPO / "examples/pretrain_phf.sh", tmp_path / "bin")
    installed = tmp_path / "installed"
    (installed / "megatron_phf").mkdir(parents=True)
    (installed / "megatron_phf/__init__.py").write_text("raise SystemExit('the installed one')")
    code = f"import runpy, sys; sys.path.insert(1, {str(installed)!r}); runpy.run_path({script!r})"
    assert _said([sys.executable, "-c", code]) == "the installed one"


_FOLDERS = (REPO / "examples", REPO / "tests")
_SHELL = [p for d in _FOLDERS for p in sorted(d.rglob("*")) if p.suffix in (".sh", ".sbatch")]


@pytest.mark.parametrize("script", [*_SHELL, REPO / ".ci/run"], ids=lambda p: p.name)
def test_bash_reads_every_script_to_its_end(script: Path) -> None:
    done = subprocess.run([_BASH, "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A working directory with modules that are called as some of Python's own."""
    for name in ("random", "types"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the directory')")
    return tmp_path


def test_modules_of_the_working_directory_are_not_pythons(crowded: Path) -> None:
    """The launcher's help, its preflight, and what torchrun would get."""
    script, variables = REPO / "examples/pretrain_phf.sh", environment()
    variables["VIRTUAL_ENV"] = sys.prefix  # or a checkout's .venv would come before the stub
    _stub(crowded, "torchrun", 'echo "$@"')
    path = os.pathsep.join([str(crowded), variables["PATH"]])

    def said(*flags: str) -> str:
        return subprocess.run(
            [_BASH, script, *flags], cwd=crowded, env={**variables, "PATH": path},
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout  # fmt: skip

    assert "--phf-alpha" in said("--help")
    assert said("--seed", "3").startswith("--standalone --local-addr localhost --nproc-per-node ")
    compile(script.read_text(), str(script), "exec")  # it is whole to Python too
    variables["PYTHONPATH"] = str(REPO)  # for a copy beside those modules
    for copy in (script, shutil.copy(script, crowded / "mine.sh")):
        done = subprocess.run(
            [_BASH, copy, "--run-name", "../elsewhere"], cwd=crowded, env=variables,
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert "--run-name '../elsewhere': need a name of at most 100" in done.stderr
        assert done.returncode != 0 and len(done.stderr.splitlines()) == 1


def test_ranks_of_our_tools_do_not_import_the_working_directory(crowded: Path) -> None:
    done = subprocess.run(
        [*torchrun(1), "-m", "megatron_phf.config.flags"], cwd=crowded,
        env=for_children(environment()), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "--phf-alpha" in done.stdout, done.stderr[:2000]


def test_an_installation_has_every_file_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``pip install .`` takes: modules of packages, and data that setup.py names."""
    given: dict = {}
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    runpy.run_path("setup.py")
    for path in (REPO / "megatron_phf").rglob("*"):
        if path.is_dir() or path.suffix == ".pyc":
            continue
        if path.suffix == ".py":
            package = ".".join(path.parent.relative_to(REPO).parts)
            assert package in given["packages"], path
        else:
            name = str(path.relative_to(REPO / "megatron_phf"))
            patterns = given["package_data"]["megatron_phf"]
            assert any(fnmatch.fnmatch(name, p) for p in patterns), path
