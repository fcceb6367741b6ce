"""What a sample, its loss and a metric are: one file a task."""
