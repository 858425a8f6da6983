#!/usr/bin/env bash
# Fine-tune the bundled model on this machine: sets up .venv-quickstart, then runs quickstart.py with the arguments given.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

venv=$root/.venv-quickstart
make_venv "$venv" 3.11 3.12 3.13
echo "installing (a few minutes the first time)"
install_model "$venv"
rm -rf "$root/build/lib" # setuptools would pack files that were deleted since
install "$venv" "$root" "rich>=13" "matplotlib>=3.9"
exec "$venv/bin/python" "$root/scripts/examples/quickstart.py" "$@"
