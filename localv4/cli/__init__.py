"""The command line: parse arguments, print results, and nothing else."""
