"""Experiments and timings, run by scripts/reproduce.py, recipes.py and bench.py; no other package
imports them."""
