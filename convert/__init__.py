"""One BatchNorm to one replacement: targets, group choice, carry-over and recipes, in NumPy only."""
