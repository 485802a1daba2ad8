"""Which entries are kept, which are blended, and how."""

from lococo.compression import fusion as fusion  # registers the compressor "conv"
