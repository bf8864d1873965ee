"""A fake node and a fake kubelet, for development, demonstration and tests. The daemon imports none of it."""
