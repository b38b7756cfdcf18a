"""A variational autoencoder on binarised 14×14 MNIST, with the bound measured."""
