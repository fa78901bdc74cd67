"""Other systems: their checkpoints, and what they have to know of these layers."""
