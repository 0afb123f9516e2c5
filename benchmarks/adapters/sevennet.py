"""SevenNet-0's graph and its calculator, weights and all, on 8 and 216 atoms of MgO."""

PACKAGES = ("sevenn", "matscipy")


def calls(atoms):
    from ase.build import bulk
    from sevenn.calculator import SevenNetCalculator
    from sevenn.train import dataload

    from diffnl.adapters.sevennet import graph_build

    calculator = SevenNetCalculator("7net-0", device="cpu")
    own = dataload._graph_build_f

    def with_list(build, work):
        def call():
            dataload._graph_build_f = build
            try:
                work()
            finally:
                dataload._graph_build_f = own

        return call

    cell = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    rows = {}
    for some in (cell, cell * 3):
        some.rattle(0.05)
        works = {
            f"SevenNet graph, {len(some)} atoms": lambda a=some: dataload.unlabeled_atoms_to_graph(a, 5.0),
            f"SevenNet energy, forces, stress, {len(some)}": lambda a=some: calculator.calculate(a),
        }
        rows |= {name: (with_list(graph_build, work), with_list(own, work)) for name, work in works.items()}
    return rows
