"""Which fixtures do the tests of faults share? The library that intercepts calls, and two processes with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.faults import fault_child
from support.faults.fault_children import Children


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the calls of a process are intercepted on Linux only")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler (cc, gcc, clang) for the library that intercepts calls")
    path = tmp_path_factory.mktemp("library") / "fault_library.so"
    source = Path(fault_child.__file__).with_name("fault_library.c")
    flags = ["-std=gnu11", "-O1", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(path), str(source), "-ldl", "-lpthread"], check=True, timeout=60)
    return path


@pytest.fixture(scope="session")
def pair(library: Path) -> Iterator[list[Children]]:
    """Two of them, for as many processors."""
    both = [Children(library), Children(library)]
    yield both
    for children in both:
        children.close()


@pytest.fixture
def children(pair: list[Children]) -> Children:
    return pair[0]
