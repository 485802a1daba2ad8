"""What the number of slots, the kernel and the kinds of slots do to heads calibrated alike."""
