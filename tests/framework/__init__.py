"""What the tests and `make up` share: a private containerd, its clients, and the proof that nothing is left."""
