"""The arithmetic: recipes and bytes in, bytes out. Knows tensors and tiles, never a name's meaning or a file."""
