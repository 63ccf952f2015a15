"""What jobs and tools write, and keep; what a resumed run notices; programs that print."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_phf.cli import check_export, convert_checkpoint, gguf_to_hf, make_embedded
from megatron_phf.config.settings import Config
from megatron_phf.console import print_anything
from megatron_phf.data.problems import keep_lines
from megatron_phf.evaluation.generations import GenerationStore
from megatron_phf.files import replace
from megatron_phf.report.page import write_report
from megatron_phf.runtime import parallel
from megatron_phf.train import checkpoint_files, export, run_files
from megatron_phf.train.checkpoint_inputs import check_compatible, inputs
from tests.launch import REPO
from tests.user_files import config_of, contents, make_user_files, write


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The user's files."""
    return make_user_files(tmp_path)


def test_checkpoints_that_we_did_not_write_stay(tmp_path: Path) -> None:
    """Megatron's own, renamed ones, and those with something of the user's in them."""
    directory = str(tmp_path)
    for name in ("iter_0000001", "iter_0000002.old", "iter_0000002.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mp_rank_00").write_text("mine")
    for iteration in (1, 2, 3):
        checkpoint_files.start(directory, iteration)
        partial = Path(checkpoint_files.partial_directory(directory, iteration))
        (partial / "weights").write_text("w")
        manifest = {"format": 1, "files": checkpoint_files.settle(str(partial), ["weights"])}
        checkpoint_files.publish(directory, iteration, manifest)
    (tmp_path / "iter_0000002" / "notes.txt").write_text("mine")
    checkpoint_files.keep_last(directory, 1)
    checkpoint_files.remove_leftovers(directory)
    mine = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert mine == [
        "iter_0000001.1/mp_rank_00", "iter_0000002.old/mp_rank_00",
        "iter_0000002.partial/mp_rank_00", "iter_0000002/checkpoint.json",
        "iter_0000002/notes.txt", "iter_0000002/weights", "iter_0000003/checkpoint.json",
        "iter_0000003/weights", "latest_checkpointed_iteration.txt",
    ]  # fmt: skip


def test_files_beside_are_not_touched(tmp_path: Path) -> None:
    for name in ("a.tmp", "a.partial", "a.old"):
        (tmp_path / name).write_text("mine")
    replace.write_json(str(tmp_path / "a"), {"x": 1})
    keep_lines(str(tmp_path / "a"), lambda number, line: True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.old", "a.partial", "a.tmp"]
    assert all(p.read_text() == "mine" for p in tmp_path.iterdir() if p.suffix)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, without a process group."""
    monkeypatch.setattr(parallel, "is_first_rank", lambda: True)
    monkeypatch.setattr(parallel, "broadcast_object", lambda value, group: value)


def test_a_new_start_keeps_the_files_of_earlier_runs(there: Path, capsys) -> None:
    out = there / "out"
    out.mkdir()
    (out / "run.json").write_text("second")
    (out / "metrics.jsonl").write_text("")
    (out / "evaluations.jsonl").write_text("second")
    (out / "evaluations.jsonl.1").write_text("first")
    (there / "recorded").write_text("second")
    config = config_of(there, record_rollouts="{d}/recorded")
    run_files.keep_earlier_files(config)
    assert {n: c for n, c in contents(there).items() if n.startswith(("out/", "recorded"))} == {
        "out/run.json.2": b"second", "out/evaluations.jsonl.1": b"first",
        "out/evaluations.jsonl.2": b"second", "recorded.2": b"second", "out/metrics.jsonl": b"",
    }  # fmt: skip
    assert "files of an earlier run are kept: " in capsys.readouterr().out
    run_files.keep_earlier_files(config)
    assert capsys.readouterr().out == ""


def test_a_resumed_run_cuts_nothing_of_the_users(tmp_path: Path) -> None:
    """Steps after the checkpoint go; a file with anything else in it is kept beside."""
    path, ours = tmp_path / "m", lambda line: run_files.step_of(line) >= 0
    lines = [json.dumps({"step": i}) + "\n" for i in (1, 2, 3)]
    path.write_text("".join(lines) + '{"step"')

    def keep() -> None:
        keep_lines(str(path), lambda number, line: 0 < run_files.step_of(line) <= 2, ours)

    keep()
    assert path.read_text() == "".join(lines[:2]) and len(list(tmp_path.iterdir())) == 1
    path.write_text(lines[0] + "mine\n")
    keep()
    assert path.read_text() == lines[0]
    assert (tmp_path / "m.1").read_text() == lines[0] + "mine\n"


def test_an_export_that_fails_is_saved_elsewhere(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First under --output-dir, else in the temporary directory; the message says where."""
    tried: list[str] = []
    monkeypatch.setattr(export, "_scratch", lambda: str(tmp_path / "tmp"))

    def saves(*good: str):
        def save(target: str, flag: str) -> None:
            tried.append(target)
            if target not in good:
                raise ValueError(f"{flag} {target}: cannot be written (disk full)")

        return save

    out, there = str(tmp_path / "out"), str(tmp_path / "hf")
    first, second = (f"{tmp_path}/{name}/save-hf.rescued.1" for name in ("out", "tmp"))
    assert export.save_or_rescue(saves(there), "--save-hf", there, out) is None
    for good in (first, second):
        problem = export.save_or_rescue(saves(good), "--save-hf", there, out)
        assert problem is not None
        assert problem.startswith(f"--save-hf {there}: cannot be written (disk full)")
        assert f"the trained weights are in {good} instead" in problem
    assert tried == [there, there, first, there, first, second]
    problem = export.save_or_rescue(saves(), "--save-hf", there, out)
    assert problem is not None and "are lost, but for the checkpoints of --save" in problem


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["merge-adapter", "{d}/model", "{d}/adapter", "{d}/model"], "TARGET .* is SOURCE"),
        (["merge-adapter", "{d}/model", "{d}/adapter", "{d}/adapter"], "TARGET .* is ADAPTER"),
        (["merge-adapter", "{d}/model", "{d}/adapter", "{d}/link"], "TARGET .* is SOURCE"),
        (["hf-to-megatron", "{d}/model", "{d}/model/new"], "TARGET .* lies in SOURCE"),
        (["hf-to-megatron", "{d}/model", "{d}"], "TARGET .* contains SOURCE"),
        (["megatron-to-hf", "{d}/mine", "{d}/mine"], "TARGET .* is SOURCE"),
        (["megatron-to-hf", "{d}/mine", "{d}/model", "--hf-model", "{d}/model"], "is --hf-model"),
        (["hf-to-megatron", "{d}/model", "{d}/data.jsonl/x"], "TARGET .*: cannot be written"),
    ],
)
def test_a_conversion_loses_nothing(there: Path, argv: list[str], said: str) -> None:
    before = contents(there)
    words = [*(word.format(d=there) for word in argv), "--overwrite"]
    with pytest.raises(ValueError, match=said):
        convert_checkpoint.plan_job(convert_checkpoint.build_parser().parse_args(words))
    assert contents(there) == before


