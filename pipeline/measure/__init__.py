"""Figures of answers, coverage and whole phases."""
