"""One BatchNorm to one replacement: targets, groups, carry-over, equalizing and recipes, in NumPy and SciPy only."""
