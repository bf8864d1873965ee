"""What leaves the process besides gRPC."""
