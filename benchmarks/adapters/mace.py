"""MACE's neighbour list, and the edge vectors of its models with their backward."""

PACKAGES = ("mace-torch",)


def calls(atoms):
    import torch
    from mace.data import AtomicData, config_from_atoms, neighborhood
    from mace.modules import utils
    from mace.tools import AtomicNumberTable, torch_geometric

    from diffnl.adapters import mace

    table = AtomicNumberTable(sorted(set(map(int, atoms.numbers))))
    data = AtomicData.from_config(config_from_atoms(atoms), z_table=table, cutoff=5.0)
    graph = next(iter(torch_geometric.dataloader.DataLoader([data], batch_size=1))).to_dict()
    weights = torch.rand(graph["shifts"].shape)

    def listed(get_neighborhood):
        pbc, cell = (True, True, True), atoms.cell.array
        return lambda: get_neighborhood(atoms.positions, 5.0, pbc, cell)

    def differentiated(prepare_graph):
        def call():
            context = prepare_graph(dict(graph), compute_stress=True)
            energy = (weights * context.vectors).sum() + context.lengths.sum()
            return torch.autograd.grad(energy, (context.positions, context.displacement))

        return call

    return {
        "MACE, get_neighborhood": (listed(mace.get_neighborhood), listed(neighborhood.get_neighborhood)),
        "MACE, edge vectors and their backward": (
            differentiated(mace.prepare_graph),
            differentiated(utils.prepare_graph),
        ),
    }
