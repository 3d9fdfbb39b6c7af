"""The verbs of the command line: each file makes a parser and runs what was typed."""
