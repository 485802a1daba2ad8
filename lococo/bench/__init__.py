"""``lococo bench``: speed and memory of a model, method beside method."""
