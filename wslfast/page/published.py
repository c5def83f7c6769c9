"""What the paper reports (arXiv 2503.17138), on its zoos: SVHN, CIFAR-10 and EuroSAT, 720 test checkpoints each, one seed.

``None`` is a figure that it does not give. Losses: C contrastive, S structural, B behavioral.
"""

from __future__ import annotations

ZOOS = ("SVHN", "CIFAR-10", "EuroSAT")
Three = tuple["float | None", "float | None", "float | None"]
Rows = dict[str, Three]

AGREEMENT: Rows = {
    "C+S": (0.500, 0.319, 0.359), "B": (0.266, 0.103, 0.192), "C+B": (0.266, 0.118, 0.185), "S+B": (0.861, 0.594, 0.665),
    "C+S+B": (0.870, 0.596, 0.658),
}  # fmt: skip
# sqrt of the sum over all 93 x 289 token entries, the decoder's padding included
L2: Rows = {
    "C+S": (30.7, 31.3, 41.4), "B": (57.8, 59.5, 67.5), "C+B": (55.7, 60.7, 67.4), "S+B": (26.9, 29.6, 45.5), "C+S+B": (27.1, 30.0, 43.6),
}  # fmt: skip
PROBE_ACCURACY: Rows = {
    "untrained": (0.560, 0.768, 0.883), "C+S": (0.742, 0.890, 0.957), "B": (0.538, 0.771, 0.901), "C+B": (0.752, 0.893, 0.950),
    "S+B": (0.887, 0.939, 0.966), "C+S+B": (0.886, 0.947, 0.969),
}  # fmt: skip
PROBE_GGAP: Rows = {
    "untrained": (0.284, 0.582, 0.32), "C+S": (0.347, 0.700, 0.465), "B": (0.286, 0.576, 0.296), "C+B": (0.337, 0.710, 0.482),
    "S+B": (0.378, 0.785, 0.484), "C+S+B": (0.368, 0.785, 0.529),
}  # fmt: skip
# mean L2 of all pairs of weights; "zoo": the anchors
DIVERSITY: Rows = {
    "zoo": (23.3, 22.9, 23.0), "C+S": (13.4, 14.9, 16.8), "B": (1.6, 3.5, 6.3), "C+B": (1.7, 1.5, 3.0), "S+B": (1.6, 1.5, 2.8),
    "C+S+B": (1.5, 1.3, 2.1),
}  # fmt: skip
# best of all models: the paper's headline
BEST: dict[str, Rows] = {
    "zoo": {"zoo": (0.910, 0.701, 0.885)},
    "reconstructed": {"C+S": (0.745, 0.512, 0.686), "C+S+B": (0.904, 0.695, 0.877)},
    "generated": {"C+S": (0.613, 0.460, 0.565), "C+S+B": (0.904, 0.695, 0.875)},
    "fine-tuned": {"C+S": (0.897, 0.695, 0.866), "C+S+B": (0.909, 0.714, 0.897)},
}
