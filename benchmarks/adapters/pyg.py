"""torch_cluster's `radius_graph` on the atoms of the box as a cluster, all neighbours within 6 Å."""

PACKAGES = ("torch_cluster", "torch-geometric")


def calls(atoms):
    import torch
    import torch_cluster

    from diffnl.adapters.pyg import radius_graph

    positions = torch.tensor(atoms.positions, dtype=torch.float32)
    batch = torch.arange(len(positions)) * 8 // len(positions)
    return {
        "torch_cluster, radius_graph": (
            lambda: radius_graph(positions, 6.0, max_num_neighbors=300),
            lambda: torch_cluster.radius_graph(positions, 6.0, max_num_neighbors=300),
        ),
        "torch_cluster, radius_graph, 8 in a batch": (
            lambda: radius_graph(positions, 6.0, batch, max_num_neighbors=300),
            lambda: torch_cluster.radius_graph(positions, 6.0, batch, max_num_neighbors=300),
        ),
    }
