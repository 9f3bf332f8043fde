"""Virtual machine monitors behind one interface; see base."""
