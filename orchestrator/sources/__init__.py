"""What data can come from, each read by index or by batch; `data.shard` puts them to use."""
