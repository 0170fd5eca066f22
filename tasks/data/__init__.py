"""Data: where images come from, how they are split, and the Parquet shards they become."""
