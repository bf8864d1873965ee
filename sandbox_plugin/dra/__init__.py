"""Dynamic Resource Allocation: the devices of the inventory as ResourceSlices, and the claims that pods have on them.

Nothing in here is imported without `--dra`, but the client of the API server: `--node-events` needs that, too.
"""
