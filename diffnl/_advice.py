"""What to write instead: the endings of messages about tensors of the wrong kind. All strings, no checks."""

from torch import Tensor


def for_object(name: str, value: object) -> str:
    """How to make a tensor of what is none."""
    if value is None:
        return ""
    kind = type(value).__name__
    if kind == "Atoms" and hasattr(value, "positions"):
        return (
            ": give torch.as_tensor(atoms.positions), torch.as_tensor(atoms.cell.array) and atoms.pbc, or "
            "use diffnl.adapters.ase.neighbor_list"
        )
    if kind == "Cell" and hasattr(value, "array"):
        return f": give torch.as_tensor({name}.array)"
    if hasattr(value, "__array__"):
        return f": give torch.as_tensor({name})"
    if isinstance(value, list | tuple):
        dtype = "" if name in ("mapping", "shifts", "system_idx") else ", dtype=torch.float64"
        return f": give torch.tensor({name}{dtype})"
    return ""


def for_dtype(name: str, value: Tensor) -> str:
    """How to turn the values into those of a dtype that is accepted."""
    if value.is_complex():
        return ""
    if name in ("mapping", "shifts", "system_idx"):
        return f": give {name}.long()"
    if name == "pbc":
        return ": give pbc.bool()"
    return f": give {name}.float() or {name}.double()"


def for_shape(name: str, value: Tensor) -> str:
    """How to get the shape that is asked for, where the meaning of this one can be guessed."""
    shape = tuple(value.shape)
    if name == "positions" and len(shape) == 3 and shape[-1] == 3:
        return (
            f": give positions.reshape(-1, 3), and system_idx = torch.arange({shape[0]}).repeat_interleave("
            f"{shape[1]}) with a ({shape[0]}, 3, 3) `cell`"
        )
    if name != "cell":
        return ""
    if shape == (3,):
        return ": of three lengths torch.diag(cell) makes a cell"
    if shape == (6,):
        return (
            ": of three lengths and angles torch.as_tensor(ase.geometry.cellpar_to_cell(cell.tolist())) "
            "make a cell"
        )
    if shape == (9,):
        return ": give cell.reshape(3, 3)"
    if len(shape) == 2 and shape[0] > 3 and shape[0] % 3 == 0 and shape[1] == 3:
        return ": give cell.reshape(-1, 3, 3)"
    if len(shape) == 2 and shape[1] == 3:
        return ": of three lengths each torch.diag_embed(cell) makes cells"
    return ""
