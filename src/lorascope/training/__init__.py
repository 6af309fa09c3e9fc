"""From encoded pictures to trained adapters."""
