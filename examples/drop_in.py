"""A script written for the published code (arXiv 2503.17138), with its imports changed and nothing else.

Run from a checkout or an installation: python examples/drop_in.py
"""

import torch

import wslfast

# from shrp.datasets.dataset_auxiliaries import tokenize_checkpoint, tokens_to_checkpoint
# from shrp.git_re_basin.git_re_basin import zoo_cnn_large_permutation_spec, apply_permutation
# from shrp.models.def_AE_module import AEModule
from wslfast.sane import AEModule, apply_permutation, tokenize_checkpoint, tokens_to_checkpoint, zoo_cnn_large_permutation_spec

# The other route leaves even the imports as they are:
#
#     with wslfast.sane.patched():
#         tuner.fit()                 # or whatever the script does
#         print(wslfast.sane.replaced())


torch.manual_seed(0)
arch = wslfast.Architecture.cnn3()  # stands for the checkpoints of your zoo; the names are the published ones
rows = arch.initial_weights(["kaiming_uniform"] * 8, seeds=range(8))
checkpoints = [{p.name: row[p.offset : p.stop].view(p.shape) for p in arch.parameters} for row in rows]
spec = zoo_cnn_large_permutation_spec()


def view(checkpoint):
    """A randomly permuted model: other weights, the same function."""
    sizes = {p: checkpoint[axes[0][0]].shape[axes[0][1]] for p, axes in spec.perm_to_axes.items()}
    return apply_permutation(spec, {p: torch.randperm(n) for p, n in sizes.items()}, checkpoint)


def batch(checkpoints):
    """Tokens, masks and positions of a batch, ``[8, 93, 289]``."""
    tokens, masks, positions = zip(*(tokenize_checkpoint(c, tokensize=0) for c in checkpoints))
    return torch.stack(tokens), torch.stack(masks), torch.stack(positions).int()


config = {
    "seed": 2020, "device": "cpu", "trainset::batchsize": 8, "ae:i_dim": 289, "ae:d_model": 64, "ae:nhead": 4, "ae:num_layers": 2,
    "ae:lat_dim": 16, "ae:max_positions": [100, 10, 40], "training::windowsize": 93, "training::gamma": 0.05, "training::beta": 0.1,
    "training::queryset_distillation": "random", "training::n_queries_distillation": 64, "optim::lr": 1e-3,
}  # fmt: skip
params = {"model::type": "CNN3", "model::channels_in": 3, "model::nlin": "relu", "model::dropout": 0}
module = AEModule(config, reference_checkpoint=checkpoints[0], reference_params=params)  # semantics="corrected" repairs the defects

module.model.train()
for step in range(6):
    parts = module.train_step(*batch([view(c) for c in checkpoints]), *batch([view(c) for c in checkpoints]))
    shown = {name.removeprefix("loss/"): f"{value.item():.3f}" for name, value in parts.items() if name.startswith("loss/loss")}
    print(f"step {step}:", shown)

module.model.eval()
tokens, _, positions = batch(checkpoints)
with torch.no_grad():
    _, reconstructed, _ = module(tokens, positions)
weights = tokens_to_checkpoint(reconstructed[0], positions[0], checkpoints[0])
print("reconstructed:", {name: tuple(value.shape) for name, value in list(weights.items())[:2]}, "...")
