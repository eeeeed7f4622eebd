"""Published CIFAR-10 generation figures, each with where it was read. To stand beside our tables, never inside them.

Protocols differ (reference set, number of images, selection of samples, seeds of the chains): no row is comparable with
another, nor with ours. The tables of arXiv 2505.22486 itself could not be obtained; its abstract says "competitive".
"""

from __future__ import annotations

import pandas as pd

NAN = float("nan")
EBJDAT, DAT = "table of EB-JDAT (arXiv 2505.19459)", "table of DAT (arXiv 2510.13872)"
ROWS = [  # model, IS, FID, source
    ("JEM", 8.76, 38.4, "DDPM paper, table 1, as transcribed in public repositories"),
    ("JEM++", 8.29, 37.12, EBJDAT),
    ("SADA-JEM, its own evaluation", 8.77, 9.41, DAT + "; IS on the top 10 % by confidence, FID on the top 90 %"),
    ("SADA-JEM, re-evaluated", 8.07, 17.38, EBJDAT),
    ("robust classifier, Santurkar et al. 2019", 7.50, NAN, "abstract of JEAT (arXiv 2108.09093)"),
    ("JEAT", 8.80, 38.24, "IS: its abstract (arXiv 2108.09093); FID: " + EBJDAT),
    ("ECCV'24, listed as WEAT", 8.97, 30.74, EBJDAT + "; another note of that paper lists 3.50 / 177.9"),
    ("L2 adversarial training, real photos as seeds", 9.58, 28.41, DAT),
    ("RATIO, real photos as seeds", 9.61, 21.96, DAT),
    ("DAT, real photos as seeds", 9.86, 7.57, DAT),
    ("StyleGAN2-ADA, conditional", 10.06, 2.67, "DDPM paper, table 1, as transcribed in public repositories"),
]


def published_generation() -> pd.DataFrame:
    """The rows as a table: IS and FID as published, NaN where not given, and the source."""
    return pd.DataFrame(ROWS, columns=["model", "IS", "FID", "source"]).set_index("model")
