"""What the number of slots, the kernel and the kinds of slots do to heads calibrated alike.

``python -m experiments.ablation --model MODEL --dataset train.jsonl --data heldout.jsonl --kernel-size 3 7``: one
thing is varied at a time around ``--centre``, as in the paper's ablations.
"""
