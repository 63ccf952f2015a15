"""examples/h100/first_run.sh over stand-ins: order, resume, no network, no Transformer Engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch import REPO

SCRIPT = "examples/h100/first_run.sh"
PIN = re.search(r"^TORCH \?= (torch==[\d.]+)$", (REPO / "Makefile").read_text(), re.M)[1]
FATAL = ["checks", "environment", "build_tools", "torch", "driver", "product"]
ENGINE = ["te_wheel", "te_headers", "te_build", "te_import"]
STEPS = [*FATAL, "vllm", "acceptance_all", *ENGINE[1:], "acceptance_te"]
GPU = """#!/usr/bin/env bash
case $* in
    *name*) echo "NVIDIA H100 80GB HBM3, 81559 MiB, 580.00, 9.0" ;;
    *) echo 9.0 ;;
esac
"""
# It notes how it was called; BROKEN: what fails.  "-m venv" gives the environment this same file.
PYTHON = """#!/usr/bin/env bash
case $* in
    "-c import sys, venv"*) [ "$BROKEN" != python ]; exit ;;
    "-c import platform"*) echo 3.12.3; exit ;;
    "-c import os, torch"*) [ -n "$TORCH" ] && echo "$TORCH" /machine; exit ;;
    "-c import os, sys, sysconfig"*) [ "$BROKEN" != headers ]; exit ;;
    "-c import torch; torch.zeros"*)
        [ "$BROKEN" != too-old ] || { echo trace; echo "RuntimeError: driver is too old"; exit 1; }
        echo CUDA 13.0; exit ;;
    "-c import torch; print"*) echo 13; exit ;;
    *glob*) echo /site/nvidia/cudnn/include:/site/nvidia/cu13/include; exit ;;
esac
echo "$* | ${NVTE_CUDA_ARCHS:-} ${NVTE_FRAMEWORK:-} ${CPATH:-} ${CUDNN_PATH:-}" >>"$CALLS"
case $* in
    "-m venv"*) mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" ;;
    *acceptance.py*) echo the table; exit "${ROWS:-0}" ;;
