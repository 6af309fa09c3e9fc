"""The training step beside its peers."""
