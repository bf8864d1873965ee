"""What the registry and the parts know of themselves, shown to whoever asks."""
