"""What happens to a run when something is done to it: killed, stopped, starved, signalled."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron_phf.files.replace import OLD, PARTIAL
from megatron_phf.train import checkpoint_files
from tests.faults.runs import (
    flags,
    latest,
    launch,
    make_files,
    outputs,
    same_weights,
    steps_of,
    write_plan,
)

STEPS = 9
# A SIGKILL of one rank at each of these; torchrun starts both ranks again.
KILLS = [
    {"rank": 1, "step": 2, "where": "rollout"},
    {"rank": 0, "step": 3, "where": "teacher"},
    {"rank": 1, "step": 4, "where": "backward"},
    {"rank": 0, "step": 5, "where": "optimizer"},
    {"rank": 1, "step": 6, "where": "save_files"},
    {"rank": 0, "step": 7, "where": "write"},
    {"rank": 0, "step": 8, "where": "publish"},
]
EACH = ["--save-interval", "1", "--keep-last", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The run's files, and an undisturbed run called ``straight``."""
    directory = tmp_path_factory.mktemp("faults")
    make_files(directory)
    arguments = [*flags(directory, STEPS), *outputs(directory, "straight"), *EACH]
    done = launch(write_plan(directory / "none.json"), arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no checkpoint there, starting from --hf-model" in done.stdout
    assert latest(directory / "straight") == STEPS
    assert checkpoint_files.saved_iterations(str(directory / "straight/checkpoints")) == [9, 8]
    return directory


def test_killed_ranks_lose_nothing(files: Path) -> None:
    """Seven kills, seven restarts: no step lost or done twice, weights bit-equal."""
    plan = write_plan(files / "kills.json", *({**k, "action": "KILL"} for k in KILLS))
    arguments = [*flags(files, STEPS), *outputs(files, "killed"), *EACH]
    done = launch(plan, arguments, restarts=len(KILLS))
    assert done.returncode == 0, done.stderr[-3000:]
    for number, kill in enumerate(KILLS):
        assert Path(f"{plan}.{number}").exists(), f"not killed: {kill}"
    assert done.stdout.count("resumed from") == len(KILLS)
    assert steps_of(files / "killed") == steps_of(files / "straight")
    assert same_weights(files / "killed", files / "straight")
    left = {p.name for p in (files / "killed" / "checkpoints").iterdir()}
    assert not [name for name in left if name.endswith((PARTIAL, OLD))]


def test_full_disk_then_damage_then_truncated_data(files: Path) -> None:
    """No file may grow while step 4 is saved; after that each mishap is named, and the run ends as

    the undisturbed one.
    """
    plan = write_plan(
        files / "full.json", {"rank": 0, "step": 4, "where": "save_files", "action": "FSIZE"}
    )
    arguments = [*flags(files, STEPS), *outputs(files, "full"), "--save-interval", "1"]
    done = launch(plan, arguments)
    assert done.returncode != 0
    error = next(x for x in done.stderr.splitlines() if x.startswith("error: "))
    assert "--save" in error and "cannot be written" in error and "is the disk full" in error
    assert latest(files / "full") == 3
    none = files / "none.json"

    data = files / "data.jsonl"
    whole = data.read_text()
    data.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    done = launch(none, arguments)
    assert done.returncode != 0
    assert f"--data {data}: not what the run of" in done.stderr, done.stderr[-2000:]
    data.write_text(whole)

    newest = Path(checkpoint_files.iteration_directory(str(files / "full/checkpoints"), 3))
    shard = newest / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = launch(none, [*arguments, "--exact-checkpoint"])
    assert done.returncode != 0
    assert f"{newest}: __0_0.distcp: its checksum is wrong (--exact-checkpoint)" in done.stderr
    done = launch(none, arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"damaged checkpoint: {newest}: __0_0.distcp: its checksum is wrong" in done.stdout
    assert "after step 2" in done.stdout
    assert steps_of(files / "full") == steps_of(files / "straight")
    assert same_weights(files / "full", files / "straight")


def test_a_signal_to_one_rank_ends_the_run_in_order(files: Path) -> None:
    plan = write_plan(
        files / "signal.json", {"rank": 1, "step": 2, "where": "rollout", "action": "TERM"}
    )
    done = launch(plan, [*flags(files, STEPS), *outputs(files, "signal")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "SIGTERM received: ending after step 2" in done.stdout
    assert latest(files / "signal") == 2
    assert not (files / "signal" / "hf").exists()


def test_ctrl_c_then_an_export_that_fails(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT to torchrun ends the run in order; the next one goes on, on a terminal without UTF-8.

    There somebody takes the place of the export meanwhile: it lies elsewhere, as of a run that
    nothing happened to.
    """
    run = files / "interrupted"
    hf, rescued = run / "hf", run / "out" / "save-hf.rescued.1"
    plan = write_plan(
        files / "interrupt.json",
        {"rank": 1, "step": 2, "where": "rollout", "action": "CTRL_C"},
        {"rank": 0, "step": 3, "where": "teacher", "action": f"BLOCK {hf}"},
    )
    arguments = [*flags(files, STEPS), *outputs(files, "interrupted")]
    done = launch(plan, arguments)
    assert "SIGINT received: ending after step 2" in done.stdout, done.stderr[-3000:]
    assert "KeyboardInterrupt" not in done.stderr
    assert latest(run) == 2 and not hf.exists()

    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = launch(plan, arguments)
    assert done.returncode != 0
    errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: --save-hf {hf}: cannot be written")
    assert f"the trained weights are in {rescued} instead: move them" in errors[0]
    assert [p.name for p in hf.iterdir()] == ["notes.txt"]
    assert steps_of(run) == steps_of(files / "straight")
    shutil.rmtree(hf)
    rescued.rename(hf)
    assert same_weights(run, files / "straight")


def test_a_stopped_rank_is_named(files: Path) -> None:
    plan = write_plan(
        files / "stop.json", {"rank": 1, "step": 2, "where": "teacher", "action": "STOP"}
    )
    arguments = [*flags(files, STEPS), *outputs(files, "stopped"), *EACH]
    done = launch(plan, [*arguments, "--distributed-timeout-minutes", "0.3"])
    assert done.returncode != 0
    assert "rank 1: silent for" in done.stderr, done.stderr[-3000:]
    assert "last in step 2, teacher" in done.stderr
    assert latest(files / "stopped") == 1


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest"])
def test_damage_is_found(files: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "iter_0000009"
    shutil.copytree(files / "straight" / "checkpoints" / "iter_0000009", path)
    manifest = checkpoint_files.read_manifest(str(path))
    assert checkpoint_files.damage(str(path), manifest["files"]) == []
    shard = path / "__0_0.distcp"
    if damage == "truncated":
        os.truncate(shard, 100)
        expected = "__0_0.distcp: 100 bytes, not"
    elif damage == "missing":
        shard.unlink()
        expected = "__0_0.distcp: cannot be read"
    else:
        os.truncate(path / "checkpoint.json", 100)
        with pytest.raises(ValueError, match=r"checkpoint.json: missing or damaged"):
            checkpoint_files.read_manifest(str(path))
        return
    assert expected in checkpoint_files.damage(str(path), manifest["files"])[0]
