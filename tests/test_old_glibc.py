"""tools/old_glibc.py: a library linked with its stand-ins asks for no newer glibc than older systems have."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "tools" / "old_glibc.py"
SYMBOLS = """
   10: 0000000000089130  1000 FUNC    GLOBAL DEFAULT   16 pthread_create@@GLIBC_2.34
   11: 0000000000089130  1000 FUNC    GLOBAL DEFAULT   16 pthread_create@GLIBC_2.2.5
   12: 0000000000084ef0   100 FUNC    GLOBAL DEFAULT   16 dlmopen@@GLIBC_2.34
   13: 0000000000084ef0   100 FUNC    GLOBAL DEFAULT   16 dlmopen@GLIBC_2.3.4
   14: 0000000000080000   100 FUNC    GLOBAL DEFAULT   16 sem_wait@GLIBC_2.2.5
   15: 0000000000080000   100 FUNC    GLOBAL DEFAULT   16 sem_wait@GLIBC_2.1
   16: 0000000000080000   100 FUNC    GLOBAL DEFAULT   16 pthread_new@@GLIBC_2.34
   17: 0000000000080000   100 FUNC    GLOBAL DEFAULT   16 pthread_thrice@@GLIBC_2.34
   18: 0000000000080000   100 FUNC    GLOBAL DEFAULT   16 pthread_thrice@GLIBC_2.30
   19: 0000000000080000   100 FUNC    GLOBAL DEFAULT   16 pthread_thrice@GLIBC_2.12
   20: 0000000000080000   100 FUNC    GLOBAL DEFAULT   16 pthread_thrice@GLIBC_2.3
"""


@pytest.fixture(scope="module")
def old_glibc():
    spec = importlib.util.spec_from_file_location("old_glibc", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_symbols_that_have_moved_get_their_last_old_version(old_glibc):
    moved = old_glibc.older(old_glibc.versions_of(SYMBOLS))
    # Not what has not moved, nor what no old system has.
    assert moved == {"pthread_create": (2, 2, 5), "dlmopen": (2, 3, 4), "pthread_thrice": (2, 12)}


USES = """
#include <dlfcn.h>
#include <pthread.h>
static void* nothing(void*) { return nullptr; }
extern "C" int use() {
  pthread_t thread;
  if (pthread_create(&thread, nullptr, nothing, nullptr) != 0) return 1;
  return pthread_join(thread, nullptr) + (dlsym(RTLD_DEFAULT, "malloc") == nullptr);
}
"""


@pytest.mark.skipif(not shutil.which("g++") or not shutil.which("readelf"), reason="needs g++ and readelf")
def test_what_is_linked_with_the_stand_ins_runs_and_asks_for_an_old_glibc(old_glibc, tmp_path):
    flags = old_glibc.main(tmp_path / "old").split()
    if not flags:
        pytest.skip("this glibc is an old one")
    (tmp_path / "use.cpp").write_text(USES)
    library = tmp_path / "use.so"
    command = ["g++", "-shared", "-fPIC", *flags, tmp_path / "use.cpp", "-o", library]
    subprocess.run(command, check=True, timeout=120)
    symbols = subprocess.check_output(["readelf", "--dyn-syms", "--wide", library], text=True)
    asked = re.findall(r"(?:pthread|dlsym)\w*@GLIBC_(\d+)\.(\d+)", symbols)
    assert len(asked) == 3 and max((int(a), int(b)) for a, b in asked) <= (2, 28)
    script = f"import ctypes; assert ctypes.CDLL({str(library)!r}).use() == 0"
    subprocess.run(["python3", "-c", script], check=True, timeout=60)
