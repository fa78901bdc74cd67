"""The normalization layers, importable without patching anything."""
