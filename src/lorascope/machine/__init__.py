"""What this machine has and does: memory, speed, worker processes."""
