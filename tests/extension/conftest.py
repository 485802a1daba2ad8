import pytest
from extended import id_tokenizer, write_documents
from tiny import tiny_ids, tiny_llama


@pytest.fixture(scope="module")
def tokenizer():
    return id_tokenizer()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    return write_documents(path, tiny_ids(12, 70, seed=2).tolist())


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """Folder of a tiny model with a window of 16 tokens."""
    tiny_llama(max_position_embeddings=16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
