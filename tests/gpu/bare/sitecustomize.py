"""An interpreter without the packages that a visit to a GPU has to do without: this folder goes on PYTHONPATH.

A package is hidden as one that is not installed is: nothing finds it, and nothing else can tell.
"""

from importlib.machinery import PathFinder

HIDDEN = {
    *("datasets", "gguf", "lm_eval", "rouge_score", "zstandard", "flash_attn"),  # not there
    *("matplotlib", "hypothesis", "pytest_timeout", "xdist", "tensorboard"),  # not to be counted on
}

_find = PathFinder.find_spec


@classmethod
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in HIDDEN else _find(name, path, target)


PathFinder.find_spec = find_spec
