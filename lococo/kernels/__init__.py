"""Attention over slots and segment, and what it computes on."""
