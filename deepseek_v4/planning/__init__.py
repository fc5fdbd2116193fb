"""What a model costs before anything runs: operations, bytes, time limits, and the meshes that fit."""
