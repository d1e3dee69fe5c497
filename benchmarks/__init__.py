"""Measurements for the documentation."""
