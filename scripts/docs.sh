#!/usr/bin/env bash
# Build the site of docs/ into build/site, in an environment of its own (.venv-docs: no jax, no torch). Arguments go to
# mkdocs: `bash scripts/docs.sh` builds and fails on any broken link; `bash scripts/docs.sh serve` shows the pages while
# they are written.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"
cd "$root"

venv=$root/.venv-docs
make_venv "$venv" 3.11 3.12 3.13
# The tools alone: `pip install .[docs]` would bring jax, which the pages do not need.
mapfile -t tools < <("$venv/bin/python" -c "
import tomllib
print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')")
install "$venv" "${tools[@]}"

if [ $# = 0 ]; then set -- build --strict; fi
NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" "$@"
if [ "$1" = build ]; then echo "built $root/build/site/index.html"; fi
