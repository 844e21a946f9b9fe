"""What does the work, one folder a stage, in the order the data flows: download, align, shard, train, evaluate."""
