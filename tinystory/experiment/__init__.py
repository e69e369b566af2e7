"""The paper's experiment (scripts/reproduce.py): its parts, its control's reward, its report."""
