"""Both kinds of tokenizer through the one interface, and what their mistakes say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken

from megatron_phf.config.settings import Config
from megatron_phf.data.stop_tokens import check_token_ids, stop_token_ids
from megatron_phf.data.tokenizer import HFTokenizer, Tokenizer, load_tokenizer
from megatron_phf.demo.task import make_tokenizer
from tests.models import make_sentencepiece

TEXT = "The answer is 12, and né 7."


def config(path: str, kind: str = "SentencePieceTokenizer") -> Config:
    return Config().replaced(hf_model="m", tokenizer_type=kind, tokenizer_model=path)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_sentencepiece(str(tmp_path_factory.mktemp("spm") / "tokenizer.model"), 300)


@pytest.fixture(scope="module")
def reference(model_file: str) -> sentencepiece.SentencePieceProcessor:
    """The library itself."""
    return sentencepiece.SentencePieceProcessor(model_file=model_file)


@pytest.fixture(scope="module")
def tokenizer(model_file: str) -> Tokenizer:
    return load_tokenizer(config(model_file))


def test_sentencepiece_text_and_ids(tokenizer: Tokenizer, reference) -> None:
    ids = tokenizer.encode(TEXT)
    assert ids == reference.encode(TEXT)
    assert len(ids) < len(TEXT)  # pieces, not characters
    assert tokenizer.decode(ids) == reference.decode(ids) == TEXT
    assert (tokenizer.largest_id, tokenizer.eos_id) == (299, reference.eos_id())


def test_sentencepiece_prompt_is_plain_text_after_bos(tokenizer: Tokenizer, reference) -> None:
    assert not tokenizer.has_chat_template
    expected = [reference.bos_id(), *reference.encode(TEXT + "\n")]
    assert tokenizer.prompt(TEXT, thinking=True) == tokenizer.prompt(TEXT, False) == expected


def test_sentencepiece_special_tokens(tokenizer: Tokenizer, reference) -> None:
    """Control tokens, and rows of the embedding that the file does not name (padding)."""
    ids = [reference.bos_id(), *reference.encode(TEXT), reference.eos_id(), 305]
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<s>{TEXT}</s><305>"


def test_sentencepiece_without_bos_and_eos(tmp_path: Path) -> None:
    path = make_sentencepiece(str(tmp_path / "t.model"), 300, bos_id=-1, eos_id=-1)
    bare = load_tokenizer(config(path))
    assert bare.prompt(TEXT, False) == bare.encode(TEXT + "\n")
    assert bare.eos_id is None
    with pytest.raises(ValueError, match=r"tokenizer-model .*: no end-of-sequence token"):
        stop_token_ids(bare, str(tmp_path))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert stop_token_ids(bare, str(tmp_path)) == (7,)


@pytest.mark.parametrize("kind", ["HFTokenizer", "SentencePieceTokenizer"])
def test_damaged_tokenizers(tmp_path: Path, kind: str, model_file: str) -> None:
    path = tmp_path / "t.model"
    path.write_bytes(Path(model_file).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"--tokenizer-model .*t.model: its tokenizer does not"):
        load_tokenizer(config(str(path), kind))


def test_hf_without_chat_template_gets_plain_text() -> None:
    library = make_tokenizer()
    library.chat_template = None
    plain = HFTokenizer(library)
    assert not plain.has_chat_template
    assert plain.prompt("1+1", thinking=True) == library("1+1\n")["input_ids"]
    assert plain.decode(plain.encode("1+1=2")) == "1+1=2"


def test_tokens_beyond_the_embedding() -> None:
    library = make_tokenizer()
    check_token_ids(HFTokenizer(library), [1], 32)
    with pytest.raises(ValueError, match=r"--hf-model: a tokenizer with token ids up to 31, .*31 "):
        check_token_ids(HFTokenizer(library), [1], 31)
    library.add_tokens([AddedToken("<new>", special=True)])  # not in the base vocabulary's size
    with pytest.raises(ValueError, match=r"ids up to 32, but the model's embedding has 32 rows"):
        check_token_ids(HFTokenizer(library), [1], 32)
    with pytest.raises(ValueError, match=r"generation_config.json with token ids up to 40"):
        check_token_ids(HFTokenizer(make_tokenizer()), [1, 40], 32)


@pytest.mark.parametrize(
    ("content", "found"),
    [({}, (1,)), ({"eos_token_id": 5}, (1, 5)), ({"eos_token_id": [7, 1]}, (1, 7))],
)
def test_stop_tokens(tmp_path: Path, content: dict, found: tuple[int, ...]) -> None:
    hf = HFTokenizer(make_tokenizer())
    assert stop_token_ids(hf, str(tmp_path)) == (1,)  # no generation_config.json
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert stop_token_ids(hf, str(tmp_path)) == found


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"eos_token_id": "</s>"}', '{"eos_token_id": [-1]}']
)
def test_damaged_stop_tokens(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config.json: "):
        stop_token_ids(HFTokenizer(make_tokenizer()), str(tmp_path))
