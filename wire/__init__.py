"""gRPC and Redis plumbing. Protobuf stops at `codec.py`: elsewhere there are the frozen dataclasses of `core`."""
