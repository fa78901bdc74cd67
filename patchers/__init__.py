"""A whole model: find its BatchNorms, plan, replace, undo, and keep the result as a bundle."""
