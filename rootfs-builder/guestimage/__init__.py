"""The parts of the guest image builder; `build.py` puts them together. Standard library only."""
