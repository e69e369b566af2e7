"""The paper's experiment (scripts/reproduce.py): its runs, and the reward of its random control."""
