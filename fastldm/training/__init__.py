"""Training: configurations, data sets, the two kinds of task (first stage, latent diffusion), the loop."""
