"""shard: aligned faces become labelled training examples, cleaned, shuffled once, in a few large files.

what is left out   clean.py     and why; copies.py finds copies, by the hashes of hashes.py
what remains       split.py     labels; train and validation; verification pairs
the files          writer.py    one global shuffle in bounded memory
reading them       reader.py    rows of a split, from a folder or an address
the outcome        page.py      counts, and what was left out to look at; verify.py checks every row
the stage          run.py
"""
