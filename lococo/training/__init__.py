"""Calibration of compression heads."""

import importlib.util

if not importlib.util.find_spec("accelerate"):
    raise ImportError("training needs the package accelerate: pip install lococo[train]")
