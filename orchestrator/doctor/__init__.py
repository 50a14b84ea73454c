"""`orchestrator doctor`: what the ranks are, how fast they talk, and what is not right with it."""
