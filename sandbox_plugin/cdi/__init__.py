"""CDI specs: ours, rendered, written and kept; and a watch over foreign ones."""
