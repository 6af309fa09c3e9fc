"""Pictures and captions, from any source to latents."""
