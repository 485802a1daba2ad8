"""Speed and memory beside what a device allows, in grids of methods, lengths and batches that go on after a kill.

``python -m experiments.benchmarks prefill | decode | train | extend | score``, of a model or of random weights in a
known shape. ``lococo bench`` tells a user the same of their own model in short.
"""
