"""`orchestrator launch`: a launcher with time to checkpoint and the ranks' own exit code."""
