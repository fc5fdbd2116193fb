"""The operations of DeepSeek-V4 that have kernels: one folder each, a public function and its readable XLA twin."""
