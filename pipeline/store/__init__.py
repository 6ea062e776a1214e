"""Shards on disk and the content-addressed cache of scores."""
