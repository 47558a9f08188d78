"""Measuring systems: grading, intervals, pictures."""