def test_overwriting_keeps_what_is_not_ours(there: Path, monkeypatch, capsys) -> None:
    def job(args: object) -> dict[str, str]:
        return {"target": str(there / "mine") + replace.PARTIAL, "action": ""}

    monkeypatch.setattr(convert_checkpoint, "plan_job", job)
    monkeypatch.setattr(
        convert_checkpoint, "start_ranks", lambda job, directory: write(Path(job["target"]))
    )
    args = convert_checkpoint.build_parser().parse_args(
        ["hf-to-megatron", "a", "b", "--overwrite", "--no-verify"]
    )
    for _ in range(2):  # the second time it is ours
        convert_checkpoint.convert(args)
        assert (there / "mine/model.safetensors").read_text() == "weights"
        assert (there / "mine.1/config.json").read_text() == "{}"
        assert not (there / "mine.2").exists()
    assert f"what was in {there}/mine is in {there}/mine.1 now" in capsys.readouterr().out


def test_other_tools_write_over_nothing(there: Path, monkeypatch) -> None:
    before = contents(there)
    with pytest.raises(ValueError, match="mine is not empty"):
        gguf_to_hf.convert(str(there / "data.jsonl"), str(there / "mine"))
    with pytest.raises(ValueError, match=r"data.jsonl: is there already"):
        check_export.write_probe("m", str(there / "data.jsonl"))
    monkeypatch.setattr(sys, "argv", ["make_embedded", "--output-dir", str(there)])
    with pytest.raises(ValueError, match=r"student.txt: is there already, with other content"):
        make_embedded._read()
    with pytest.raises(ValueError, match=r"eval.jsonl: is there already, with other content"):
        replace.write_new_text(str(there / "eval.jsonl"), "ours\n")
    replace.write_new_text(str(there / "eval.jsonl"), "mine\n")
    assert contents(there) == before
    for name in ("generations.jsonl", "summary.json"):
        (there / "empty" / name).write_text("mine")
        with pytest.raises(ValueError, match=f"its {name} is of no evaluation"):
            GenerationStore(str(there / "empty"), {})
        (there / "empty" / name).unlink()
    (there / "empty" / "loss.png").write_text("mine")
    monkeypatch.setattr("megatron_phf.report.page._baseline", lambda *_: None)
    with pytest.raises(ValueError, match=r"no report of this program; .*--output"):
        write_report([], str(there / "empty"))


def manifest(config: Config) -> dict:
    plain = {group: dict(vars(values)) for group, values in vars(config).items()}
    return {"architecture": {}, "dtype": "", "config": plain, "inputs": inputs(config)}


