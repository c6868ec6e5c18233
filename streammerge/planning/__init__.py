"""Facts and options in, a plan out: what every tensor of the output is made of, checked before a weight is read."""
