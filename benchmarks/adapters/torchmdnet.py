"""TorchMD-Net's `OptimizedDistance` with vectors, all neighbours within 6 Å, alone and with its backward."""

PACKAGES = ("torchmd-net",)


def calls(atoms):
    import torch
    from torchmdnet.models.utils import OptimizedDistance as Theirs

    from diffnl.adapters.torchmdnet import OptimizedDistance

    positions = torch.tensor(atoms.positions, dtype=torch.float32)
    box = torch.tensor(atoms.cell.array, dtype=torch.float32)
    batch = torch.zeros(len(positions), dtype=torch.long)

    def forward(module):
        return lambda: module(positions, batch)

    def train(module):
        def step():
            at = positions.clone().requires_grad_()
            _, weight, vec = module(at, batch)
            torch.autograd.grad(weight.sum() + vec[:, 0].sum(), at)

        return step

    def modules(strategy):
        options = {"cutoff_upper": 6.0, "max_num_pairs": -128, "return_vecs": True, "box": box}
        return OptimizedDistance(**options), Theirs(**options, strategy=strategy)

    return {
        "TorchMD-Net, brute": tuple(map(forward, modules("brute"))),
        "TorchMD-Net, cell": tuple(map(forward, modules("cell"))),
        "TorchMD-Net, cell, with gradients": tuple(map(train, modules("cell"))),
    }
