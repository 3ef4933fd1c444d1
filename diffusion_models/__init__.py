"""Denoising diffusion on normal images, and the dissolving that DIA makes of it."""
