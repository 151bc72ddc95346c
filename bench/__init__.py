"""Benchmarks: ``python -m bench`` runs all, and records figures, tables and plots in ``bench/results/``."""
