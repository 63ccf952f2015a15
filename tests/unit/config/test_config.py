"""Flags, their defaults, and everything that is refused before a process group exists."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_phf.cli import preflight
from megatron_phf.config.flags import build_parser, check_fields, parse_args, without_effect
from megatron_phf.config.settings import Config, config_groups, flag_of
from megatron_phf.config.teachers import teacher_directories, teacher_names
from tests.models import make_model, make_replay

GOOD = '{"problem": "1+1?", "solution": "It is 2.", "answer": "2"}\n'


def test_defaults_are_the_published_recipe() -> None:
    config = parse_args(["--hf-model", "m", "--data", "d"])
    assert config == Config().replaced(hf_model="m", data="d")
    assert (config.method.phf_alpha, config.method.phf_window_size) == (0.05, 128)
    assert (config.train.train_iters, config.train.global_batch_size) == (100, 32)
    assert (config.train.lr, config.train.clip_grad) == (5e-6, 0.1)
    rollout = config.rollout
    assert (rollout.rollout_temperature, rollout.rollout_top_p, rollout.rollout_top_k) == (
        1.1,
        0.95,
        20,
    )


def test_embedded_defaults_give_way_to_flags() -> None:
    assert parse_args([]).is_embedded
    assert parse_args([]).train.lr != Config().train.lr
    assert parse_args(["--lr", "0.5"]).train.lr == 0.5


def test_every_flag_has_a_help_text() -> None:
    for action in build_parser()._actions:
        assert action.help


NUMBERS = [
    (f.name, f.metadata["range"])
    for cls in config_groups().values()
    for f in dataclasses.fields(cls)
    if "int" in str(f.type) or "float" in str(f.type)
]


@pytest.mark.parametrize(("name", "allowed"), NUMBERS)
def test_every_number_has_a_range_that_is_checked_and_in_its_help(name: str, allowed) -> None:
    with pytest.raises(ValueError, match=f"^{flag_of(name)} -1: need {re.escape(allowed.text)}$"):
        check_fields(Config().replaced(**{name: -1}))
    (action,) = [a for a in build_parser()._actions if a.dest == name]
    assert f"; {allowed.text}" in action.help


NO_NAMES = ["/abs", "../..", "a/b", "", " ", "a\n", "a\nb", "a\0", ".", ".hidden", "\udcff"]


@pytest.mark.parametrize("name", [*NO_NAMES, "x" * 101, "x" * 300])
def test_a_run_name_is_a_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"^--run-name '.*: need a name of at most 100 bytes"):
        check_fields(Config().replaced(run_name=name))


@pytest.mark.parametrize("name", ["phf", "OPSD + PHF, alpha=0.05", "phf alpha=0.05_é.2", "größer"])
def test_what_people_call_runs_is_a_name(name: str) -> None:
    check_fields(Config().replaced(run_name=name))


@pytest.mark.parametrize(
    ("given", "directories", "names"),
    [
        ("", {}, ()),
        ("DIR/a", {"": "DIR/a"}, ()),
        ("DIR/a DIR/b", {"": "DIR/b"}, ()),  # the last counts, as of any flag
        ("DIR/x=1", {"": "DIR/x=1"}, ()),
        ("x=1", {"": "x=1"}, ()),  # where there is such a directory
        ("math=DIR/a", {"math": "DIR/a"}, ("math",)),
        ("math=DIR/a code=b=,c", {"math": "DIR/a", "code": "b=,c"}, ("math", "code")),
        ("math=DIR/a,code=b", {"math": "DIR/a", "code": "b"}, ("math", "code")),
    ],
)
def test_teachers_with_names(
    given: str, directories: dict, names: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x=1").mkdir()
    monkeypatch.chdir(tmp_path)
    config = parse_args([w for word in given.split() for w in ("--teacher-hf-model", word)])
    assert list(teacher_directories(config).items()) == list(directories.items())
    assert teacher_names(config) == names


@pytest.mark.parametrize("words", ["DIR/a math=b", "math=b DIR/a"])
def test_a_teacher_is_not_dropped_for_want_of_a_name(words: str) -> None:
    with pytest.raises(ValueError, match="one has a name and one has none"):
        parse_args([w for word in words.split() for w in ("--teacher-hf-model", word)])


IDLE = {
    "--ema-decay 0.9": "--ema-decay 0.9 has no effect without --teacher ema",
    "--lora-dropout 0.1": "without --lora-rank",
    "--lora-alpha 16": "without --lora-rank",
    "--token-keep-fraction 0.2": "without --token-weighting student_entropy or divergence_top_p",
    "--token-entropy-threshold 1": "without --token-weighting teacher_entropy",
    "--recompute-method block": "without --recompute-granularity full",
    "--recompute-num-layers 2": "without --recompute-granularity full",
}


@pytest.mark.parametrize("flags", IDLE)
def test_a_flag_without_effect_is_said(flags: str) -> None:
    (text,) = without_effect(parse_args(flags.split()))
    assert IDLE[flags] in text
    assert without_effect(parse_args(["--teacher", "ema", "--ema-decay", "0.9"])) == []


@pytest.mark.parametrize("flag", ["--engine-drift-warning", "--vllm-drift-warning"])
def test_an_earlier_name_of_a_flag_is_accepted(flag: str) -> None:
    assert parse_args([flag, "0.25"]).rollout.engine_drift_warning == 0.25


def test_choices_hold_without_a_command_line_too() -> None:
    with pytest.raises(ValueError, match="--teacher 'best': need frozen, ema or live"):
        check_fields(Config().replaced(teacher="best"))
    (action,) = [a for a in build_parser()._actions if a.dest == "keep_last"]
    assert action.help.endswith("(default: 0; at least 0; needs --save)")


def test_booleans_and_none() -> None:
    config = parse_args(["--sequence-parallel", "--no-tensorboard"])
    assert config.parallel.sequence_parallel
    assert not config.output.tensorboard
    assert config.parallel.recompute_granularity is None


@pytest.mark.parametrize("argv", [["--no-such-flag"], ["--lr", "fast"], ["--teacher", "best"]])
def test_malformed_command_lines(argv: list[str]) -> None:
    with pytest.raises(ValueError, match=argv[0]):
        parse_args(argv)


def test_an_unknown_flag_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="--phf-alhpa 1; did you mean --phf-alpha"):
        parse_args(["--phf-alhpa", "1"])


def test_help_and_checks_need_no_torch() -> None:
    code = "import sys; import megatron_phf.cli.preflight; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("preflight")
    (directory / "data.jsonl").write_text(GOOD)
    (directory / "bad.jsonl").write_text(GOOD + "{\n")
    art = {**json.loads(GOOD), "teacher": "art"}
    (directory / "fields.jsonl").write_text(GOOD + json.dumps(art) + "\n")
    damaged = directory / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    other = directory / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    scaled = make_model(str(directory / "scaled"))
    config = json.loads(Path(scaled, "config.json").read_text())
    config["rope_parameters"]["rope_type"] = "yarn"
    Path(scaled, "config.json").write_text(json.dumps(config))
    for name, tokens in {"one": ["a", "b"], "two": ["b", "a"]}.items():
        path = make_model(str(directory / name), hidden_size=96, num_hidden_layers=6)
        content = {"model": {"vocab": {token: i for i, token in enumerate(tokens)}}}
        content["added_tokens"] = [{"content": "<end>", "id": 240}]
        Path(path, "tokenizer.json").write_text(json.dumps(content))
    make_model(str(directory / "few"), vocab_size=200)
    shutil.copy(directory / "one" / "tokenizer.json", directory / "few")
    model = make_model(str(directory / "model"))
    return {
        "ONE": str(directory / "one"),
        "TWO": str(directory / "two"),
        "FEW": str(directory / "few"),
        "EXPERTS": make_model(
            str(directory / "experts"),
            architecture="qwen3_moe",
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        ),
        "FIELDS": str(directory / "fields.jsonl"),
        "SHORT": make_model(str(directory / "short"), max_position_embeddings=100),
        "MODEL": model,
        "BARE": make_model(str(directory / "bare"), tokenizer=False),
        "DATA": str(directory / "data.jsonl"),
        "BAD": str(directory / "bad.jsonl"),
        "DAMAGED": str(damaged),
        "OTHER": str(other),
        "SCALED": scaled,
        "EMPTY": str(tmp_path_factory.mktemp("empty")),
        "REPLAY": make_replay(str(directory / "replay.jsonl"), [2, 3]),
        "LONG": make_replay(str(directory / "long.jsonl"), [3, 520]),
        "MIDDLE": make_replay(str(directory / "middle.jsonl"), [97]),
    }


SHORT = "--max-new-tokens 64 --max-prompt-length 64 --max-teacher-prompt-length 128 "
DATA = "--data DATA " + SHORT
REAL = "--hf-model MODEL " + DATA
TWO = "--hf-model TWO " + DATA
SEVERAL = "--teacher-hf-model math=TWO --teacher-hf-model "
RECORDED = "--hf-model MODEL --rollout-engine replay --replay-file "
PACKED = "--pack-sequences --context-parallel-size 2 --max-tokens-per-microbatch "
MISTAKES = {
    "--train-iters 0": "--train-iters 0: need at least 1",
    "--opsd-beta 1.5": "--opsd-beta 1.5: need 0 to 1",
    "--phf-window-size 1": "--phf-window-size 1: need at least 2",
    "--phf-alpha -1": "--phf-alpha -1.0: need at least 0",
    "--min-lr 1": "--min-lr 1.0: need 0 to --lr",
    "--lr inf": "--lr inf: need a finite number",
    "--save-interval 1099511627776": "--save-interval 1.100e+12: too large a number",
    "--distributed-timeout-minutes 0": "--distributed-timeout-minutes 0.0: need above 0",
    "--keep-last 2": "--keep-last needs --save",
    "--save out": "--save needs --hf-model",
    "--context-parallel-size 2": "--context-parallel-size above 1",
    "--sequence-parallel": "--sequence-parallel needs --tensor-model-parallel-size",
    "--num-virtual-stages-per-pipeline-rank 2": "needs --pipeline-model-parallel-size above 1",
    "--hf-model MODEL": "--hf-model and --data belong together",
    "--data DATA": "--hf-model and --data belong together",
    "--rollout-engine replay": "--replay-file and --rollout-engine replay belong together",
    "--rollout-engine replay --replay-file REPLAY": "replay needs --hf-model",
    "--opsd-objective policy_gradient --opsd-top-k 3": "--opsd-top-k does not apply",
    "--data DATA --hf-model /nowhere": "--hf-model /nowhere: no such directory",
    "--data DATA --hf-model EMPTY": "config.json: cannot be read",
    "--data DATA --hf-model DAMAGED": "config.json: is not JSON",
    "--data DATA --hf-model OTHER": "model_type 'gpt2' is not supported",
    "--data DATA --hf-model SCALED": "rope scaling 'yarn'",
    "--data BAD --hf-model MODEL " + SHORT: "bad.jsonl:2: not JSON",
    "--phf-terms direction,colour": "term 'colour': name one of direction, geometry",
    "--phf-layers 2,5": "layer 5: the student has layers 1 to 3",
    "--phf-layers 2,x": "--phf-terms, --phf-layers: invalid literal",
    "--phf-terms direction=x": "term 'direction=x': its weight is not a number",
    "--phf-terms nowhere:Term": "term 'nowhere:Term': cannot be made",
    "--opsd-objective cross_entropy --opsd-top-k 3": "--opsd-top-k does not apply",
    "--opsd-weight 0 --phf-alpha 0": "--opsd-weight 0 needs --phf-alpha above 0",
    "--token-keep-fraction 0": "--token-keep-fraction 0.0: need above 0 to 1",
    "--skip-first-tokens -1": "--skip-first-tokens -1: need at least 0",
    "--eval-interval 5": "--eval-interval needs --eval-data",
    "--eval-data DATA": "--eval-data needs --hf-model",
    "--eval-top-p 0": "--eval-top-p 0.0",
    "--grader arithmetic": "--grader arithmetic: need math, exact or package.module:function",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
    "--pipeline-model-parallel-size 2": "does not divide the model's 3 layers",
    "--data DATA --hf-model MODEL": "no room for a rollout in the model's 512 positions; lower",
    REAL + "--tensor-model-parallel-size 3": "3 does not divide the model's 8 attention heads",
    REAL + "--tensor-model-parallel-size 3 --pad-attention-heads": "128 MLP channels",
    REAL + "--pipeline-model-parallel-size 3": "does not divide the model's 4 layers",
    REAL + "--num-layers-in-first-pipeline-stage 3 --pipeline-model-parallel-size 3": "divide",
    REAL + "--student-template /nowhere.txt": "/nowhere.txt: no such file",
    REAL + "--teacher-offload --lora-rank 4": "with --lora-rank the teacher shares the student's",
    "--teacher-offload --teacher live": "--teacher-offload: a live teacher has no weights",
    "--teacher-layer-map 1,2": "--teacher-layer-map needs --teacher-hf-model",
    "--teacher-hf-model ONE": "--teacher-hf-model needs --hf-model",
    REAL + "--teacher-hf-model /nowhere": "--teacher-hf-model /nowhere: no such directory",
    REAL + "--teacher-hf-model ONE --teacher ema": "--teacher ema follows the student's weights",
    REAL + "--teacher-hf-model ONE --teacher live": "--teacher live follows the student's weights",
    "--hf-model BARE " + DATA: "no tokenizer in it; copy tokenizer.json",
    TWO + "--teacher-hf-model ONE": "token 'b' has id 1 in",
    TWO + "--teacher-hf-model FEW": "token 'b' has id 1 in",
    "--hf-model ONE " + DATA + "--teacher-hf-model FEW": "embeddings for 0 to 200 - 1 only",
    TWO + "--teacher-hf-model TWO --teacher-layer-map 1,2": "2 teacher layers for the student's 6",
    TWO + "--teacher-hf-model TWO --teacher-layer-map 1,x": "not layer numbers separated by commas",
    TWO + "--teacher-hf-model TWO --teacher-layer-map 1,1,1,3,2,4": "must not decrease",
    TWO + "--teacher-hf-model SHORT": "short: a prompt of 128 tokens leaves no room",
    TWO + "--teacher-hf-model MODEL --pipeline-model-parallel-size 3": "model: --pipeline-model-",
    TWO + SEVERAL + "math=TWO": "two has that name already; give NAME=DIR once a teacher",
    TWO + SEVERAL + "code=": "--teacher-hf-model code=: no directory; give NAME=DIR",
    TWO + SEVERAL + "code=/nowhere": "--teacher-hf-model code /nowhere: no such directory",
    TWO + SEVERAL + "code=FEW": "few: not the architecture of math (num_layers 4, not 6; hidden_s",
    TWO + SEVERAL + "code=ONE": "token 'b' has id 1 in",
    TWO + SEVERAL + "code=TWO --micro-batch-size 2": "--micro-batch-size 2: a microbatch has one",
    TWO + SEVERAL + "code=TWO --teacher ema": "--teacher ema follows the student's weights",
    "--hf-model TWO --data FIELDS "
    + SHORT
    + SEVERAL
    + "code=TWO": "fields.jsonl:2: field 'teacher' is 'art', but --teacher-hf-model names math, c",
    "--hf-model EXPERTS "
    + DATA
    + "--expert-model-parallel-size 2 --teacher-hf-model a=EXPERTS --teacher-hf-model "
    + "b=EXPERTS": "several teachers with experts need --expert-model-parallel-size 1",
    REAL + "--tokenizer-type SentencePieceTokenizer": "needs --tokenizer-model, the model file",
    REAL + "--tokenizer-type SentencePieceTokenizer --tokenizer-model /x": "/x: no such file",
    REAL
    + "--tokenizer-model DATA": "no such directory (for a SentencePiece file: --tokenizer-type",
    "--tokenizer-model MODEL": "--tokenizer-model needs --hf-model",
    RECORDED + "LONG": "rollout 2 has 529 tokens for the student, whose positions end at 512; was",
    RECORDED + "MIDDLE --teacher-hf-model SHORT": "rollout 1 has 116 tokens for the teacher, whose",
    RECORDED + "DATA": "data.jsonl:1: no field 'student_prompt_ids'",
    RECORDED + "REPLAY --eval-data DATA --max-prompt-length 512": "no room for a rollout in the",
    RECORDED
    + "REPLAY --global-batch-size 2 "
    + PACKED
    + "16": "rollout 1 has 24 tokens, padded to a multiple of 2 x --context-parallel-size 2, ",
}


def filled(words: str, files: dict[str, str]) -> list[str]:
    """Names of files, alone or behind NAME=, in their places."""
    pairs = [word.rpartition("=") for word in words.split()]
    return [name + mark + files.get(last, last) for name, mark, last in pairs]


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_refused_before_launch(command: str, files: dict[str, str], capsys) -> None:
    assert preflight.main(filled(command, files)) == 2
    output = capsys.readouterr()
    assert MISTAKES[command] in output.err
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_a_good_command_line_gives_the_process_count(files: dict[str, str], capsys) -> None:
    words = [files.get(word, word) for word in REAL.split()]
    assert preflight.main([*words, "--tensor-model-parallel-size", "4"]) == 0
    assert capsys.readouterr().out == f"4 {max(1, (os.cpu_count() or 1) // 4)}\n"


@pytest.mark.parametrize(
    "more",
    [
        "",
        PACKED + "24",
        "--teacher-hf-model SHORT",
        # Of several teachers positions may differ: the fewest count.
        "--teacher-hf-model math=MODEL --teacher-hf-model code=SHORT",
    ],
)
def test_a_replay_is_as_long_as_its_rollouts(files: dict[str, str], capsys, more: str) -> None:
    """2,048 tokens of a teacher's prompt, the default, and 1,024 new ones are no limits of it."""
    words = filled(RECORDED + "REPLAY " + more, files)
    assert preflight.main([*words, "--global-batch-size", "2", "--train-iters", "1"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("tp", "pp", "gpus", "count"), [(1, 1, 0, 2), (2, 2, 0, 4), (1, 1, 8, 8), (3, 1, 8, 6)]
)
def test_process_count(tp: int, pp: int, gpus: int, count: int) -> None:
    config = Config().replaced(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    assert preflight.process_count(config, gpus) == count


@pytest.mark.parametrize(
    ("settings", "world", "message"),
    [
        ({"tensor_model_parallel_size": 2}, 3, "start a multiple of 2"),
        ({"global_batch_size": 6}, 4, "--global-batch-size 6 is not a multiple of"),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_virtual_stages_per_pipeline_rank": 2,
                "global_batch_size": 3,
            },
            2,
            "virtual stages need a multiple of --pipeline-model-parallel-size 2",
        ),
    ],
)
def test_world_sizes(settings: dict, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preflight.check_world_size(Config().replaced(**settings), world)
