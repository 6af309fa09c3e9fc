"""Pictures from prompts, and what they are worth."""
