"""Tests of a patched model in other libraries run where these libraries are (make test-integrations)."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("trl") else ["test_*.py"]
