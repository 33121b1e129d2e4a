"""Fitting what drafters and rules of text learn: heads, pseudo tokens, small models, the judge."""
