"""The library call inside your own training loop: how far do reconstructed networks behave from their originals?

Run from a checkout or an installation: python examples/library_call.py
"""

import torch

import wslfast

arch = wslfast.Architecture.cnn3(channels_in=3, activation="relu")  # or Architecture.from_module(your_module, input_shape=(3, 32, 32))
originals = arch.initial_weights(["kaiming_uniform"] * 64, seeds=range(64))  # [64, 10853]; a zoo gives you trained ones
reconstructed = (originals + 0.02 * torch.randn_like(originals)).requires_grad_()  # your decoder's output: weights or tokens
queries = torch.rand(128, 3, 32, 32)  # images shared by all models

loss = wslfast.batched_behavioral_loss(reconstructed, originals, queries, arch)  # 1/(2kn) sum ||f_rec(x) - f_orig(x)||^2
loss.backward()  # into the reconstructed weights, and through them into your decoder

print(f"behavioral loss of 64 networks on 128 queries: {loss.item():.4f}, gradient {tuple(reconstructed.grad.shape)}")
