"""gRPC on unix sockets: what every API that is served or called here shares."""
