"""Measurements beside other implementations, on the machine at hand: what scripts/benchmark.py runs."""
