"""One file per kind of task: the data it reads, its model class, batches, loss, metrics and preview."""
