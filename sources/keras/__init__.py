"""What Keras keeps on disk."""
