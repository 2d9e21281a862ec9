"""The DeepSeek-V4 network: configuration, weights, decoder state and the forward pass."""
