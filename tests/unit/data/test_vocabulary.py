"""Half, missing and foreign tokenizers, refused by their files or as soon as they are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_phf.cli import convert_checkpoint
from megatron_phf.cli.check_export import tokenizer_difference
from megatron_phf.cli.preflight import _check_tokenizer
from megatron_phf.config.settings import Config
from megatron_phf.data.tokenizer import load_tokenizer
from megatron_phf.data.vocabulary import has_tokenizer
from megatron_phf.demo.task import make_hf_directory
from megatron_phf.teacher.architecture import check_tokenizers
from tests.models import make_sentencepiece

EMPTY = {"added_tokens": [{"content": "<a>", "id": 0}], "model": {"vocab": {}}}
MERGES = "#version: 0.2\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "hf"
    make_hf_directory(str(path), seed=1)
    return path


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def vocabulary(model: Path) -> dict[str, int]:
    return json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]


def set_class(model: Path, name: str) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": name}))


def slow_form(model: Path) -> None:
    """The same tokens as ``vocab.json`` and ``merges.txt``, as older models have them."""
    vocab = vocabulary(model)
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text(json.dumps(vocab))
    (model / "merges.txt").write_text(MERGES)
    set_class(model, "Qwen2Tokenizer")


def only_vocab(model: Path) -> None:
    slow_form(model)
    (model / "merges.txt").unlink()


def only_merges(model: Path) -> None:
    slow_form(model)
    (model / "vocab.json").unlink()


HALVES = {
    "tokenizer_config.json without a vocabulary": lambda d: (d / "tokenizer.json").unlink(),
    "vocab.json without merges.txt": only_vocab,
    "merges.txt without a vocabulary": only_merges,
    "its vocabulary is empty": lambda d: (d / "tokenizer.json").write_text(json.dumps(EMPTY)),
    "no readable vocabulary": lambda d: (d / "tokenizer.json").write_text(
        "version https://git-lfs"
    ),
}


@pytest.mark.parametrize("what", HALVES)
def test_half_a_tokenizer_is_refused_everywhere(model: Path, tmp_path: Path, what: str) -> None:
    HALVES[what](model)
    data = {"hf_model": str(model), "data": "d.jsonl"}
    words = ["hf-to-megatron", str(model), str(tmp_path / "out")]
    arguments = convert_checkpoint.build_parser().parse_args(words)
    for refuses in (
        lambda: _check_tokenizer(Config().replaced(**data)),
        lambda: _check_tokenizer(Config().replaced(hf_model="m", tokenizer_model=str(model))),
        # A replay needs none, but its export would have half of one.
        lambda: _check_tokenizer(Config().replaced(**data, rollout_engine="replay")),
        lambda: convert_checkpoint.plan_job(arguments),
    ):
        with pytest.raises(ValueError, match=rf"model.*: .*{what}.*copy"):
            refuses()


def test_no_tokenizer_at_all(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    config = Config().replaced(hf_model=str(model), data="d.jsonl")
    with pytest.raises(ValueError, match=r"--hf-model .*model: no tokenizer in it; copy tokenizer"):
        _check_tokenizer(config)
    replay = config.replaced(rollout_engine="replay")
    _check_tokenizer(replay)
    with pytest.raises(ValueError, match="no tokenizer in it"):
        _check_tokenizer(replay.replaced(eval_data="e.jsonl"))
    arguments = ["hf-to-megatron", str(model), str(tmp_path / "out")]
    convert_checkpoint.plan_job(convert_checkpoint.build_parser().parse_args(arguments))
    assert "has no tokenizer, and the target will have none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "file"), [("Qwen2Tokenizer", "qwen.tiktoken"), ("LlamaTokenizer", "vocab.txt")]
)
def test_a_vocabulary_that_the_class_does_not_read(model: Path, name: str, file: str) -> None:
    """transformers loads such a directory without a word: special tokens, and nothing else."""
    (model / "tokenizer.json").unlink()
    (model / file).write_text("YQ== 0\n")
    set_class(model, name)
    assert has_tokenizer(str(model), "--hf-model", True)
    with pytest.raises(ValueError, match=rf"its tokenizer does not load.*{name} finds special"):
        load_tokenizer(Config().replaced(hf_model=str(model)))


def test_an_export_with_half_of_the_tokenizer_differs(whole: Path, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    set_class(model, "Qwen2Tokenizer")
    assert "does not load" in (tokenizer_difference(str(whole), str(model)) or "")


def test_a_tokenizer_that_is_code_reads_what_it_likes(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Own"]}}')
    assert has_tokenizer(str(model), "--hf-model", True)


def test_a_teacher_with_the_same_tokens_in_another_form(whole: Path, model: Path) -> None:
    slow_form(model)
    content = json.loads((whole / "tokenizer.json").read_text())
    decoder = {str(token["id"]): token for token in content["added_tokens"]}
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({"added_tokens_decoder": decoder}))
    check_tokenizers(str(whole), str(model), 32, True)
    check_tokenizers(str(model), str(whole), 32, True)
    with pytest.raises(ValueError, match=r"gives token ids up to 31, but .* 0 to 30 - 1"):
        check_tokenizers(str(model), str(whole), 30, True)
    vocab = {**vocabulary(whole), "7": 8, "8": vocabulary(whole)["7"]}
    (model / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match=r"token '.' has id .* in .*vocab.json and .*tokenizer.js"):
        check_tokenizers(str(whole), str(model), 32, True)
    (model / "vocab.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer to compare"):
        check_tokenizers(str(whole), str(model), 32, True)


def test_sentencepiece_teachers(tmp_path: Path) -> None:
    paths = [tmp_path / name / "tokenizer.model" for name in ("a", "b", "c", "d")]
    for path, size in zip(paths, (300, 300, 310, 300), strict=True):
        path.parent.mkdir()
        make_sentencepiece(str(path), size)
    library = tmp_path / "d" / "tokenizer.model"
    pieces = {"model": {"vocab": [[piece, 0.0] for piece in _pieces(library)]}}
    library.unlink()
    (tmp_path / "d" / "tokenizer.json").write_text(json.dumps(pieces))
    a, b, c, d = (str(path.parent) for path in paths)
    check_tokenizers(a, b, 300, True)
    check_tokenizers(a, d, 300, True)
    with pytest.raises(ValueError, match=r"the teacher must have the student's tokenizer"):
        check_tokenizers(a, c, 310, True)


def _pieces(path: Path) -> list[str]:
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_file=str(path))
    return [library.id_to_piece(i) for i in range(library.get_piece_size())]
