"""The training job on a SentencePiece model: prompts, rollouts, stop token, decoded example."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece

from megatron_phf.data.prompts import STUDENT_TEMPLATE
from tests.end_to_end.test_bad_input import fails_once
from tests.launch import torchrun
from tests.models import make_model, make_sentencepiece

SCRIPT = "examples/pretrain_phf.sh"
PIECES = 300
PROBLEMS = [{"problem": f"{i} + {i} = ?", "solution": f"We get {2 * i}."} for i in range(6)]
FLAGS = ["--train-iters", "2", "--global-batch-size", "8", "--micro-batch-size", "4"]
FLAGS += ["--max-new-tokens", "48", "--rollout-top-k", "0", "--rollout-top-p", "1"]
FLAGS += ["--rollout-temperature", "2", "--max-prompt-length", "200", "--no-tensorboard"]
FLAGS += ["--max-teacher-prompt-length", "400", "--no-progress"]
FLAGS += ["--tokenizer-type", "SentencePieceTokenizer"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with 16 rows more than the tokenizer has pieces, as padded checkpoints do."""
    path = make_model(
        str(tmp_path_factory.mktemp("model") / "hf"),
        "llama",
        vocab_size=PIECES + 16,
        num_hidden_layers=2,
        initializer_range=0.05,
    )
    make_sentencepiece(path + "/tokenizer.model", PIECES)
    Path(path, "data.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROBLEMS))
    return Path(path)


def train(model: Path, out: Path, *more: str):
    files = ["--hf-model", str(model), "--tokenizer-model", str(model / "tokenizer.model")]
    files += ["--data", str(model / "data.jsonl"), "--output-dir", str(out)]
    return torchrun(2, SCRIPT, *files, *FLAGS, *more)


def test_training_on_a_sentencepiece_model(model: Path, tmp_path: Path) -> None:
    record, exported = tmp_path / "rollouts.jsonl", tmp_path / "exported"
    more = ["--record-rollouts", str(record), "--save-hf", str(exported)]
    done = train(model, tmp_path, "--tensor-model-parallel-size", "2", *more)
    assert done.returncode == 0, done.stderr[-2000:]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    rollouts = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(rollouts) == 16

    asked = {STUDENT_TEMPLATE.replace("{problem}", p["problem"]) for p in PROBLEMS}
    expected = {(reference.bos_id(), *reference.encode(text + "\n")) for text in asked}
    assert {tuple(r["student_prompt_ids"]) for r in rollouts} == expected
    for rollout in rollouts:  # <s>, and the solution among the teacher's words
        assert rollout["teacher_prompt_ids"][0] == reference.bos_id()
        assert "reference solution" in reference.decode(rollout["teacher_prompt_ids"])

    responses = [r["response_ids"] for r in rollouts]
    ended = [r for r in responses if r[-1] == reference.eos_id()]
    assert ended and len(ended) < len(responses)
    for response in responses:
        assert reference.eos_id() not in response[:-1]
        assert len(response) == 48 or response in ended

    assert "no chat template: plain text and a newline" in done.stdout
    shown = re.search("student prompt: '(.*)'", done.stdout)
    assert shown is not None and shown[1].startswith("<s>Problem: ")
    assert (exported / "tokenizer.model").read_bytes() == (model / "tokenizer.model").read_bytes()


def test_pieces_beyond_the_embedding(model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    shutil.copytree(model, small)
    make_model(str(small), "llama", vocab_size=PIECES - 1, num_hidden_layers=2)
    done = train(small, tmp_path)
    fails_once(done, f"token ids up to {PIECES - 1}, but the model's embedding has {PIECES - 1} ")
    assert "step 1" not in done.stdout
