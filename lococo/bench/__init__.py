"""``lococo bench``: speed and memory, method against method and against what the device could do."""
