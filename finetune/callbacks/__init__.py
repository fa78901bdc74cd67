"""Hooks in the training loops people have: one small class per ecosystem."""
