"""The frozen model: its family, layers, weights, hub, VAE and attention."""
