"""A stand-in for the package llama-cpp-python: the same calls, a network of one line.

The variable FAKE_LLAMA holds a JSON object: `log` is a file that every decoded batch is written to,
`trouble` names what goes wrong.
"""

from . import llama_cpp as llama_cpp

__version__ = "0.0.1"
