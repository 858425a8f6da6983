"""Are Python and the packages of the required versions? Installed versions are compared with the declared ones."""

from __future__ import annotations

import importlib.metadata as metadata
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jax_client.cli.doctor.finding import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# Always shown, because a report about a failure needs them; the others only when something is wrong.
SHOWN = ("jax", "jaxlib", "flax", "orbax-checkpoint", "tinker")
ACCELERATOR_PACKAGES = ("libtpu", "jax-cuda")


def python() -> Iterator[Finding]:
    """Compare Python's version with the package's own requirement."""
    required = metadata.metadata("jax_client")["Requires-Python"] or ""
    yield _compared(
        "python", platform.python_version(), required, "Make a new environment with a Python in that range."
    )


def packages() -> Iterator[Finding]:
    """Compare installed packages with this package's requirements, and jax's companions with jax's."""
    from packaging.requirements import Requirement

    own = [Requirement(text) for text in metadata.requires("jax_client") or []]
    jaxs = [Requirement(text) for text in metadata.requires("jax") or []] if _version("jax") else []
    wanted = {req.name: req for req in own if _applies(req)}
    wanted |= {req.name: req for req in jaxs if req.name == "jaxlib" and _applies(req)}
    for name in sorted(wanted, key=lambda name: (SHOWN.index(name) if name in SHOWN else len(SHOWN), name)):
        finding = _package(name, str(wanted[name].specifier))
        if name in SHOWN or finding.status != "OK":
            yield finding
    # Every extra of jax that brings one of these asks for the same version.
    accelerators = {req.name: req for req in jaxs if req.name.startswith(ACCELERATOR_PACKAGES)}
    for name, req in accelerators.items():
        if _version(name) is not None:
            yield _package(name, str(req.specifier))


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _package(name: str, required: str) -> Finding:
    version, advice = _version(name), f"Run: pip install '{name}{required}'"
    if version is None:
        return Finding(check=name, status="FAIL", found=f"not installed, required is {required}", advice=advice)
    return _compared(name, version, required, advice)


def _compared(check: str, version: str, required: str, advice: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    details = {"version": version, "required": required}
    if SpecifierSet(required).contains(version, prereleases=True):
        return Finding(check=check, found=version, details=details)
    found = f"{version}, required is {required}"
    return Finding(check=check, status="FAIL", found=found, advice=advice, details=details)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
