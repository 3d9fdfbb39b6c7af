"""Families whose parts have other than the usual names (`llmslim.anatomy.family`): one file of data each."""
