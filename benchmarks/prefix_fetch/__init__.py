"""A prompt's first pages from a peer against computing them again: from which length on the fetch is faster."""
