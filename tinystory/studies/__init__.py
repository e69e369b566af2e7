"""What is run over many runs, by scripts/: reproduce and bench. No other room imports it."""
