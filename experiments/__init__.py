"""What made a note or a result in ``docs/results``: ``python -m experiments.NAME`` in the repository's root."""
