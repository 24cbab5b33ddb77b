"""The emoji data set of the example: its sources, its names, its builder and its tokenizer."""
