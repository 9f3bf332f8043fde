"""Generated protobuf classes of the interfaces that containerd publishes; protos/generate.py writes them."""
