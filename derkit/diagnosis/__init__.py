"""Evaluation, overfitting, energies of attacks, gradient masking."""
