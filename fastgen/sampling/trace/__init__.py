"""What the model computes: one image run under a recorder, as a graph of values."""
