"""The compiled libraries beside this file: which there are, which this torch gets, why one is of no use.

``_C`` holds the schemas of all operators and the CPU backend. ``_cuda`` and ``_hip`` register kernels for
these, and are loaded if torch was built for CUDA or for ROCm, never otherwise. What is wrong with ``_C`` is
an ImportError. A GPU library that is missing or does not load leaves the CPU at work, as on a login node;
tensors on a GPU are then an error that says why.
"""

import mmap
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
NAMES = {"cuda": "CUDA", "hip": "HIP"}
VARIABLES = {"cuda": "TORCH_CUDA_ARCH_LIST", "hip": "PYTORCH_ROCM_ARCH"}
OLDEST_TORCH = (2, 10)
BUILD = "`pip install --no-build-isolation .` in a checkout of diffnl"


@dataclass
class Part:
    """A compiled library. Without a `path` it is one that this torch would need."""

    backend: str  # cpu, cuda, hip, or hostgpu: the GPU kernels on the CPU, for tests
    path: str | None = None
    archs: list[str] = field(default_factory=list)  # GPU architectures
    toolkit: str | None = None  # the release of CUDA or HIP that compiled it
    torch: str | None = None  # the torch it was built with; it serves others too
    schemas: str | None = None  # a fingerprint
    loaded: bool = False
    reason: str | None = None  # why it is not


def find(name: str) -> str | None:
    """The library ``name``."""
    libraries = sorted(FOLDER.glob(f"{name}.*so"))
    return str(libraries[0]) if libraries else None


def describe(path: str, backend: str) -> Part:
    """What the notes in a library say (csrc/part.h)."""

    def note(kind: bytes) -> list[str]:
        start = data.find(b"diffnl " + kind + b";")
        return data[start : data.find(b"\0", start)].decode().split(";")[1:] if start >= 0 else []

    with open(path, "rb") as file:
        if not file.seek(0, 2):
            return Part(backend, path)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            part, toolkit = note(b"part"), note(b"toolkit")
    if len(part) != 4:
        return Part(backend, path)
    backend, archs, built_with, schemas = part
    return Part(
        backend,
        path,
        archs=archs.split(",") if archs else [],
        toolkit=_release(toolkit[0]) if toolkit else None,
        torch=built_with,
        schemas=schemas,
    )


def _release(toolkit: str) -> str:
    """CUDA 13.0 for CUDA 13000, as CUDA counts; others are written as they are."""
    number = toolkit.removeprefix("CUDA ")
    return f"CUDA {int(number) // 1000}.{int(number) % 1000 // 10}" if number.isdigit() else toolkit


# ------------------------------------------------------------------------------------------ loading


def load(path: str) -> str | None:
    """Loads a library; returns what the loader has against it."""
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return str(error.__cause__ or error)  # torch puts words of its own around the loader's
    return None


def load_core() -> Part:
    """Loads ``_C``."""
    path = find("_C")
    if path is None:
        raise ImportError(
            f"diffnl's compiled library is missing: there is no _C*.so in {FOLDER}. Build it against the "
            f"torch of this environment: run {BUILD} (or with `-e .`), and import diffnl from outside that "
            "checkout if you did not use `-e`."
        )
    reason = load(path)
    if reason is not None:
        version = re.match(r"(\d+)\.(\d+)", torch.__version__)
        old = version is not None and tuple(map(int, version.groups())) < OLDEST_TORCH
        advice = "Install a newer torch" if old else f"Rebuild it: run {BUILD}"
        raise ImportError(
            f"diffnl's compiled library {path} does not load under torch {torch.__version__} (it needs "
            f"torch >= {'.'.join(map(str, OLDEST_TORCH))}): {reason}. {advice}."
        )
    part = describe(path, "cpu")
    part.loaded = True
    return part


def backend_of_torch() -> str | None:
    """The GPU backend that this torch was built for. A ROCm torch may name a CUDA version too."""
    if torch.version.hip is not None:
        return "hip"
    return "cuda" if torch.version.cuda is not None else None


def load_kernels(core: Part) -> Part | None:
    """Loads the library that registers the kernels for the GPUs of this torch; None for a CPU torch."""
    backend = backend_of_torch()
    if backend is None:
        return None
    path = find(f"_{backend}")
    if path is None:
        return Part(backend, reason=f"there is no _{backend}*.so in {FOLDER}")
    part = describe(path, backend)
    if part.backend != backend or part.schemas != core.schemas:
        part.reason = f"{path} was built from other sources than {core.path}"
        return part
    part.reason = load(path)
    part.loaded = part.reason is None
    return part


CORE = load_core()
KERNELS = load_kernels(CORE)


# ------------------------------------------------------------------------------- what others may ask


