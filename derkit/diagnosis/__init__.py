"""Evaluation, overfitting, energies of attacks."""
