"""Rows in, token ids with a mask out: sources, formats, templates, masking, encoding, batching, collation."""
