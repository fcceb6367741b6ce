"""From files to batches: data sets, label noise, the reference split, and batches on the device."""
