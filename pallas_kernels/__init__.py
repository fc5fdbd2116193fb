"""The operations of DeepSeek-V4 that have kernels: one folder each, a public function and its readable XLA twin."""

# Twins use the model's number formats and the model uses the operations: the model's package must begin to load first.
import deepseek_v4  # noqa: F401
