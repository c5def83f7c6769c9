"""A hypernetwork's outputs: all the networks that it writes run at once, with the gradient back into it.

The hypernetwork and its target are hypnettorch's (pip install hypnettorch): one network a task.
Run: python examples/neighbours/hypernetwork.py
"""

import torch
from side_by_side import turns
from torch import Tensor, nn

import wslfast


def pair(tasks: int) -> tuple[nn.Module, nn.Module]:
    """hypnettorch's target network (1 -> 24 -> 24 -> 1) and the hypernetwork that writes its weights for each task."""
    from hypnettorch.hnets import HMLP
    from hypnettorch.mnets import MLP

    target = MLP(n_in=1, n_out=1, hidden_layers=[24, 24], no_weights=True, verbose=False)
    return target, HMLP(target.hyper_shapes_learned, cond_in_size=8, layers=(50,), num_cond_embs=tasks, verbose=False)


ARCH = wslfast.Architecture.from_module(
    nn.Sequential(nn.Linear(1, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1)), input_shape=(1,)
)


def flat(written: list[list[Tensor]]) -> Tensor:
    """Weights ``[tasks, P]``: what the hypernetwork wrote, in the order in which it writes, which is ours."""
    return torch.stack([torch.cat([w.flatten() for w in weights]) for weights in written])


def task_losses(written: list[list[Tensor]], x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error ``[tasks]``; inputs ``[n, 1]``, targets ``[tasks, n, 1]``."""
    return (wslfast.batched_forward(flat(written), x, ARCH) - y).square().mean((1, 2))


def task_losses_one_by_one(written: list[list[Tensor]], x: Tensor, y: Tensor, target: nn.Module) -> Tensor:
    """The same as hypnettorch's own scripts do it: the target network called with each task's weights."""
    return torch.stack([(target.forward(x, weights=weights) - y[t]).square().mean() for t, weights in enumerate(written)])


if __name__ == "__main__":
    torch.manual_seed(0)
    tasks = 64
    target, hyper = pair(tasks)
    x = torch.linspace(-1, 1, 100)[:, None]
    y = torch.sin(3 * x + torch.linspace(0, 6, tasks)[:, None, None])  # a shifted sine for each task
    optimizer = torch.optim.Adam(hyper.parameters(), lr=3e-3)
    for step in range(201):
        optimizer.zero_grad()
        loss = task_losses(hyper.forward(cond_id=list(range(tasks))), x, y).mean()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: mean squared error {loss.item():.4f}")
    written = [[w.detach().requires_grad_() for w in ws] for ws in hyper.forward(cond_id=list(range(tasks)))]
    ours = lambda: task_losses(written, x, y).sum().backward()  # noqa: E731
    theirs = lambda: task_losses_one_by_one(written, x, y, target).sum().backward()  # noqa: E731
    print("losses and gradients of 64 tasks:", turns(ours, theirs))
