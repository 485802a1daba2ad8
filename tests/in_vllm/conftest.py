"""Tests of the backend run where vLLM is (make test-vllm), in processes of their own; those of pages everywhere."""

import importlib.util

import pytest

collect_ignore = [] if importlib.util.find_spec("vllm") else ["test_backend.py", "test_server.py"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of a small model."""
    from small_model import save

    return save(tmp_path_factory.mktemp("model"))
