"""Faults planted on the pocket base: what the diagnosis calls them, and the thresholds learnt from them."""
