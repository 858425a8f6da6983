"""Are Python and the packages the versions that this package asks for?"""

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
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    required = metadata.metadata("jax_client")["Requires-Python"] or ""
    if SpecifierSet(required).contains(version, prereleases=True):
        yield Finding(check="python", found=version, details={"version": version, "required": required})
    else:
        yield Finding(
            check="python",
            status="FAIL",
            found=f"{version}, required is {required}",
            advice="Make a new environment with a Python in that range.",
            details={"version": version, "required": required},
        )


def packages() -> Iterator[Finding]:
    """Compare installed packages with this package's requirements, and jax's companions with jax's."""
    from packaging.requirements import Requirement

    own = [Requirement(text) for text in metadata.requires("jax_client") or []]
    jaxs = [Requirement(text) for text in metadata.requires("jax") or []] if _version("jax") else []
    wanted = {req.name: req for req in own if _applies(req)}
    wanted |= {req.name: req for req in jaxs if req.name == "jaxlib" and _applies(req)}
    for name in sorted(wanted, key=lambda name: (SHOWN.index(name) if name in SHOWN else len(SHOWN), name)):
        finding = _compare(name, str(wanted[name].specifier), missing="FAIL")
        if finding is not None and (name in SHOWN or finding.status != "OK"):
            yield finding
    # Every extra of jax that brings one of these asks for the same version.
    accelerators = {req.name: req for req in jaxs if req.name.startswith(ACCELERATOR_PACKAGES)}
    for name, req in accelerators.items():
        if (finding := _compare(name, str(req.specifier))) is not None:
            yield finding


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _compare(name: str, required: str, missing: str | None = None) -> Finding | None:
    """Return what is to be said about a package; None where it is absent and need not be there."""
    from packaging.specifiers import SpecifierSet

    version = _version(name)
    details = {"version": version, "required": required}
    advice = f"Run: pip install '{name}{required}'"
    if version is None:
        if missing is None:
            return None
        return Finding(check=name, status="FAIL", found=f"not installed, required is {required}", advice=advice)
    if SpecifierSet(required).contains(version, prereleases=True):
        return Finding(check=name, found=version, details=details)
    return Finding(
        check=name, status="FAIL", found=f"{version}, required is {required}", advice=advice, details=details
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
