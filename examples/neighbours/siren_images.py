"""A SIREN autoencoder's image loss: reconstructed implicit representations are judged by the images that they draw.

The networks are siren-pytorch's own SirenNet (pip install siren-pytorch). Run: python examples/neighbours/siren_images.py
"""

import torch
from side_by_side import turns
from torch import Tensor, nn
from torch.func import functional_call

import wslfast


def network() -> nn.Module:
    """One representation of siren-pytorch: (x, y) to a grey value."""
    from siren_pytorch import SirenNet

    return SirenNet(dim_in=2, dim_hidden=32, dim_out=1, num_layers=2)


def grid(side: int) -> Tensor:
    """Coordinates ``[side * side, 2]`` in [-1, 1]."""
    axis = torch.linspace(-1, 1, side)
    return torch.cartesian_prod(axis, axis)


def image_loss(rebuilt: Tensor, images: Tensor, where: Tensor, arch: wslfast.Architecture) -> Tensor:
    """Mean squared error of the images ``[k, side * side, 1]`` that weights ``[k, P]`` draw: twice the behavioral loss, with the images
    as targets and coordinates as queries."""
    return 2 * wslfast.batched_behavioral_loss(rebuilt, None, where, arch, targets=images)


def image_loss_one_by_one(rebuilt: dict[str, Tensor], images: Tensor, where: Tensor, net: nn.Module) -> Tensor:
    """The same with siren-pytorch's module, one representation after another; ``rebuilt`` maps names to ``[k, ...]``."""
    drawn = [functional_call(net, {n: v[j] for n, v in rebuilt.items()}, (where,)) for j in range(len(images))]
    return (torch.stack(drawn) - images).square().mean()


if __name__ == "__main__":
    from wslfast.population import unstack

    torch.manual_seed(0)
    nets, where = [network() for _ in range(64)], grid(28)
    arch = wslfast.Architecture.from_module(nets[0], input_shape=(2,))
    weights = wslfast.Population.from_state_dicts(arch, [n.state_dict() for n in nets]).weights
    images = wslfast.batched_forward(weights, where, arch)
    code = torch.randn(64, 64, requires_grad=True)  # a latent for each, and a decoder of weights from latents
    decoder = nn.Linear(64, arch.num_weights)
    optimizer = torch.optim.Adam([code, *decoder.parameters()], lr=2e-3)
    for step in range(200):
        optimizer.zero_grad()
        loss = image_loss(weights.mean(0) + decoder(code), images, where, arch)
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == 199:
            print(f"step {step}: image loss {loss.item():.4f}")
    rebuilt = decoder(code).detach().requires_grad_()
    ours = lambda: image_loss(rebuilt, images, where, arch).backward()  # noqa: E731
    theirs = lambda: image_loss_one_by_one(unstack(rebuilt, arch), images, where, nets[0]).backward()  # noqa: E731
    print("image loss and gradient of 64 representations:", turns(ours, theirs))
