"""Statistics and gates: from counted outcomes to one of four verdicts."""
