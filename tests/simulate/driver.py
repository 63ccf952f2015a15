"""Plays cases in one process, which imports once and forks for each rank.

python -m tests.simulate.driver OUTPUT.json plain|stub
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megatron_phf.cli import dry_run, plan
from megatron_phf.simulate import ranks
from tests.launch import REPO
from tests.simulate.cases import LAYOUTS, MODEL, PLANTED, PLANTS, TEACHER, Layout


def write_model(path: Path, content: dict) -> str:
    """A directory with a ``config.json`` alone."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(content))
    return str(path)


def play(sim: object, layout: Layout, directory: Path) -> list[dict]:
    """Its ranks' results."""
    model = write_model(directory / "model", layout.model)
    flags = layout.flags.replace("TEACHER", write_model(directory / "teacher", TEACHER)).split()
    # So many tokens of a window, and in a chunk of logits, that small batches are like large ones.
    flags += ["--hf-model", model, "--phf-window-size", "32", "--logits-chunk-tokens", "64"]
    job = dry_run.read_job(
        flags, layout.world, layout.lengths, decode=layout.decode, engine_stub=layout.stub
    )
    with pytest.MonkeyPatch.context() as patch:
        if layout.plant is not None:
            PLANTS[layout.plant](patch)
        return ranks.run_ranks(sim, job, layout.ranks)


def commands(sim: object, directory: Path) -> dict[str, list]:
    """(status, what is printed) of the two commands that simulate."""
    model = write_model(directory / "model", {**MODEL, "num_hidden_layers": 2})
    found: dict[str, list] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "prepare", lambda *args: sim)  # this process is prepared
        for name, main, words in (
            ("plan", plan.main, "--gpus 2 --global-batch-size 2 --max-prompt-length 64 "
             "--max-teacher-prompt-length 64 --max-new-tokens 64 --simulate 1 --best 2"),
            ("dry_run", dry_run.main, "--world 2 --ranks last --gpu-memory 1 --lengths 64,64 -- "
             "--global-batch-size 2"),
        ):  # fmt: skip
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                status = main(["--hf-config", f"{model}/config.json", *words.split()])
            found[name] = [status, printed.getvalue()]
    return found


def main(output: str, kind: str) -> None:
    """All cases over Transformer Engine's stand-in, or all others."""
    stub = kind == "stub"
    sim = ranks.prepare(str(REPO / "tests/fake_te") if stub else None)
    found: dict[str, Any] = {}
    for name, layout in {**LAYOUTS, **PLANTED}.items():
        if layout.stub == stub:
            with tempfile.TemporaryDirectory() as directory:
                found[name] = play(sim, layout, Path(directory))
    if not stub:
        with tempfile.TemporaryDirectory() as directory:
            found["commands"] = commands(sim, Path(directory))
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
