"""Calibration of compression heads."""
