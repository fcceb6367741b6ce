"""The data sets that are known by name, one class each."""
