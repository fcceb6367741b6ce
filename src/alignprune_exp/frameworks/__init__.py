"""Dynamic pruning in the loops of others. Each module needs the framework it is named after, an optional extra."""
