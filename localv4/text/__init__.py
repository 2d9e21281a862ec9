"""Strings and tokens: tokenizer, prompt renderer, completion parser. Knows no tensors."""
