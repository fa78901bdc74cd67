"""The subcommands of `normswap`, which parse, call and print; each imports what takes long when it is run."""
