"""How ranks talk to each other: one backend a file, one protocol for all (`base`)."""
