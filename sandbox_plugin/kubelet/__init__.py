"""The kubelet's protocol: the servicer, and the lifecycle of each resource's endpoint."""
