"""The evidence: which runs are made, where, and what their records must show."""
