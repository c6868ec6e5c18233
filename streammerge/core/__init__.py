"""The nouns and ground rules every other room stands on; imports nothing of the package."""