def parts() -> list[Part]:
    """All libraries in this folder, and the one that is missing if this torch needs one that is not there."""
    others = [name for name in NAMES if KERNELS is None or name != KERNELS.backend]
    found = [describe(path, name) for name in others if (path := find(f"_{name}")) is not None]
    for part in found:
        part.reason = f"torch {torch.__version__} was not built for {NAMES[part.backend]}"
    return [CORE, *([] if KERNELS is None else [KERNELS]), *found]


def build_info() -> dict:
    """What the compiled libraries hold.

    Returns:
        ``backends``: those at work, of ``"cpu"``, ``"cuda"``, ``"hip"``; ``torch``: version of torch that the
        library of the CPU was built with (it runs under any torch >= 2.10); ``archs``: GPU architectures at
        work, empty for the CPU; ``parts``: for each library its ``backend``, ``path``, ``archs``, ``toolkit``
        (CUDA or HIP release), ``torch`` and ``schemas`` it was built with, whether it is ``loaded``, and the
        ``reason`` if not. One that this torch needs and that is missing has no path.
    """
    kernels = [] if KERNELS is None or not KERNELS.loaded else [KERNELS]
    return {
        "backends": [part.backend for part in (CORE, *kernels)],
        "torch": CORE.torch,
        "archs": [arch for part in kernels for arch in part.archs],
        "parts": [asdict(part) for part in parts()],
    }


def library_path() -> str:
    """The compiled library that registers diffnl's operators when it is loaded, with kernels for the CPU."""
    return CORE.path


def library_paths() -> list[str]:
    """The compiled libraries that this torch gets: `library_path`, and the one with kernels for its GPUs.

    For programs without Python: link them (`cmake_prefix_path`) or load them before an exported model runs.
    """
    return [part.path for part in (CORE, KERNELS) if part is not None and part.loaded]


def cmake_prefix_path() -> str:
    """What `CMAKE_PREFIX_PATH` needs for `find_package(diffnl)`: the folders of diffnl and of torch."""
    return f"{FOLDER};{torch.utils.cmake_prefix_path}"


# ------------------------------------------------------------------------------------- GPUs, in words


def no_kernels() -> str:
    """Why tensors on a GPU find no kernels, and what to do."""
    if KERNELS is None:
        return f"torch {torch.__version__} was not built for a GPU"
    name = NAMES[KERNELS.backend]
    if not KERNELS.loaded:
        return (
            f"torch {torch.__version__} was built for {name}, and diffnl has no {name} library that works: "
            f"{KERNELS.reason}. Build it: run `DIFFNL_BACKEND={KERNELS.backend} {BUILD.removeprefix('`')}"
        )
    return f"diffnl's {name} library has no kernel for it"


def architecture(device: torch.device) -> str:
    """Of a GPU, as lists of architectures spell it: 9.0 or gfx90a."""
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return found.gcnArchName.partition(":")[0]
    return f"{found.major}.{found.minor}"


def serves(archs: list[str], arch: str) -> bool:
    """Whether code for one of `archs` runs on `arch`.

    On NVIDIA machine code runs on later minor revisions of its own major one, PTX on all later architectures,
    and code for the features of one architecture (9.0a) there alone.
    """
    if arch in archs:
        return True
    if arch.startswith("gfx"):
        return False
    device = tuple(map(int, arch.split(".")))
    for entry in archs:
        words = re.fullmatch(r"(\d+)\.(\d+)([a-z]?)(\+PTX)?", entry)
        if words is None:
            return True  # torch has names for some
        features, ptx = words[3], words[4]
        version = int(words[1]), int(words[2])
        if features == "a":
            if version == device:
                return True
        elif version <= device and (ptx or version[0] == device[0]):
            return True
    return False


# What CUDA and HIP say where a library has no code for the card, or code that the driver cannot take.
NO_CODE = ("no kernel image", "invalid device function", "NoBinaryForGpu")
OLD_DRIVER = ("driver version is insufficient", "PTX was compiled with an unsupported toolchain")


def raise_device_error(error: RuntimeError, device: torch.device) -> None:
    """Raises the user's form of an error of a GPU that the library or the driver does not suit; returns if
    `error` is another one."""
    message = str(error)
    too_old = any(text in message for text in OLD_DRIVER)
    if KERNELS is None or not (too_old or any(text in message for text in NO_CODE)):
        return
    arch = architecture(device)
    library = f"diffnl's {NAMES[KERNELS.backend]} library"
    variable = VARIABLES[KERNELS.backend]
    build = f"`{variable}={arch} pip install --no-build-isolation .` in a checkout of diffnl"
    if too_old:
        raise RuntimeError(
            f"the driver of this machine is too old for {library}, built with {KERNELS.toolkit}: update it, "
            f"or build diffnl with the toolkit of this torch: run {build} ({message})"
        ) from error
    if not serves(KERNELS.archs, arch):
        raise RuntimeError(
            f"{library} has no code for {torch.cuda.get_device_name(device)}, whose architecture is {arch}: "
            f"it holds {', '.join(KERNELS.archs)}. Build it for this one: run {build} ({message})"
        ) from error
