"""The Flax modules of the model. Attribute paths are the tensor names of the release, experts stacked."""
