"""Tests of the backend run where vLLM is (make test-vllm), in processes of their own; those of pages everywhere."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("vllm") else ["test_backend.py", "test_server.py"]
