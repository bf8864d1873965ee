"""Is this node ready for passthrough? Facts in, findings out; and the reading that the daemon never needs."""
