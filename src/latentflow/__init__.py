"""latentflow: flow matching in the latent space of a pretrained autoencoder."""

__version__ = "0.1.0"
