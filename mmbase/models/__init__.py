"""Batches to features: towers, the zoo of OpenCLIP's names, checkpoints in and out."""
