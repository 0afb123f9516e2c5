"""Imports packages that are written with type parameters (PEP 695: `def f[T: Bound](...)`) on Python 3.11.

TorchSim 0.6 asks for Python 3.12, for that syntax alone. Type parameters do nothing at run time: they are
taken out as a module is read, with `T` defined in it for its annotations. The package is as it was installed.
"""

import importlib.machinery
import importlib.util
import re
import sys
from typing import Generic, TypeVar

DEFINITION = re.compile(r"^(\s*(?:class|def) \w+)\[T: [^\]]*\](\(|:)", flags=re.M)


def without_type_parameters(source: str) -> str:
    """`def f[T: A](x: T)` becomes `def f(x: T)`, `class C[T: A]:` becomes `class C(Generic[T]):`."""

    def plain(match: re.Match) -> str:
        return f"{match[1]}(Generic[T]):" if match[2] == ":" else f"{match[1]}("

    return DEFINITION.sub(plain, source)


class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):  # no cached bytecode: it would be that of the file as it is
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def source_to_code(self, data, path, *, _optimize=-1):
        text = without_type_parameters(importlib.util.decode_source(data))
        return super().source_to_code(text.encode(), path, _optimize=_optimize)

    def exec_module(self, module):
        module.__dict__.update(Generic=Generic, T=TypeVar("T"))
        super().exec_module(module)


class Finder(importlib.machinery.PathFinder):
    """Finds the modules of one package."""

    package = ""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] != cls.package:
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install(package: str) -> None:
    """From here on `package` is imported that way, where Python is older than the syntax."""
    if sys.version_info < (3, 12):
        sys.meta_path.insert(0, type("Finder", (Finder,), {"package": package}))
