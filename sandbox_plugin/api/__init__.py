"""The kubelet's gRPC APIs. Generated from protos/ by scripts/generate-api.py: never edited."""
