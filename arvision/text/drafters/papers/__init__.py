"""Drafters of single papers, one file each, on the classes of the drafters in front."""
