"""Training: configurations, data sets, the kinds of task (first stage, latent diffusion, CLIP), the loop."""
