"""Training and fine-tuning: losses, optimizer, adapters, the step and the loop (paper 2.4, 4.2, 5.2.1)."""
