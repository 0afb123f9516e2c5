"""`examples/properties.py`: its parts, each by itself, and what it says of potentials that are not good."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("e3nn")
pytest.importorskip("matplotlib")
pytest.importorskip("phonopy")
pytest.importorskip("ase")
import ase.build  # noqa: E402
import ase.io  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import properties as example  # noqa: E402
from mlip.calculator import build_potential, save_potential  # noqa: E402
from mlip.model import ModelConfig  # noqa: E402
from mlip.properties import Bands  # noqa: E402

pytest_plugins = ["copper"]
CPU = torch.device("cpu")
SHORT = ["--supercell", "2", "--ps", "0.02", "--md-atoms", "4"]


def test_script_writes_everything(path, tmp_path, capsys):
    arguments = [str(path), "--out", str(tmp_path), "--reference", "170", "120", "75", *SHORT]
    assert example.main(arguments) == 0
    for plot in ("phonons", "eos", "nve", "npt"):
        assert (tmp_path / f"{plot}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    found = json.loads((tmp_path / "properties.json").read_text())
    assert list(found)[4:] == list(example.PARTS)
    assert found["elastic"]["agree"] and found["phonons"]["agree"]
    assert found["elastic"]["reference"]["C11"] == [170.0, 0.0]
    assert found["elastic"]["derivative"]["C44"] == pytest.approx(
        found["elastic"]["differences"]["C44"], rel=1e-3
    )
    assert len(found["nve"]["time"]) == len(found["npt"]["pressure"]) == 5
    output = capsys.readouterr().out
    for text in (
        "Cu, FCC",
        "C44, atoms held",
        "170.0",
        "bulk modulus (GPa)",
        "X, lowest",
        "NVE: 4 atoms",
        "NPT",
    ):
        assert text in output


def test_script_takes_a_file_and_says_if_derivatives_are_wrong(path, hcp, tmp_path, capsys, monkeypatch):
    ase.io.write(tmp_path / "hcp.cif", hcp)
    run = [str(path), "--out", str(tmp_path), "--structure", str(tmp_path / "hcp.cif"), "--only", "elastic"]
    assert example.main(run) == 0
    assert "Cu2, HEX" in capsys.readouterr().out
    monkeypatch.setattr(example, "ELASTIC_TOLERANCE", 1e-12)
    assert example.main(run) == 1
    assert "elastic constants: derivatives and finite differences do not agree" in capsys.readouterr().err


def test_script_refuses(path, tmp_path, capsys):
    model = build_potential(ModelConfig(species=(28, 29), channels=2), CPU, torch.float32)
    save_potential(model, tmp_path / "alloy.pt")
    for potential, structure, message in (
        (tmp_path / "alloy.pt", "fcc", "has 2 species: --structure must be a file"),
        (path, "rhombus", "no file, and no structure of Cu"),
        (tmp_path / "absent.pt", "fcc", "absent.pt"),
    ):
        assert example.main([str(potential), "--structure", structure, "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        example.main([str(path), "--only", "elastic,colour"])
    assert "'colour' is none of relax, elastic" in capsys.readouterr().err


def test_structures_by_name():
    for name, count in ((None, 1), ("fcc", 1), ("bcc", 1), ("hcp", 2), ("diamond", 2)):
        atoms = example.structure(name, (29,))
        assert len(atoms) == count
        assert atoms.get_volume() / count == pytest.approx(ase.build.bulk("Cu").get_volume())


@pytest.mark.parametrize("symbol, count", [("Cu", 108), ("Mo", 54), ("Si", 64)])
def test_box_is_a_cube(symbol, count):
    atoms = example.box(ase.build.bulk(symbol), 64)
    assert len(atoms) == count
    np.testing.assert_allclose(atoms.cell.array, atoms.cell[0, 0] * np.eye(3), atol=1e-9)


# Potentials that are not good enough.


def fail(*arguments):
    raise RuntimeError("forces above 1e-06 eV/Å after 500 steps of BFGS: is the crystal stable?")


def as_it_is(atoms, calculator):
    """In place of a relaxation, where nothing depends on it."""
    atoms = atoms.copy()
    atoms.calc = calculator
    return atoms


def test_a_part_that_fails_is_named_and_the_others_go_on(path, tmp_path, capsys, monkeypatch):
    """The equation of state and the differences of stresses fail; what they had and the rest is kept."""
    monkeypatch.setattr(example, "relax", as_it_is)
    monkeypatch.setattr(example, "energies_over_volumes", fail)
    monkeypatch.setattr(example, "elastic_by_differences", fail)
    run = [str(path), "--out", str(tmp_path), "--only", "relax,elastic,eos,nve", *SHORT]
    assert example.main(run) == 1
    found = json.loads((tmp_path / "properties.json").read_text())
    assert "error" not in found["relax"] and len(found["nve"]["time"]) == 5
    assert (
        found["eos"] == {"error": found["elastic"]["error"]} and "500 steps of BFGS" in found["eos"]["error"]
    )
    assert np.shape(found["elastic"]["relaxed"]) == (6, 6)
    out, err = capsys.readouterr()
    assert "error: equation of state: forces above" in err and "error: elastic constants: forces above" in err
    assert err.splitlines()[-1].endswith(
        "2 of 4 parts are not as they should be: elastic constants, equation of state"
    )
    assert "part 3 of 4: equation of state" in out and "NVE: 4 atoms" in out


def test_results_are_written_as_parts_end_and_kept_by_the_next_run(path, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second part: the first is on disk, and the run of the rest keeps it."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "relax", as_it_is)
    run = [str(path), "--out", str(tmp_path), *SHORT, "--only"]
    with monkeypatch.context() as patch:
        patch.setitem(example.REPORTS, "nve", interrupted)
        assert example.main([*run, "relax,nve,npt"]) == example.INTERRUPTED
    before = json.loads((tmp_path / "properties.json").read_text())
    assert "relaxed" in before["relax"] and "nve" not in before
    said = capsys.readouterr().err
    assert "interrupted in NVE" in said and "--only nve,npt" in said
    assert example.main([*run, "nve"]) == 0
    after = json.loads((tmp_path / "properties.json").read_text())
    assert after["relax"] == before["relax"] and after["nve"]["time"]
    # Results of another crystal are not mixed in.
    assert example.main([*run, "nve", "--structure", "hcp"]) == 0
    assert "relax" not in json.loads((tmp_path / "properties.json").read_text())


def test_a_crystal_that_does_not_relax_is_named(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "relax", fail)
    assert example.main([str(path), "--out", str(tmp_path)]) == 1
    assert "error: relaxation of the crystal, where all parts start: forces above" in capsys.readouterr().err


def bands(lowest, other, highest=10.0):
    """Two modes at each of two points, of which the lowest one differs between the two ways."""
    derivative, differences = (np.array([[0.0, highest], [f, highest]]) for f in (lowest, other))
    squares = abs(lowest * abs(lowest) - other * abs(other)) / highest**2
    return Bands(
        [("G", "X")], [np.array([0.0, 1.0])], [derivative], [differences], abs(lowest - other), squares, 2
    )


@pytest.mark.parametrize(
    ("lowest", "other", "status", "imaginary"),
    [
        (3.0, 3.001, 0, False),
        # 0.05 THz apart, yet their squares differ by 1e-5 of the largest: a mode that costs nothing.
        (0.02, -0.03, 0, False),
        (-2.0, -2.01, 0, True),
        (3.0, 3.1, 1, False),
        (-2.0, 2.0, 1, True),
    ],
)
def test_imaginary_modes_are_labelled_and_no_disagreement(
    path, tmp_path, capsys, monkeypatch, lowest, other, status, imaginary
):
    monkeypatch.setattr(example, "relax", as_it_is)
    monkeypatch.setattr(example, "phonon_bands", lambda *arguments: bands(lowest, other))
    assert example.main([str(path), "--out", str(tmp_path), "--only", "phonons"]) == status
    out, err = capsys.readouterr()
    assert json.loads((tmp_path / "properties.json").read_text())["phonons"]["imaginary"] == imaginary
    assert ("imaginary modes, the lowest on G-X" in out) == imaginary == ("2.000 i" in out)
    assert ("phonons: derivatives and finite differences do not agree" in err) == bool(status)


def test_a_real_crystal_with_imaginary_modes(path, tmp_path, capsys):
    """bcc copper gains energy by shearing; derivatives and displacements say so alike."""
    run = [str(path), "--structure", "bcc", "--out", str(tmp_path), "--only", "phonons", "--supercell", "2"]
    assert example.main(run) == 0
    found = json.loads((tmp_path / "properties.json").read_text())["phonons"]
    assert found["agree"] and found["imaginary"]
    assert "the crystal is not stable with this potential" in capsys.readouterr().out
