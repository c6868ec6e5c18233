"""Bytes of files turned into facts, and facts into bytes: safetensors headers, weight indexes, torch `.bin` files.

Nothing here knows of adapters, names of modules or plans, and nothing holds state: each function reads its arguments,
or one file, and returns frozen values. Whatever breaks a rule of its format is refused here, with the file and the
tensor named, so that the rooms behind this one may trust every offset they are handed.
"""
