"""What a stopped training is continued from, beside its weights. See docs/checkpoint-format.md."""
