"""Training: configurations, data sets, the two kinds of run (first stage, latent diffusion) and their loop."""