esac
[ -z "$BROKEN" ] || [[ $* != *"$BROKEN"* ]]
"""


class Machine:
    """``start`` runs the script there; what its Python was asked, call by call."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.state = directory, directory / "state"
        for name, text in (
            ("nvidia-smi", GPU),
            ("python3", PYTHON),
            ("cc", "#!/bin/sh\necho cc"),
            ("c++", "#!/bin/sh\necho c++"),
        ):
            path = directory / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)

    def start(self, *flags: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        calls = self.directory / "calls"
        calls.write_text("")
        environment = {**os.environ, "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}"}
        environment |= {"CALLS": str(calls), "BROKEN": "", "TORCH": "", "CUDA_HOME": ""}
        done = subprocess.run(
            ["bash", SCRIPT, "--state", str(self.state), *flags], cwd=REPO, text=True, timeout=300,
            env={**environment, **variables}, capture_output=True, check=False,
        )  # fmt: skip
        return done, calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def verdicts(done: subprocess.CompletedProcess) -> dict[str, str]:
    """By step, in the order in which they were printed."""
    lines = [line.split(None, 1) for line in done.stdout.splitlines() if line[:1].strip()]
    return {line[0]: line[1] for line in lines if line[0] in {*STEPS, *ENGINE}}


def test_steps_in_order_and_again(machine: Machine) -> None:
    done, calls = machine.start("--", "--gpus", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(verdicts(done)) == STEPS
    assert done.stdout.endswith("the table\n")
    asked = [call.split(" | ")[0] for call in calls]
    venv = str(machine.state / "venv")
    assert asked[0] == f"-m venv {venv}"
    assert asked[1].startswith("-m pip install setuptools<82 wheel packaging")
    assert asked[2] == f"-m pip install {PIN}" and verdicts(done)["driver"] == "CUDA 13.0"
    assert asked[3].endswith(f"-e {REPO}")
    assert asked[4].endswith(f"acceptance.py --json {machine.state}/acceptance_all.json --gpus 1")
    assert asked[-1].endswith(f"{machine.state}/acceptance_te.json --gpus 1 --parts engine")
    build = next(call for call in calls if "transformer_engine[pytorch" in call)
    assert (
        "--no-build-isolation transformer_engine[pytorch,core_cu13]==2.20.2 | 90 pytorch" in build
    )
    assert build.endswith("/site/nvidia/cudnn/include:/site/nvidia/cu13/include /site/nvidia/cudnn")
    again, calls = machine.start()
    assert set(verdicts(again).values()) == {"done before"} and calls == []


def test_it_goes_on_behind_the_last_step_that_passed(machine: Machine) -> None:
    done, _ = machine.start(BROKEN="-e /")
    assert done.returncode == 1
    assert verdicts(done)["product"].startswith("FAILED: see ")
    assert list(verdicts(done)) == FATAL
    again, calls = machine.start()
    assert again.returncode == 0 and list(verdicts(again)) == STEPS
    assert [v for v in verdicts(again).values()][:5] == ["done before"] * 5
    assert f"-e {REPO} |" in calls[0]


@pytest.mark.parametrize("broken", ["transformer_engine[pytorch", "import transformer_engine"])
def test_without_transformer_engine_the_table_is_there(machine: Machine, broken: str) -> None:
    """What was built in part goes, and is built anew at the next start."""
    done, calls = machine.start(BROKEN=broken, ROWS="1")
    assert done.returncode == 0
    assert "without Transformer Engine" in done.stdout and done.stdout.endswith("the table\n")
    found = verdicts(done)
    assert found["acceptance_all"].startswith("some rows fail: ") and "acceptance_te" not in found
    assert calls[-1].startswith("-m pip uninstall -y transformer_engine ")
    _, calls = machine.start()
    assert "transformer_engine[pytorch" in calls[-3] and "acceptance_te" in calls[-1]


def test_without_a_network(machine: Machine, tmp_path: Path) -> None:
    """The machine's torch is used where there is no other, and nothing is asked of an index."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    done, calls = machine.start("--wheels", str(wheels), TORCH="2.11.0+cu130")
    assert done.returncode == 0
    assert verdicts(done)["torch"].startswith(
        "2.11.0+cu130 /machine of the machine (pinned: torch="
    )
    assert "machine.pth" in calls[1] and calls[1].split(" | ")[0].endswith(" /machine")
    installs = [call for call in calls if " install " in call]
    assert len(installs) >= 3
    assert all(f"install --no-index --find-links {wheels} " in call for call in installs)


def test_wheels_go_before_what_the_machine_has(machine: Machine, tmp_path: Path) -> None:
    """The pinned torch, vLLM in an environment of its own, Transformer Engine without a build."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("torch-2.13.0-cp312", "vllm-0.33.0-cp38", "transformer_engine_torch-2.20.2"):
        (wheels / f"{name}.whl").touch()
    done, calls = machine.start("--wheels", str(wheels), TORCH="2.11.0+cu130")
    assert done.returncode == 0
    assert list(verdicts(done)) == [*FATAL, "vllm", "te_wheel", "te_import", "acceptance_all"]
    assert any(f"{wheels} {PIN} |" in call for call in calls)
    assert any(f"{wheels} vllm {REPO} |" in call for call in calls)
    assert not any("pybind11" in call for call in calls)


@pytest.mark.parametrize(("version", "used"), [(PIN[7:] + "+cu130", True), ("2.11.0+cu130", False)])
def test_the_pinned_torch(machine: Machine, version: str, used: bool) -> None:
    """With a network another version on the machine is left alone."""
    done, calls = machine.start("--dry-run", TORCH=version)
    assert (f"install {PIN}" not in done.stdout) is used and calls == []


def test_dry_run_changes_nothing(machine: Machine) -> None:
    done, calls = machine.start("--dry-run")
    assert done.returncode == 0 and calls == []
    assert list(verdicts(done)) == STEPS
    assert not list(machine.state.glob("*.done"))


@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        ("nvidia-smi", {}, "no GPU: nvidia-smi is missing"),
        ("cc", {}, "no C or C++ compiler, which triton needs at run time"),
        ("", {"BROKEN": "python"}, "need Python 3.11 or newer with venv"),
        ("", {"BROKEN": "headers"}, "has no Python.h, which triton needs at run time"),
    ],
)
def test_what_the_machine_lacks(
    machine: Machine, name: str, variables: dict[str, str], message: str
) -> None:
    if name == "cc":  # nothing of this machine's own but what the script itself needs
        tools = machine.directory / "tools"
        tools.mkdir()
        for tool in ("bash", "env", "sed", "mkdir", "dirname", "head", "wc", "df", "awk", "tail"):
            (tools / tool).symlink_to(shutil.which(tool))
        (machine.directory / "bin" / name).unlink()
        variables = {"PATH": f"{machine.directory / 'bin'}:{tools}"}
    elif name:
        (machine.directory / "bin" / name).write_text("#!/bin/sh\nexit 9\n")
    done, calls = machine.start(**variables)
    assert done.returncode == 1 and message in verdicts(done)["checks"]
    assert calls == []


def test_a_driver_too_old_for_torch_ends_it(machine: Machine) -> None:
    done, calls = machine.start(BROKEN="too-old")
    assert done.returncode == 1 and list(verdicts(done)) == FATAL[:5]
    said = "torch cannot use the GPU (RuntimeError: driver is too old): update the driver"
    assert said in verdicts(done)["driver"] and "install" in calls[-1]


@pytest.mark.parametrize("flags", [["--wheels", "/none"], ["--wheels"], ["--typo"]])
def test_mistakes(machine: Machine, flags: list[str]) -> None:
    done, calls = machine.start(*flags)
    assert done.returncode == 2 and done.stderr.startswith("error: --") and calls == []
