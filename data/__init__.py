"""Data: the shapes world, its own VAE and T5, and captioned images of any kind as batches for training."""
