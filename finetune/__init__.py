"""Bring the patched model back to, or past, the original: calibration, hooks and training loops."""
