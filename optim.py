"""The optimizers: Muon for the matrices of the blocks, AdamW for everything else. And the rate.

[NEW] What the paper used is unknown to us. Nothing here is about orders; a reader may skip it.
"""

import torch


class Muon(torch.optim.Muon):
    """Muon (Jordan 2024): momentum, then the nearest matrix with all singular values about 1.

    The step is torch's, without weight decay, but off CUDA in float32. torch's own is in bfloat16:
    on a CPU without such instructions it takes several times as long as the rest of training.
    """

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(momentum, group["momentum"])             # Nesterov's
            update = orthogonalise(update, group["ns_coefficients"], group["ns_steps"],
                                   group["eps"])
            scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
            p.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(x, coefficients, steps: int, eps: float):
    """Newton-Schulz: the singular values of a matrix x go to about 1."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    if tall:                                               # the Gram matrix of the shorter side
        x = x.T
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)       # b G + c G^2
        x = torch.addmm(x, polynomial, x, beta=a)                         # a x + (b G + c G^2) x
    return x.T if tall else x


def make_optimizers(network, lr_matrix: float, lr_other: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the network's blocks, AdamW for the rest of its parameters."""
    matrices = []
    others = []
    for name, p in network.named_parameters():
        in_a_block = ".blocks." in name and p.ndim == 2
        (matrices if in_a_block else others).append(p)
    optimizers = [torch.optim.AdamW(others, lr=lr_other, betas=(0.9, 0.98), weight_decay=0),
                  Muon(matrices, lr=lr_matrix, weight_decay=0)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_rates(optimizers, factor: float):
    """Every rate becomes `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
