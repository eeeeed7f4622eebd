"""Adversarial training: DER, the methods beside it, the loop, and what is measured meanwhile."""
