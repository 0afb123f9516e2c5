"""CHGNet 0.3.0's graph and its calculator, weights and all, on 8 and 180 atoms of MgO and of SrTiO3."""

PACKAGES = ("chgnet",)


def calls(atoms):
    import contextlib
    import copy
    import io

    from ase.build import bulk
    from ase.spacegroup import crystal
    from chgnet.model import CHGNet, CHGNetCalculator
    from pymatgen.io.ase import AseAtomsAdaptor

    from diffnl.adapters.chgnet import use_diffnl

    with contextlib.redirect_stdout(io.StringIO()):
        model = CHGNet.load(use_device="cpu", verbose=False)
        own = CHGNetCalculator(model, use_device="cpu")
        ours = CHGNetCalculator(use_diffnl(copy.deepcopy(model)), use_device="cpu")
    sites = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0)]
    perovskite = crystal(["Sr", "Ti", "O"], sites, spacegroup=221, cellpar=[3.905] * 3 + [90] * 3)
    rows = {}
    for some in (bulk("MgO", "rocksalt", a=4.21, cubic=True), perovskite * (3, 3, 4)):
        some.rattle(0.05)
        structure = AseAtomsAdaptor.get_structure(some)
        rows[f"CHGNet graph, {len(some)} atoms"] = (
            lambda s=structure: ours.model.graph_converter(s),
            lambda s=structure: own.model.graph_converter(s),
        )
        rows[f"CHGNet energy, forces, stress, {len(some)}"] = (
            lambda a=some: ours.calculate(a, task="efs"),
            lambda a=some: own.calculate(a, task="efs"),
        )
    return rows
