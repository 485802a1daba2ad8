"""Published sets of questions about long documents, and needles: what wrote ``docs/results/long``.

``python -m experiments.long --model MODEL --tasks scrolls longbench ruler --data-dir FOLDER``: the sets' own layouts
are read, the middle of long documents is cut, and a document is read once for all of its questions.
"""
