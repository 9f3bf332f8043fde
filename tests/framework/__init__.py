"""What the tests and the developer's `make up` share: a private containerd, its clients, and the proof that nothing is left."""
