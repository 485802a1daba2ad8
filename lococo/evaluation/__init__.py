"""Measuring what a compression costs and gains."""