@pytest.mark.parametrize("flag", ["hf_model", "teacher_hf_model", "tokenizer_model"])
@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja", "tokenizer_config.json", "tokenizer.json", "generation_config.json",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
        "tokenizer.model", "additional_chat_templates/rag.jinja", "tokenization_x.py", "x.tiktoken",
    ],
)  # fmt: skip
def test_a_resume_notices_what_decides_about_prompts(there: Path, flag: str, name: str) -> None:
    """Changed, gone or new: the flag and the file are named."""
    config = config_of(there, **{flag: "{d}/mine"})
    path = there / "mine" / name
    path.parent.mkdir(exist_ok=True)
    without = manifest(config)
    path.write_text("one")
    with_it = manifest(config)
    (there / "mine" / "README.txt").write_text("of no consequence")
    assert check_compatible("ckpt", with_it, manifest(config)) == []
    path.write_text("two")
    said = f"--{flag.replace('_', '-')} {there}/mine: its {name} is not what the run of ckpt read"
    with pytest.raises(ValueError, match=said):
        check_compatible("ckpt", with_it, manifest(config))
    path.unlink()
    with pytest.raises(ValueError, match=said):
        check_compatible("ckpt", with_it, manifest(config))
    if flag == "tokenizer_model":  # checkpoints of before knew no such files of a model
        path.write_text("one")
        with pytest.raises(ValueError, match=said):
            check_compatible("ckpt", without, manifest(config))


@pytest.mark.parametrize(
    ("now", "file"),
    [
        ("math=A,code=B", None),
        ("math=B,code=A", "1:math/config.json, 2:code/config.json"),
        (
            "code=B,math=A",
            "1:code/config.json, 1:math/config.json, 2:code/config.json and 1 more",
        ),  # the first is the default
        ("math=A,tex=B", "2:code/config.json, 2:tex/config.json"),
        ("math=A", "2:code/config.json"),
        ("A", "1:math/config.json, 2:code/config.json, config.json"),
    ],
)
def test_a_resume_has_the_same_teachers(there: Path, now: str, file: str | None) -> None:
    """By their names, in their order, from wherever they are."""
    for name in "AB":
        (there / name).mkdir()
        (there / name / "config.json").write_text(name)
    before, after = (
        config_of(there, teacher_hf_model=re.sub("[AB]", rf"{there}/\g<0>", text))
        for text in ("math=A,code=B", now)
    )
    if file is None:
        assert check_compatible("ckpt", manifest(before), manifest(after)) == []
        return
    with pytest.raises(ValueError, match=rf"--teacher-hf-model .*: its {file} is not what the run"):
        check_compatible("ckpt", manifest(before), manifest(after))


def test_a_checkpoint_of_before_still_loads(there: Path) -> None:
    """It has fingerprints of config.json and the weights alone."""
    config = config_of(there)
    old = manifest(config)
    (there / "model" / "tokenizer.json").write_text("{}")
    assert check_compatible("ckpt", old, manifest(config)) == []
    (there / "model" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"--hf-model .*: its config.json is not what"):
        check_compatible("ckpt", old, manifest(config))


def test_prints_survive_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    print_anything()
    print("Δ – 30°", "\udcff")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u0394 \\u2013 30\\xb0 \\udcff\n"


def test_a_program_prints_with_any_encoding(tmp_path: Path) -> None:
    """PYTHONIOENCODING does what the locale of such a terminal does to standard output."""
    source, target = tmp_path / "gsm8k.jsonl", tmp_path / "modèle.jsonl"
    source.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    done = subprocess.run(
        [sys.executable, "tools/prepare_data.py", "gsm8k", str(source), str(target)],
        cwd=REPO,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"1 problems written to" in done.stdout and b"mod\\xe8le" in done.stdout


def test_every_program_begins_so() -> None:
    """Those that run ranks do it for all of them; tools/ call the package's programs."""
    starts = ("@program", "print_anything()", "run_rank(", "leave_on_error(", "phf.cli.main")
    for path in REPO.glob("megatron_phf/**/*.py"):
        text = path.read_text(encoding="utf-8")
        before, _, program = text.partition('if __name__ == "__main__":')
        # They talk through a pipe of their own, share no code, or are read by a program of ours.
        own = {"reference", "accept"} & {*path.parts}
        if program and path.name not in ("grader_process.py", "watch.py") and not own:
            program += before.partition("\ndef main(")[2]
            program += "@program" * ("\n@program\ndef main(" in before)
            assert any(start in program for start in starts), path
    for path in REPO.glob("tools/[a-z]*.py"):
        text = path.read_text(encoding="utf-8")
        assert f"from megatron_phf.cli.{path.stem} import main" in text, path
