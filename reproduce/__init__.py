"""The experiments that the norms' first implementations published, each rerun by one command."""
