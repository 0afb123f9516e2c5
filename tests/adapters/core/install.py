"""Installs the part of torch_cluster that the tests compare with.

It comes as source, 17 files of C++ that take seven minutes to compile; `radius_graph` is in three of them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "1.6.3"
PARTS = "version", "radius"  # of csrc/, and of the package
INIT = f"""
from pathlib import Path

import torch

__version__ = "{VERSION}"
for part in {PARTS}:
    torch.ops.load_library(next(Path(__file__).parent.glob(f"_{{part}}_cpu*.so")))

from .radius import radius, radius_graph
"""


os.environ["FORCE_ONLY_CPU"] = "1"  # of its setup.py


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "-q", "--no-deps"], check=True)


with tempfile.TemporaryDirectory() as folder:
    # setup.py imports torch.
    pip("download", "--no-build-isolation", "--no-binary=:all:", "-d", folder, f"torch_cluster=={VERSION}")
    shutil.unpack_archive(next(Path(folder).glob("*.tar.gz")), folder)
    root = Path(folder, f"torch_cluster-{VERSION}")
    for file in root.glob("csrc/*.cpp"):
        if file.stem not in PARTS:
            file.unlink()
    Path(root, "torch_cluster", "__init__.py").write_text(INIT)
    pip("install", "--no-build-isolation", str(root))
