"""What is run over many runs, by scripts/: reproduce, scale, bench and bench_teacher. No other room imports it."""
