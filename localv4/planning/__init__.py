"""What a model costs, what this machine can do, and what follows from both before it is loaded."""
