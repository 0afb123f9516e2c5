"""fairchem's graph functions on the whole box, all neighbours within 6 Å."""

PACKAGES = ("fairchem-core",)


def calls(atoms):
    from fairchem.core.datasets.atomic_data import AtomicData
    from fairchem.core.graph import radius_graph_pbc as theirs

    from diffnl.adapters import fairchem as ours

    data = AtomicData.from_ase(atoms, task_name="omat")
    # The first version holds N x N x images distances at once, hence only some of the atoms.
    part = AtomicData.from_ase(atoms[: min(len(atoms), 200)], task_name="omat")
    return {
        "fairchem, radius_graph_pbc (200 atoms)": (
            lambda: ours.radius_graph_pbc(part, 6.0, 300),
            lambda: theirs.radius_graph_pbc(part, 6.0, 300),
        ),
        "fairchem, radius_graph_pbc_v2": (
            lambda: ours.radius_graph_pbc_v2(data, 6.0, 300),
            lambda: theirs.radius_graph_pbc_v2(data, 6.0, 300),
        ),
        "fairchem, radius_graph_pbc_v2, 20 nearest": (
            lambda: ours.radius_graph_pbc_v2(data, 6.0, 20),
            lambda: theirs.radius_graph_pbc_v2(data, 6.0, 20),
        ),
    }
